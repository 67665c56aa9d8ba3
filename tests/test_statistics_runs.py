"""Measuring statistics in a run on detectron2, from the launcher to the run folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import arguments, result_of, run_loggers_removed, tiny_inputs

from cbn_det.launch import main as launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs
NORMS = ["CBN(burn_in=0, window=3)", "MBN(burn_in=0)", "KN"]
REQUEST = json.dumps({"norms": ["BN", *NORMS], "at": [1, 3], "images": 6})


def run_here(inputs: Path, output: Path, *words: str) -> int:
    more = () if any(w[:1].isupper() for w in words) else ("DATASETS.TEST", "()")
    words = ("--engine", "detectron2", *words, *more)
    with run_loggers_removed():
        from statistics_run import main

        start = main if "--statistics-error" in words else launch
        return start(arguments(inputs, output, *words, config="tiny.yaml"))


def weights(folder: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def test_a_measured_run_is_the_run(inputs: Path, tmp_path: Path) -> None:
    plain, measured, again = (tmp_path / name for name in ("plain", "measured", "again"))
    words = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2")
    flag = ("--statistics-error", REQUEST)
    assert run_here(inputs, plain, *words) == 0
    assert run_here(inputs, measured, *flag, *words) == 0
    wanted, found = weights(plain), weights(measured)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    text = (measured / "statistics_error.jsonl").read_text()
    points = [json.loads(line) for line in text.splitlines()]
    assert [point["iteration"] for point in points] == [1, 3]
    for point in points:
        assert (point["images"], point["images_per_batch"]) == (6, 2)
        names = list(point["layers"])
        assert len(names) == sum(name.endswith("running_mean") for name in wanted)
        assert "roi_heads" in names[-1], "in the order of the forward pass"
        for layer in point["layers"].values():
            assert list(layer["norms"]) == ["BN", *NORMS]
            numbers = [x for found in layer["norms"].values() for x in found.values()]
            assert None not in numbers and layer["norms"]["BN"]["mean"] > 0

    # resumed after the second iteration
    again.mkdir()
    shutil.copy(measured / "model_0000001.pth", again)
    (again / "last_checkpoint").write_text("model_0000001.pth")
    assert run_here(inputs, again, *flag, "--resume", *words) == 0
    (line,) = (again / "statistics_error.jsonl").read_text().splitlines()
    assert json.loads(line) == points[1]
    found = weights(again)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    # the shadows' memory is in checkpoints that a run may go on from, and in no other
    sizes = [(measured / f"{name}.pth").stat().st_size for name in ("model_0000001", "model_final")]
    assert sizes[0] > 1.5 * sizes[1]


def test_what_cannot_be_measured_is_refused(inputs: Path, tmp_path: Path) -> None:
    gn = '{"norms": ["GN"], "at": [1]}'
    assert run_here(inputs, tmp_path, "--statistics-error", gn) == 2
    message = result_of(tmp_path)["message"]
    assert "GN cannot be measured beside the model's norms" in message


def test_a_run_without_batchnorm_is_refused(inputs: Path, tmp_path: Path) -> None:
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
    words = [word for key in keys for word in (key, "")]
    flag = ("--statistics-error", REQUEST)
    assert run_here(inputs, tmp_path, *flag, *words, "DATASETS.TEST", "()") == 2
    assert "no BatchNorm2d" in result_of(tmp_path)["message"]
