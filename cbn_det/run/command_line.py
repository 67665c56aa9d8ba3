"""What every engine asks of a command line and a config before anything is prepared."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import torch
import yaml
from fvcore.common.config import CfgNode

from ..coco_sets import check_coco_sets
from .errors import ConfigError, one_line


def merge(
    cfg: CfgNode,
    file: str,
    opts: Sequence[str],
    merge_file: Callable[[], None],
    *,
    remote: bool = False,
) -> None:
    """Merges a file, then KEY VALUE pairs, into a config.

    Args:
        merge_file: merges ``file``.
        remote: ``file`` may be an address.

    Raises:
        ConfigError: names the file, or the pairs, and what is wrong.
    """
    where = f"--config-file {file}: "
    if not os.path.isfile(file) and not (remote and "://" in file):
        raise ConfigError(f"{where}no such file")
    late = [word for word in opts if word.startswith("--")]
    if late:
        raise ConfigError(f"{late[0]} must stand before the KEY VALUE pairs")
    if len(opts) % 2:
        raise ConfigError(f"KEY VALUE pairs expected, got {len(opts)} words: {list(opts)}")
    try:
        merge_file()
    except RecursionError as error:
        raise ConfigError(f"{where}its _BASE_ leads back to it") from error
    except (TypeError, AttributeError) as error:  # of code that expects a dict of dicts
        raise ConfigError(f"{where}not a mapping of config keys") from error
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}{one_line(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{' '.join(opts)}: {one_line(error)}") from error


def check_run(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """Checks what is asked for, and takes the CPU where there is no GPU.

    Returns:
        a line for what was replaced.

    Raises:
        ConfigError: names the option or key, and the remedy.
    """
    check_coco_sets(args.coco_dataset, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    if args.precise_bn_iters < 0:
        raise ConfigError("--precise-bn-iters must be 0 or more")
    if args.accumulate < 1:
        raise ConfigError("--accumulate must be 1 or more")
    if not cfg.OUTPUT_DIR:
        raise ConfigError("OUTPUT_DIR is empty: name the folder of this run")
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("--eval-only: DATASETS.TEST is empty")
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only and not weights and not args.resume:
        raise ConfigError(
            "--eval-only: name the checkpoint with MODEL.WEIGHTS, or add --resume for the last one"
            " in OUTPUT_DIR"
        )
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ConfigError(f"MODEL.WEIGHTS {weights}: no such file")
    cfg.MODEL.DEVICE, notes = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    return notes


def usable_device(key: str, device: str) -> tuple[str, list[str]]:
    """The device that a key names; where there is no GPU, the CPU and a line that says so."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device, []
    return "cpu", [f"{key}: no GPU here, '{device}' is replaced by 'cpu'"]
