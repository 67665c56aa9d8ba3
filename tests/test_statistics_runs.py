"""Measuring statistics in runs of both engines, from the launcher to the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import arguments, result_of, run_loggers_removed, tiny_inputs

from cbn_det.launch import main

inputs = tiny_inputs
ENGINES = [pytest.param("detectron2", marks=pytest.mark.detectron2), "standalone"]
CONFIGS = {"detectron2": "tiny.yaml", "standalone": "standalone.yaml"}
NORMS = ["CBN(burn_in=0, window=3)", "MBN(burn_in=0)", "KN"]
REQUEST = json.dumps({"norms": ["BN", *NORMS], "at": [1, 3], "images": 6})


def run_here(engine: str, inputs: Path, output: Path, *words: str) -> int:
    more = () if any(w[:1].isupper() for w in words) else ("DATASETS.TEST", "()")
    words = ("--engine", engine, *words, *more)
    with run_loggers_removed():
        return main(arguments(inputs, output, *words, config=CONFIGS[engine]))


def weights(folder: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_measured_run_is_the_run(engine: str, inputs: Path, tmp_path: Path) -> None:
    plain, measured, again = (tmp_path / name for name in ("plain", "measured", "again"))
    words = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2")
    flag = ("--statistics-error", REQUEST)
    assert run_here(engine, inputs, plain, *words) == 0
    assert run_here(engine, inputs, measured, *flag, *words) == 0
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
    assert run_here(engine, inputs, again, *flag, "--resume", *words) == 0
    (line,) = (again / "statistics_error.jsonl").read_text().splitlines()
    assert json.loads(line) == points[1]
    found = weights(again)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    # the shadows' memory is in checkpoints that a run may go on from, and in no other
    sizes = [(measured / f"{name}.pth").stat().st_size for name in ("model_0000001", "model_final")]
    assert sizes[0] > 1.5 * sizes[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("[]", "--statistics-error takes"),
        ('{"norms": ["GN"], "at": [1]}', "GN cannot be measured beside the model's norms"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    engine: str, request_: str, message: str, inputs: Path, tmp_path: Path
) -> None:
    assert run_here(engine, inputs, tmp_path, "--statistics-error", request_) == 2
    result = result_of(tmp_path)
    assert result["status"] == "failed" and message in result["message"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_without_batchnorm_is_refused(engine: str, inputs: Path, tmp_path: Path) -> None:
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
    words = [word for key in keys for word in (key, "")]
    flag = ("--statistics-error", REQUEST)
    assert run_here(engine, inputs, tmp_path, *flag, *words, "DATASETS.TEST", "()") == 2
    assert "no BatchNorm2d" in result_of(tmp_path)["message"]
