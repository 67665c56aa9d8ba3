"""The statistics experiment's command, with a fake launcher that leaves what a real one leaves."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import statistics_error  # noqa: E402
from statistics_error import draw, main, make_parser, plan_of, read_points, table  # noqa: E402

LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_statistics_launcher.py")))
WORDS = ["--norms", "KN", "MBN(window=4)", "--images", "1", "4", "--iters", "40"]


def measure(folder: Path, *words: str) -> int:
    return main([*WORDS, "--output", str(folder), "--jobs", "4", *words], LAUNCHER)


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(folder / "statistics_error.csv", newline="") as file:
        return {(r["images"], r["half"], r["norm"]): r for r in csv.DictReader(file)}


def attempts(folder: Path) -> list[int]:
    files = sorted((folder / "runs").glob("*/attempts"))
    return [len(file.read_text().split()) for file in files]


def numbers(row: dict[str, str], *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def test_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(tmp_path, "--seeds", "1", "2") == 0
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path)
    norms = ("BN", "KN", "MBN(window=4)")
    halves = ("first", "second")
    assert set(rows) == {(i, half, n) for i in "14" for half in halves for n in norms}
    row = rows["4", "second", "KN"]
    # half of BN's in one of two layers, twice as much in the other
    mean = (0.05 * 4 + 0.2 * 4) / 2
    assert numbers(row, "mean", "mean / BN", "mean better") == pytest.approx([mean, 1, 50])
    assert numbers(row, "var", "var / BN", "var better") == pytest.approx([0.8, 2, 0])
    assert numbers(row, "running mean", "running var") == pytest.approx([0.8, 0.8])
    assert rows["4", "second", "BN"]["mean / BN"] == "" and "apart: median" not in row
    assert (tmp_path / "statistics_error.png").read_bytes().startswith(b"\x89PNG")
    assert "statistics_error.csv" in printed and "geometric mean over layers" in printed


def test_of_a_point_that_was_measured_twice_the_later_one_counts(tmp_path: Path) -> None:
    measure(tmp_path)
    points = read_points(next((tmp_path / "runs").iterdir()))
    at = [point["iteration"] for point in points]
    assert at == sorted(set(at)) and 99 not in at and max(at) == 39
    assert "7." not in json.dumps(points), "the line of before the resume"


def test_distance_from_a_reference_is_in_sampling_errors(tmp_path: Path) -> None:
    few, many = "CBN(positions=64)", "CBN(positions=512)"
    reference = "CBN(positions=None)"
    assert measure(tmp_path, "--reference", reference, "--norms", few, many) == 0
    rows = rows_of(tmp_path)
    names = [f"apart: {name}" for name in ("median", "below 1 %", "worst", "error added")]
    # var 0.1 with a common part of 0.06: the mini-batches' own part is 0.08; and BN's error is 0.1,
    # the reference's 0.2, theirs 0.3 and 0.4
    for half in ("first", "second"):
        found = numbers(rows["4", half, few], *names)
        assert found == pytest.approx([0.8, 50, 1.6, 50])
        assert numbers(rows["4", half, many], *names) == pytest.approx([1.2, 50, 2.4, 100])
        assert rows["4", half, reference]["apart: median"] == ""


def test_finished_runs_are_kept_and_failed_ones_tried_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FAKE_FAILS", "4")
    assert measure(tmp_path) == 1
    assert "it broke" in capsys.readouterr().out
    assert {images for images, *_ in rows_of(tmp_path)} == {"1"}
    monkeypatch.delenv("FAKE_FAILS")
    assert measure(tmp_path) == 0
    assert sorted(attempts(tmp_path)) == [1, 2]
    measure(tmp_path, "--truth-images", "50")
    assert sorted(attempts(tmp_path)) == [1, 1, 1, 2]


def test_a_run_that_diverged_is_in_no_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_DIVERGES", "4")
    assert measure(tmp_path) == 0
    assert {images for images, *_ in rows_of(tmp_path)} == {"1"}


def test_halves_are_of_the_planned_training() -> None:
    points = [{"iteration": at} for at in (3, 19, 20, 39)]
    for point, mean in zip(points, (1.0, 3.0, 5.0, 9.0), strict=True):
        point["layers"] = {"a": {"norms": {"BN": {"mean": mean}}}}
    rows = table({2: points}, 40, None)
    assert [(row["half"], row["mean"]) for row in rows] == [("first", 2.0), ("second", 7.0)]
    assert rows[0]["var"] is None, "nothing was measured"


def test_a_line_of_the_figure_is_the_ratio_to_bn() -> None:
    norms = {"BN": {"mean": 0.5, "var": 0.5}, "KN": {"mean": 1.0, "var": 0.25}}
    points = [{"iteration": at, "layers": {"a": {"norms": norms}}} for at in (3, 9)]
    figure = draw({2: points}, ["BN", "KN"])
    for axes, ratio in zip(figure.axes, (2.0, 0.5), strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert lines == {"BN": [1.0, 1.0], "KN": [ratio, ratio]}


def test_what_a_run_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(tmp_path, "--images", "2", "--trained-with", "GN", "--dry-run") == 0
    words = shlex.split(capsys.readouterr().out)
    request = json.loads(words[words.index("--statistics-error") + 1])
    wanted = {"norms": ["BN", "KN", "MBN(window=4)"], "at": [3, 11, 19, 30, 39], "images": 200}
    assert request == wanted
    options = dict(zip(words[-2::-2], words[:0:-2], strict=False))
    assert options["SOLVER.MAX_ITER"] == "40" and options["DATASETS.TEST"] == "()"
    assert options["MODEL.FPN.NORM"] == "GN" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("iters", "moments"), [("2", [1]), ("10", [2, 4, 7, 9])])
def test_moments_of_short_trainings(iters: str, moments: list[int], tmp_path: Path) -> None:
    plan = plan_of(make_parser().parse_args(["--iters", iters, "--output", str(tmp_path)]))
    words = plan.runs()[0].command
    assert json.loads(words[words.index("--statistics-error") + 1])["at"] == moments


@pytest.mark.detectron2
@pytest.mark.parametrize("images", [1, 2])
def test_a_config_that_scales_its_schedule_is_as_long_as_announced(images: int, tmp_path) -> None:
    from cbn_det.plugin.config import build_config
    from cbn_det.run.arguments import argument_parser

    config = REPOSITORY / "configs" / "coco" / "mask_rcnn_R_50_FPN_1x" / "bn_2img.yaml"
    words = ["--config-file", str(config), "--images", str(images), "--output", str(tmp_path)]
    plan = plan_of(make_parser().parse_args(words))
    command = list(plan.runs()[0].command)[2:]
    at = command.index("--statistics-error")
    request = json.loads(command[at + 1])
    args = argument_parser().parse_args([*command[:at], *command[at + 2 :]])
    args.command = ""
    cfg, _ = build_config(args, world_size=1)
    assert cfg.SOLVER.MAX_ITER == plan.iterations == 90_000
    assert max(request["at"]) == 89_999


def test_settings_that_cannot_be_followed_are_a_line(tmp_path, capsys) -> None:
    assert measure(tmp_path, "--opts", "SOLVER.MAX_ITER", "9") == 2
    assert "statistics_error: SOLVER.MAX_ITER is set by --iters" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure(tmp_path, "--truth-images", "0")
    assert "argument --truth-images: expected 1 or more" in capsys.readouterr().err


def test_the_tool_parses_its_own_examples() -> None:
    text = statistics_error.__doc__.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python ")]
    assert len(lines) == 5
    for line in lines:
        make_parser().parse_args(shlex.split(line)[2:])
