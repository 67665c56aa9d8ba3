"""The config keys that the standalone engine honours, and how a file of them is read.

Names and defaults are detectron2's. A key or a value that this engine cannot honour is an error
that names it, never ignored: a run must not differ silently from what its file says.
"""

from __future__ import annotations

import difflib
import os
from ast import literal_eval
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ..run.command_line import merge
from ..run.errors import ConfigError
from .config_values import check_values


def get_cfg() -> CfgNode:
    """A config with detectron2's default for every key that this engine honours."""
    return CfgNode(_defaults("honoured"))


def read_config(file: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config (with its ``_BASE_``) and KEY VALUE words over the defaults. A config
    that detectron2 dumped is one: its other keys must hold detectron2's defaults.

    Args:
        file: path of the YAML file.
        opts: ``["SOLVER.MAX_ITER", "100", ...]``, as on the launcher's command line.

    Returns:
        The config, not frozen, with every value checked.

    Raises:
        ConfigError: a missing or unreadable file, a key or value that this engine does not honour;
            names it and what is possible.
    """
    file = os.fspath(file)
    cfg = get_cfg()

    def merge_file() -> None:
        cfg.merge_from_other_cfg(CfgNode(_honoured(CfgNode.load_yaml_with_base(file))))

    merge(cfg, file, opts, merge_file, has=_is_honoured)
    try:
        check_values(cfg, get_cfg())
    except ConfigError as error:
        by_option = any(key in str(error) for key in opts[::2])
        where = "" if by_option else f"--config-file {file}: "
        raise ConfigError(f"{where}{error}") from error
    return cfg


@cache
def _defaults(part: str) -> dict[str, Any]:
    text = Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8")
    return _decoded(yaml.safe_load(text)[part])


def _decoded(value: Any) -> Any:
    """What text stands for, where it is a Python literal, as configs write tuples."""
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    try:
        return literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _honoured(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without the keys that this engine does not have and that hold detectron2's default."""
    kept = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            kept[key] = _honoured(value, f"{prefix}{key}.")
        elif _is_honoured(f"{prefix}{key}", value):
            kept[key] = value
    return {key: value for key, value in kept.items() if value != {}}


def _is_honoured(key: str, value: Any) -> bool:
    """Whether this engine has the key, False where the value is the one that it has anyway.

    Raises:
        ConfigError: it has not, and would do something else than detectron2.
    """
    known = dict(_leaves(_defaults("honoured")))
    sections = {name[:end] for name in known for end in range(len(name)) if name[end] == "."}
    if key in known or key in sections:  # what a section may be set to is told by the merge
        return True
    fixed = dict(_leaves(_defaults("fixed")))
    if key in fixed and _plain(value) == _plain(fixed[key]):
        return False
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.93)
    hint = f" (did you mean {close[0]}?)" if close else ""
    if key in fixed:
        hint = f" with other values than {fixed[key]!r}"
    raise ConfigError(
        f"{key} is not a key that the standalone engine honours{hint};"
        " --engine detectron2 takes all of detectron2's keys"
    )


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of all values that are no sections, with these."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    """A value with lists for tuples, however a file or a command line writes it."""
    value = _decoded(value)
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value
