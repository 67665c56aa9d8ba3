"""tools/demo.py, and how the tools end where files cannot be written."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest

from cbn_det.data import DataError
from cbn_det.study import runner
from cbn_det.study.compare import compare, guarded
from cbn_det.study.plan import Plan, Split
from cbn_det.study.processes import full_disk_note

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_launcher.py")))


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """main() of the demo with the fake launcher and no data to write; takes its arguments."""
    from cbn_det.commands import demo as tool

    class QuickPlan(Plan):
        def __init__(self, *args, **settings) -> None:
            super().__init__(*args, launcher=LAUNCHER, **settings)

    monkeypatch.setattr(tool, "Plan", QuickPlan)
    monkeypatch.setattr(tool, "write_digits", lambda: Path("datasets/digits"))

    def start(*arguments: str, **replaced) -> int:
        for name, value in replaced.items():
            monkeypatch.setattr(tool, name, value)
        output = str(tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["tools/demo.py", *arguments, "--output", output])
        return tool.main()

    start.period = tool.evaluation_period
    return start


@pytest.mark.parametrize("engine", ["detectron2", "standalone"])
def test_the_demo_shows_its_steps_and_ends_with_table_and_report(
    demo, engine, capsys, tmp_path
) -> None:
    assert demo("--iters", "40", "--engine", engine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits, 1000 training and 150 validation images: ")
    assert lines[1].startswith(f"training GN, BN, CBN with the {engine} engine: 3 runs")
    first = next(i for i, line in enumerate(lines) if line.startswith("Total SGD batch"))
    tables = lines[first:]
    rows = [line.split()[0] for line in tables if line.startswith(("GN", "BN", "CBN"))]
    assert rows == 2 * ["GN", "BN", "CBN"], "AP, then what it costs"
    report = tmp_path / "out" / "report.html"
    assert lines[-1].endswith(str(report)) and report.exists()
    assert (tmp_path / "out" / "ap_curves.png").exists(), "evaluated on the way"
    assert f"--engine {engine}" in report.read_text()


def test_the_demo_goes_on_where_it_stopped(demo, capsys) -> None:
    assert demo("--iters", "40", "--engine", "standalone") == 0
    assert demo("--iters", "40", "--engine", "standalone") == 0
    printed = capsys.readouterr().out
    assert printed.count("kept from before") == 3
    assert printed.count("Wall time: ") == 2 and "all 3 runs were finished before" in printed
    assert printed.count("To be expected of this recipe") == 2


@pytest.mark.parametrize(
    ("iterations", "period"), [(600, 150), (40, 10), (30, 10), (601, 601), (1, 1), (14, 7)]
)
def test_evaluations_divide_the_training(demo, iterations, period) -> None:
    assert demo.period(iterations) == period


def test_the_demo_says_in_a_line_that_there_is_no_room_for_the_data(demo, capsys) -> None:
    def full() -> None:
        cause = OSError(errno.ENOSPC, "No space left on device")
        raise DataError("cannot write the digits set: set DETECTRON2_DATASETS") from cause

    assert demo(write_digits=full) == 1
    assert capsys.readouterr().err == (
        "demo: cannot write the digits set: set DETECTRON2_DATASETS\n"
    )


def test_ctrl_c_while_the_data_is_written(demo, capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert demo(write_digits=interrupted) == 130
    assert "The same command goes on from here" in capsys.readouterr().out


# --- files that cannot be written ------------------------------------------------------------


def raising(error: Exception):
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/a.png"), 1, "disk is full (out/a.png): free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "the disk is full: free"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "another folder with --out"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 1, "another folder with --output"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "Input/output error"),
        (FileNotFoundError(errno.ENOENT, "No such file", "my.yaml"), 2, "no file my.yaml"),
        (ValueError("no such split"), 2, "no such split"),
        (RuntimeError("another comparison"), 2, "another comparison"),
        (ImportError("the standalone engine does not work here"), 2, "does not work here"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(error, code, said, capsys) -> None:
    assert guarded("tool", raising(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("tool: ") and said in printed
    assert printed.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        guarded("tool", raising(KeyError("x")))


@pytest.mark.parametrize("place", ["out", "out/runs", "out/report.html"])
def test_an_output_that_is_in_the_way_is_one_line(tmp_path, place, capsys) -> None:
    blocked = tmp_path / place
    blocked.parent.mkdir(parents=True, exist_ok=True)
    if place.endswith("html"):
        blocked.mkdir()
    else:
        blocked.write_text("a file where a folder should be")
    plan = make_plan(tmp_path, ["GN"])
    assert guarded("compare_norms", lambda: compare(plan, jobs=1)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("compare_norms: ") and printed.count("\n") == 1


def test_a_run_that_found_the_disk_full_says_so_in_its_row(tmp_path, capsys) -> None:
    assert compare(make_plan(tmp_path, ["FULL", "CRASH"]), jobs=1) == 1
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert rows[0]["reasons"][0].startswith("failed: the disk is full (")
    assert rows[0]["reasons"][0].endswith("No space left on device")
    assert "disk" not in rows[1]["reasons"][0]


def test_little_room_left_explains_a_failure_without_words(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    assert full_disk_note("no output", tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    note = full_disk_note("no output", tmp_path)
    assert note == "the disk is full (3 MB free now): free some space, then run again"


def test_torch_has_words_of_its_own_for_a_full_disk(tmp_path) -> None:
    text = "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    assert full_disk_note(text, tmp_path)


def test_no_room_for_a_run_folder_ends_the_other_runs(tmp_path, monkeypatch) -> None:
    ended = []

    class SecondFails(runner.Process):
        def __init__(self, run, jobs, gpus) -> None:
            if run.norm == "GN":
                raise OSError(errno.ENOSPC, "No space left on device")
            super().__init__(run, jobs, gpus)

    def end_all(processes) -> None:
        ended.extend(processes)
        real(processes)

    real = runner._end_all
    monkeypatch.setattr(runner, "Process", SecondFails)
    monkeypatch.setattr(runner, "_end_all", end_all)
    plan = make_plan(tmp_path, ["HANG", "GN"])
    assert guarded("compare_norms", lambda: compare(plan, jobs=2)) == 1
    assert len(ended) == 1 and ended[0].ended()


def make_plan(tmp_path: Path, norms: list[str]) -> Plan:
    return Plan(tmp_path / "out", norms, [Split(1, 2)], [1], engine="standalone", launcher=LAUNCHER)
