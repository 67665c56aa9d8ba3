"""What the launcher refuses before it starts, what it replaces, and how processes end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tiny_run import arguments, parsed, run_loggers_removed, tiny_inputs

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("SOLVER.IMS_PER_BATCH", "3", "--num-gpus", "2"), "--num-gpus must stand before"),
        (("--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "3"), "SOLVER.IMS_PER_BATCH"),
        (("--num-gpus", "0"), "--num-gpus"),
        (("--num-machines", "2"), "--dist-url"),
        (("--num-machines", "2", "--machine-rank", "2"), "--machine-rank"),
        (("SOLVER.MAX_ITERS", "3"), "SOLVER.MAX_ITERS"),
        (("SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER"),
        (("SOLVER.MAX_ITER",), "KEY VALUE"),
        (("SOLVER.AMP.ENABLED", "True"), "SOLVER.AMP.ENABLED"),
        (("SOLVER.REFERENCE_WORLD_SIZE", "4"), "SOLVER.REFERENCE_WORLD_SIZE"),
        (
            ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"),
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE 'all'",
        ),
        (("MODEL.WEIGHTS", "absent.pth"), "MODEL.WEIGHTS absent.pth"),
        (("MODEL.FPN.NORM", "CNB"), "MODEL.FPN.NORM"),
        (("MODEL.FPN.NORM", "CBN(windows=3)"), "MODEL.FPN.NORM"),
        (("--eval-only",), "MODEL.WEIGHTS"),
        (("--precise-bn-iters", "-1"), "--precise-bn-iters"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", "3"), "MODEL.ROI_HEADS.NUM_CLASSES"),
        (("DATASETS.TRAIN", "('no_such_set',)"), "no_such_set"),
        (("MODEL.BACKBONE.NAME", "no_such_backbone"), "no_such_backbone"),
    ],
)
def test_refusals_name_the_key_and_show_no_traceback(
    inputs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    expected: str,
) -> None:
    from cbn_det.launch import main

    with run_loggers_removed():
        assert main(arguments(inputs, tmp_path, *words)) == 2
    said = capfd.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("file", "expected"),
    [("absent.yaml", "absent.yaml: no such file"), ("model.py", "model.py: no such file")],
)
def test_config_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, expected: str
) -> None:
    from cbn_det.launch import main

    assert main(["--config-file", str(tmp_path / file)]) == 2
    assert expected in capsys.readouterr().err


def test_sync_bn_is_replaced_in_several_cpu_processes_only(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.registry import norms_in_use

    words = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "nnSyncBN")
    cfg, notes = build_config(parsed(inputs, tmp_path, *words), 2)
    assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.FPN.NORM == "naiveSyncBN_N"
    assert len(notes) == 2
    assert norms_in_use(cfg) == {
        "MODEL.RESNETS.NORM": "naiveSyncBN_N",
        "MODEL.FPN.NORM": "naiveSyncBN_N",
        "MODEL.ROI_BOX_HEAD.NORM": "BN",  # and no mask head, no RetinaNet
    }
    cfg, notes = build_config(parsed(inputs, tmp_path, *words), 1)
    assert cfg.MODEL.RESNETS.NORM == "SyncBN" and not notes


def test_reference_world_size_scales_the_schedule(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.plugin.config import build_config

    words = ("SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", "2")
    cfg, _ = build_config(parsed(inputs, tmp_path, *words, "SOLVER.MAX_ITER", "100"), 4)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (8, 25)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.04)


def test_without_a_gpu_the_device_becomes_cpu(inputs: Path, tmp_path: Path) -> None:
    import torch

    from cbn_det.plugin.config import build_config

    if torch.cuda.is_available():
        return
    cfg, notes = build_config(parsed(inputs, tmp_path, "MODEL.DEVICE", "cuda"), 1)
    assert cfg.MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE" in notes[0]


def _die_on_rank_1() -> int:
    """A job: rank 1 is killed, rank 0 waits for it in vain."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return 0


def test_a_killed_process_ends_the_others() -> None:
    from cbn_det.plugin.launch import Layout, run_processes

    ended = run_processes(Layout(processes=2), "cpu", _die_on_rank_1, ())
    assert ended == (1, "rank 1 was killed by SIGKILL")
