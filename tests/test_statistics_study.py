"""The statistics experiment's command: its arithmetic, and a measured training."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import arguments, run_loggers_removed, tiny_inputs

from cbn_det.launch import main as launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs
NORMS = ["CBN(burn_in=0, window=3)", "MBN(burn_in=0)", "KN"]
KEYS = ("mean", "var", "var_fixed", "running_mean", "running_var")


def point(half: str, images: int, norms: list[str], apart: bool = False) -> dict[str, Any]:
    """Every error is 0.1, times the images, times the place of the norm; KN's mean is half of BN's
    in the first layer. With a reference, BN's variance has a part of 60 % that all mini-batches
    share, and norms are 0.008 times the sampling error, times their place, from the reference; in
    the second layer not at all."""
    layers = {}
    for name in ("backbone.stem.norm", "roi_heads.box_head.conv1.norm"):
        first = name.startswith("backbone")
        of = {norm: dict.fromkeys(KEYS, 0.1 * images * (i + 1)) for i, norm in enumerate(norms)}
        if first and "KN" in of:
            of["KN"]["mean"] = 0.05 * images
        if apart:
            of["BN"] |= {"var": 0.1 * images, "var_fixed": 0.06 * images}
            for place, norm in enumerate(norms):
                of[norm]["apart_var"] = 0.008 * 0.08 * images * place * first
        layers[name] = {"channels": 4, "values": 9, "norms": of}
    return {"iteration": 9, "half": half, "layers": layers}


def rows_of(points: dict[int, list[dict]], reference: str = "") -> dict[tuple, dict[str, Any]]:
    from statistics_error import table

    return {(r["images"], r["half"], r["norm"]): r for r in table(points, reference)}


def numbers(row: dict[str, Any], *names: str) -> list[float]:
    return [row[name] for name in names]


def test_a_row_is_of_a_batch_size_a_half_and_a_norm() -> None:
    norms = ["BN", "KN", "MBN(window=4)"]
    halves = ("first", "second")
    rows = rows_of({n: [point(half, n, norms) for half in halves] for n in (1, 4)})
    assert set(rows) == {(n, half, norm) for n in (1, 4) for half in halves for norm in norms}
    row = rows[4, "second", "KN"]
    # half of BN's in one of two layers, twice as much in the other
    mean = (0.05 * 4 + 0.2 * 4) / 2
    assert numbers(row, "mean", "mean / BN", "mean better") == pytest.approx([mean, 1, 50])
    assert numbers(row, "var", "var / BN", "var better") == pytest.approx([0.8, 2, 0])
    assert numbers(row, "running mean", "running var") == pytest.approx([0.8, 0.8])
    assert "mean / BN" not in rows[4, "second", "BN"] and "apart: median" not in row


def test_points_of_a_half_are_averaged() -> None:
    points = [{"half": half} for half in ("first", "first", "second", "second")]
    for each, mean in zip(points, (1.0, 3.0, 5.0, 9.0), strict=True):
        each["layers"] = {"a": {"norms": {"BN": {"mean": mean}}}}
    rows = rows_of({2: points})
    assert [row["mean"] for row in rows.values()] == [2.0, 7.0]
    assert rows[2, "first", "BN"]["var"] is None, "nothing was measured"


def test_distance_from_a_reference_is_in_sampling_errors() -> None:
    reference, few, many = "CBN(positions=None)", "CBN(positions=64)", "CBN(positions=512)"
    rows = rows_of({4: [point("first", 4, ["BN", reference, few, many], apart=True)]}, reference)
    names = [f"apart: {name}" for name in ("median", "below 1 %", "worst", "error added")]
    # var 0.1 with a common part of 0.06: the mini-batches' own part is 0.08; and BN's error is 0.1,
    # the reference's 0.2, theirs 0.3 and 0.4
    assert numbers(rows[4, "first", few], *names) == pytest.approx([0.8, 50, 1.6, 50])
    assert numbers(rows[4, "first", many], *names) == pytest.approx([1.2, 50, 2.4, 100])
    assert "apart: median" not in rows[4, "first", reference]


@pytest.mark.parametrize(
    ("length", "at"), [(2, [1]), (10, [2, 4, 7, 9]), (40, [3, 11, 19, 30, 39])]
)
def test_moments_of_a_training(length: int, at: list[int]) -> None:
    from statistics_error import moments

    assert moments(length) == at


# ---- a training ------------------------------------------------------------------------------


def measure(inputs: Path, output: Path, *words: str) -> int:
    from statistics_error import main

    own = arguments(inputs, "")[:6]  # config and data set
    own += ["--images", "2", "--truth-images", "6", "--output", str(output)]
    with run_loggers_removed():
        return main([*own, *words])


def test_a_measured_run_is_the_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import statistics_error

    trained = []

    class Kept(statistics_error.Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            trained.append(self)

    monkeypatch.setattr(statistics_error, "Trainer", Kept)
    words = ("DATASETS.TEST", "()", "SEED", "1")
    with run_loggers_removed():
        start = arguments(inputs, tmp_path / "plain", "--engine", "detectron2", *words)
        assert launch(start) == 0
    assert measure(inputs, tmp_path / "out", "--norms", *NORMS) == 0
    wanted = torch.load(tmp_path / "plain" / "model_final.pth", weights_only=True)["model"]
    found = trained[0].bare_model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    text = (tmp_path / "out" / "statistics_error.jsonl").read_text()
    points = [json.loads(line) for line in text.splitlines()]
    assert [point["iteration"] for point in points] == [1, 2, 3]
    assert [point["half"] for point in points] == ["first", "second", "second"]
    for each in points:
        assert (each["images"], each["seed"]) == (2, 1)
        names = list(each["layers"])
        assert len(names) == sum(name.endswith("running_mean") for name in wanted)
        assert "roi_heads" in names[-1], "in the order of the forward pass"
        for layer in each["layers"].values():
            assert list(layer["norms"]) == ["BN", *NORMS]
            errors = [x for found in layer["norms"].values() for x in found.values()]
            assert None not in errors and layer["norms"]["BN"]["mean"] > 0
    # the truth is of three mini-batches of two images behind the end of training
    stem = next(layer for name, layer in points[0]["layers"].items() if "stem" in name)
    assert stem["values"] == 6 * 48 * 48
    with open(tmp_path / "out" / "statistics_error.csv", newline="") as file:
        assert {(row["half"], row["norm"]) for row in csv.DictReader(file)} == {
            (half, norm) for half in ("first", "second") for norm in ("BN", *NORMS)
        }
    assert "geometric mean over layers" in capsys.readouterr().out


def test_a_run_that_diverged_is_in_no_table(inputs: Path, tmp_path: Path, monkeypatch) -> None:
    import statistics_error

    from cbn_det.run.nonfinite import Diverged

    def train(words: list[str], request: Any) -> list[dict]:
        if words[words.index("SEED") + 1] == "2":
            raise Diverged("losses not finite: loss_cls")
        return [point("first", 2, ["BN", "KN"])]

    monkeypatch.setattr(statistics_error, "train", lambda words, *args: train(list(words), args))
    assert measure(inputs, tmp_path, "--norms", "KN", "--seeds", "1", "2") == 1
    lines = (tmp_path / "statistics_error.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1]


NO_NORM = [
    word for part in ("RESNETS", "FPN", "ROI_BOX_HEAD") for word in (f"MODEL.{part}.NORM", "")
]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--norms", "GN"], "GN cannot be measured beside the model's norms"),
        (["--norms", "KN", "--opts", *NO_NORM], "no BatchNorm2d"),
        (["--truth-images", "0"], "argument --truth-images: expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_a_line(
    inputs: Path, tmp_path: Path, capsys, words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        measure(inputs, tmp_path, *words)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_the_tool_parses_its_own_examples() -> None:
    import statistics_error

    text = statistics_error.__doc__.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python ")]
    assert len(lines) == 5
    for line in lines:
        statistics_error.make_parser().parse_args(shlex.split(line)[2:])
