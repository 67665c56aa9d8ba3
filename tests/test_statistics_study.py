"""The statistics experiment's command, with a fake launcher that leaves what a real one leaves."""

from __future__ import annotations

import json
import math
import os
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cbn_det.run.arguments import argument_parser
from cbn_det.study import statistics_error
from cbn_det.study.statistics_error import NORMS, Experiment, measure
from cbn_det.study.statistics_figure import apart_figure, error_figure
from cbn_det.study.statistics_results import (
    Measured,
    apart_from_reference,
    geometric_mean,
    read_points,
    rows_of,
)

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_statistics_launcher.py")))


def experiment(folder: Path, **changes) -> Experiment:
    settings = {
        "norms": ["KN", "MBN(window=4)"],
        "images": [1, 4],
        "seeds": [1],
        "engine": "detectron2",
        "iterations": 40,
    }
    return Experiment(folder / "out", launcher=LAUNCHER, **(settings | changes))


def attempts(folder: Path) -> list[int]:
    files = sorted((folder / "out" / "runs").glob("*/attempts"))
    return [len(file.read_text().split()) for file in files]


def test_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(experiment(tmp_path, seeds=[1, 2]), jobs=4) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "out"
    data = json.loads((output / "statistics_error.json").read_text())
    rows = {(row["images"], row["norm"]): row for row in data["rows"]["second_half"]}
    assert set(rows) == {(i, n) for i in (1, 4) for n in ("BN", "KN", "MBN(window=4)")}
    row = rows[4, "KN"]
    # half of BN's in one of two layers, twice as much in the other
    assert row["mean"] == pytest.approx((0.05 * 4 + 0.2 * 4) / 2)
    assert row["mean_ratio"] == pytest.approx(math.sqrt(0.5 * 2.0))
    assert (row["mean_better"], row["var_better"]) == (0.5, 0.0)
    assert row["var_ratio"] == pytest.approx(2.0) and row["running_var"] == pytest.approx(0.8)
    assert [(run["seed"], run["images_per_gpu"]) for run in data["runs"]] == [
        (1, 1), (1, 4), (2, 1), (2, 4),
    ]  # fmt: skip
    run = data["runs"][0]
    assert run["versions"] == {"python": "3.11"} and run["machine"]["cpu"] == "a CPU"
    at = [point["iteration"] for point in run["points"]]
    assert at == sorted(set(at)) and 99 not in at and max(at) == 39
    text = [x for point in run["points"] for x in json.dumps(point).split() if x.startswith("7.")]
    assert not text, "the line of before the resume"
    table = (output / "statistics_error.md").read_text()
    assert table.startswith("# Errors of norms' statistics: scratch, trained with BN, detectron2")
    assert "1 image per GPU" in table and "4 images per GPU" in table
    assert "Made with: seeds 1 2; a CPU, 2 cores, 1 threads a process; python 3.11." in table
    line = next(x for x in table.splitlines() if x.startswith("| KN"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["KN", "0.125", "1.00", "50 %", "0.200", "2.00", "0 %", "0.200", "0.200"]
    assert (output / "statistics_error.png").read_bytes().startswith(b"\x89PNG")
    assert "4 images per GPU" in printed and "Files: " in printed


def test_distance_from_a_reference_is_told_in_sampling_errors(tmp_path: Path, capsys) -> None:
    few, many = "CBN(positions=64)", "CBN(positions=512)"
    study = experiment(tmp_path, norms=[few, many], reference="CBN(positions=None)")
    assert measure(study, jobs=2) == 0
    assert study.norms == ["BN", "CBN(positions=None)", few, many]
    output = tmp_path / "out"
    table = (output / "statistics_error.md").read_text()
    assert "4 images per GPU, distance from CBN(positions=None)" in table
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.partition("distance from CBN")[2].splitlines()
        if line.startswith(f"| {few}") or line.startswith(f"| {many}")
    ]
    # var 0.1 with a common part of 0.06: the mini-batches' own part is 0.08; and BN's error is 0.1,
    # the reference's 0.2, theirs 0.3 and 0.4
    half = ["0.80%", "50%", "1.6% backbone.stem.norm", "+50.00%"]
    assert rows[0] == [few, *half, *half]
    assert rows[1][1] == "1.20%" and rows[1][3:5] == ["2.4% backbone.stem.norm", "+100.00%"]
    assert len(rows) == 4  # of two batch sizes
    assert (output / "statistics_apart.png").read_bytes().startswith(b"\x89PNG")
    reference = "CBN(positions=None)"
    figure = apart_figure(apart_from_reference(read_runs(output), reference), reference)
    for axes in figure.axes:
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert lines["stem"] == pytest.approx([0.016, 0.024])
        assert lines["median of layers"] == pytest.approx([0.016, 0.024])  # of those it changes


def test_without_a_reference_there_is_no_distance(tmp_path: Path) -> None:
    measure(experiment(tmp_path), jobs=2)
    assert "sampling error" not in (tmp_path / "out" / "statistics_error.md").read_text()
    assert not (tmp_path / "out" / "statistics_apart.png").exists()


def read_runs(output: Path) -> list[Measured]:
    """The runs of a report's JSON file."""
    data = json.loads((output / "statistics_error.json").read_text())
    return [
        Measured(
            SimpleNamespace(split=SimpleNamespace(images=run["images_per_gpu"])),
            {},
            run["points"],
            length=40,
        )
        for run in data["runs"]
    ]


def test_finished_runs_are_kept(tmp_path: Path) -> None:
    measure(experiment(tmp_path), jobs=2)
    measure(experiment(tmp_path), jobs=2)
    assert attempts(tmp_path) == [1, 1]
    measure(experiment(tmp_path, truth_images=50), jobs=2)
    assert attempts(tmp_path) == [1, 1, 1, 1]


def test_a_run_that_fails_is_told_and_tried_again(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "4")
    assert measure(experiment(tmp_path), jobs=2) == 1
    assert "BN 1x4 seed 1: failed: crashed (exit code 1)" in capsys.readouterr().out
    monkeypatch.delenv("FAKE_FAILS")
    assert measure(experiment(tmp_path), jobs=2) == 0
    assert sorted(attempts(tmp_path)) == [1, 2]


@pytest.mark.parametrize(("how", "code"), [("FAKE_FAILS", 1), ("FAKE_DIVERGES", 0)])
def test_only_finished_runs_are_in_the_tables(tmp_path, capsys, monkeypatch, how, code) -> None:
    monkeypatch.setenv(how, "4")
    study = experiment(tmp_path, norms=["MBN"], reference="KN")
    assert measure(study, jobs=2) == code
    data = json.loads((tmp_path / "out" / "statistics_error.json").read_text())
    for half in data["rows"].values():
        assert {row["images"] for row in half} == {1}
    printed = capsys.readouterr().out
    assert "1 image per GPU, distance from KN" in printed and "4 images per GPU" not in printed
    assert "Left out: BN 1x4 seed 1: " in printed
    assert [bool(run["points"]) for run in data["runs"]] == [True, True], "the file has everything"


def test_halves_are_of_the_planned_training() -> None:
    run = SimpleNamespace(split=SimpleNamespace(images=2))
    layers = {"stem": {"norms": {"BN": {"var": 0.1, "var_fixed": 0.0}, "KN": {"apart_var": 0.1}}}}
    layers["stem"]["norms"]["KN"]["var"] = 0.1
    points = [{"iteration": at, "layers": layers} for at in (60, 299, 300)]
    for got in ({}, {"iterations": 60}, {"iterations": 600}):
        measured = [Measured(run, got, points, length=600)]
        late = [row.late for row in apart_from_reference(measured, "MBN")]
        assert late == [False, False, True]
        assert rows_of(measured, late=False) and rows_of(measured, late=True)
        assert not rows_of([Measured(run, got, points[:2], length=600)], late=True)


def test_runs_side_by_side_get_gpus_of_their_own(tmp_path, capsys) -> None:
    study = experiment(tmp_path)
    assert measure(study, jobs=2, gpus=["4", "5"]) == 0
    assert "2 runs, up to 2 at a time on GPU 4 5, in " in capsys.readouterr().out
    results = [json.loads((r.folder / "result.json").read_text()) for r in study.plan().runs()]
    assert sorted(result["gpus"] for result in results) == ["4", "5"]


@pytest.mark.parametrize(
    ("words", "jobs", "gpus"),
    [
        ([], 6, []),
        (["--opts", "MODEL.DEVICE", "cuda"], 2, ["2", "3"]),
        (["--jobs", "5", "--opts", "MODEL.DEVICE", "cuda"], 5, ["2", "3"]),
    ],
)
def test_the_tool_has_as_many_runs_side_by_side_as_gpus(
    tmp_path, monkeypatch, words, jobs, gpus
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    seen = {}

    def pretrain(run, gpus):
        seen["backbone"] = list(gpus)

    def run_all(runs, jobs, done, gpus):
        seen["runs"] = (jobs, list(gpus))
        return []

    monkeypatch.setattr(statistics_error, "train_backbone", pretrain)
    monkeypatch.setattr(statistics_error, "run_all", run_all)
    tool = runpy.run_path(str(REPOSITORY / "tools" / "statistics_error.py"))
    what = ["--recipe", "finetune", "--engine", "detectron2", "--output", str(tmp_path / "out")]
    assert tool["main"]([*what, *words]) == 0
    assert seen == {"backbone": gpus, "runs": (jobs, gpus)}


def test_what_a_run_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = experiment(tmp_path, norms=["KN", "BN"], trained_with="CBN", images=[2])
    assert measure(wanted, jobs=1, dry_run=True) == 0
    words = shlex.split(capsys.readouterr().out)
    request = json.loads(words[words.index("--statistics-error") + 1])
    assert request == {"norms": ["BN", "KN"], "at": wanted.moments(), "images": 200}
    assert words[words.index("MODEL.FPN.NORM") + 1] == "CBN"
    assert words[words.index("SOLVER.IMS_PER_BATCH") + 1] == "2"
    assert words[words.index("DATASETS.TEST") + 1] == "()"
    assert not wanted.output.exists()


def test_moments_of_short_and_long_trainings(tmp_path: Path) -> None:
    for length in (2, 3, 10, 90_000):
        at = experiment(tmp_path, iterations=length).moments()
        assert at == sorted(set(at)) and at[0] >= 1 and at[-1] == length - 1


def test_the_config_s_own_length(tmp_path: Path) -> None:
    assert experiment(tmp_path, iterations=None).length == 2400
    config = tmp_path / "c.yaml"
    config.write_text("SOLVER:\n  BASE_LR: 0.1\n")
    with pytest.raises(ValueError, match="--iters says how long to train"):
        experiment(tmp_path, iterations=None, config=config)
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is set by --iters"):
        experiment(tmp_path, overrides=["SOLVER.MAX_ITER", "10"])


@pytest.mark.detectron2
@pytest.mark.parametrize("images", [1, 2])
def test_a_config_that_scales_its_schedule_is_as_long_as_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int
) -> None:
    from cbn_det.plugin.config import build_config

    config = REPOSITORY / "configs" / "coco" / "mask_rcnn_R_50_FPN_1x" / "bn_2img.yaml"
    study = experiment(tmp_path, iterations=None, config=config, images=[images])
    assert measure(study, jobs=1, dry_run=True) == 0
    words = shlex.split(capsys.readouterr().out)[len(LAUNCHER) :]
    args = argument_parser().parse_args(words)
    solver = build_config(args, world_size=1)[0].SOLVER
    assert solver.MAX_ITER == study.length == 90_000 and solver.STEPS == (60_000, 80_000)
    assert max(json.loads(args.statistics_error)["at"]) == 89_999
    assert solver.IMS_PER_BATCH == images
    assert solver.BASE_LR == pytest.approx(0.02 * images / 16)


def test_nothing_measured_is_no_figure(tmp_path: Path) -> None:
    assert read_points(tmp_path) == []
    assert error_figure([], ["BN"]) is None
    assert rows_of([], late=True) == []
    assert geometric_mean([]) is None


def test_the_tool_parses_its_own_examples() -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "statistics_error.py"))
    text = tool["__doc__"].replace("\\\n", " ")
    examples = [line for line in text.splitlines() if "python tools/statistics_error.py" in line]
    assert len(examples) == 5
    for example in examples:
        args = tool["make_parser"]().parse_args(shlex.split(example)[2:])
        assert args.norms and args.iters == 600
    assert tool["make_parser"]().parse_args([]).norms == NORMS
