"""The comparison tool, with a fake launcher that leaves the files a real one leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cbn_det import progress
from cbn_det.commands import compare as compare_norms
from cbn_det.study import processes, results
from cbn_det.study.backbone import extract_backbone
from cbn_det.study.compare import compare
from cbn_det.study.plan import Plan, Split
from cbn_det.study.recipes import RECIPES, schedule
from cbn_det.study.runner import Places

REPOSITORY = Path(__file__).resolve().parents[1]

LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_launcher.py")))


def make_plan(tmp_path: Path, norms: list[str], **changes) -> Plan:
    settings = {"splits": [Split(1, 2)], "seeds": [1], "engine": "detectron2"} | changes
    return Plan(tmp_path / "out", norms, launcher=LAUNCHER, **settings)


def attempts(plan: Plan) -> dict[str, list[str]]:
    folders = (plan.output / "runs").iterdir()
    return {f.name.split("_")[0]: (f / "attempts").read_text().split() for f in folders}


# --- running ---------------------------------------------------------------------------------


def test_compares_and_reports_whoever_wins(tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["BN", "GN", "CBN(window=4)"], seeds=[1, 3], iterations=40)
    assert compare(plan, jobs=3) == 0
    printed = capsys.readouterr().out
    rows = [
        line.split()
        for line in printed[printed.index("Total SGD batch 2 (world size 1") :].splitlines()
        if line.startswith(("BN ", "GN ", "CBN("))
    ]
    # norm, AP ± spread, AP50 ± spread, AP with PreciseBN, to GN
    assert rows[0] == "BN 22.0 ± 1.4 32.0 ± 1.4 23.0 ± 1.4 -20.0 2 finished".split()
    assert rows[1] == "GN 42.0 ± 1.4 52.0 ± 1.4 - - 2 finished".split()
    assert rows[2][0] == "CBN(window=4)"
    assert "2 finished" in printed
    summary = json.loads((plan.output / "summary.json").read_text())
    assert summary["rows"][1]["ap"]["bbox"]["AP"]["mean"] == 42.0
    assert len(summary["runs"]) == 6
    assert summary["engine"] == "detectron2"
    assert "| GN" in (plan.output / "table.md").read_text()
    assert "detectron2 engine" in (plan.output / "table.md").read_text().splitlines()[0]
    assert printed.endswith(f"curves and pictures: {plan.output / 'report.html'}\n")
    assert (plan.output / "report.html").exists()
    for name in ("loss.png", "ap.png"):
        assert (plan.output / name).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_kept_and_changed_ones_run_anew(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"])
    compare(plan, jobs=1)
    compare(plan, jobs=1)
    assert attempts(plan) == {"GN": ["start"]}
    plan.overrides = ["SOLVER.BASE_LR", "0.5"]
    compare(plan, jobs=1)
    assert len(list((plan.output / "runs").iterdir())) == 2


def test_a_run_is_known_by_its_config_too_but_not_by_its_place(tmp_path) -> None:
    base, leaf = tmp_path / "base.yaml", tmp_path / "leaf.yaml"
    base.write_text("SOLVER:\n  MAX_ITER: 10\n")
    leaf.write_text("_BASE_: base.yaml  # same folder\n")
    plan = make_plan(tmp_path, ["GN"], config=leaf)
    before = plan.runs()[0].folder.name
    plan.output = tmp_path / "elsewhere"
    assert plan.runs()[0].folder.name == before
    base.write_text("SOLVER:\n  MAX_ITER: 20\n")
    assert plan.runs()[0].folder.name != before


def test_a_column_for_test_images_in_their_statistics(tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["BN", "GN"])
    assert compare(plan, jobs=2) == 0
    assert "image share" not in (tmp_path / "out" / "table.md").read_text()
    shared = dataclasses.replace(plan, flags=["--image-share", "auto"])
    assert compare(shared, jobs=2) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "AP, image share" in line)
    head, _, *table = ([cell.strip() for cell in line.split("|")] for line in lines[first:][:4])
    cells = {row[1]: row[head.index("AP, image share")] for row in table}
    assert cells["BN"] == "24.0" and cells["GN"] == "-"
    assert any(line.startswith("image share: ") for line in lines)


def test_a_crash_and_a_divergence_are_rows_and_not_the_end(tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["CRASH", "KILLED", "DIVERGE", "GN"])
    assert compare(plan, jobs=1) == 1
    printed = capsys.readouterr().out
    assert "0 of 1 finished; failed: crashed (exit code 1): RuntimeError: it broke" in printed
    assert "failed: killed by SIGKILL" in printed
    assert "0 of 1 finished; diverged: loss is nan at fpn_output2" in printed
    assert "GN 1x2 seed 1: finished AP 41.0" in printed
    compare(plan, jobs=1)  # a divergence is a result, a crash is tried again
    counts = {name: len(starts) for name, starts in attempts(plan).items()}
    assert counts == {"CRASH": 2, "KILLED": 2, "DIVERGE": 1, "GN": 1}


def test_a_divergence_alone_is_no_failure(tmp_path) -> None:
    assert compare(make_plan(tmp_path, ["DIVERGE", "GN"]), jobs=2) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_and_says_how_to_go_on(tmp_path, number) -> None:
    plan = make_plan(tmp_path, ["HANG", "GN"])
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from cbn_det.study.plan import Plan, Split\n"
        "from cbn_det.study.compare import compare, guarded\n"
        f"plan = Plan(Path({str(plan.output)!r}), ['HANG', 'GN'], [Split(1, 2)], [1],"
        f" 'detectron2', launcher={LAUNCHER!r})\n"
        "sys.exit(guarded('test', lambda: compare(plan, jobs=2)))\n"
    )
    tool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    folder = plan.runs()[0].folder
    wait_for(lambda: (folder / "last_checkpoint").exists(), 60)
    wait_for(lambda: (plan.runs()[1].folder / "result.json").exists(), 60)
    tool.send_signal(number)
    printed, _ = tool.communicate(timeout=30)
    assert tool.returncode == 130
    assert "The same command goes on from here" in printed
    for pid in (folder / "pids").read_text().split():
        wait_for(lambda pid=pid: not is_running(int(pid)), 10)
    assert compare(plan, jobs=2) == 0
    assert attempts(plan) == {"HANG": ["start", "resume"], "GN": ["start"]}


def start_tool(plan: Plan, norms: list[str]) -> subprocess.Popen:
    """A comparison in a process of its own, at one run at a time."""
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from cbn_det.study.plan import Plan, Split\n"
        "from cbn_det.study.compare import compare, guarded\n"
        f"plan = Plan(Path({str(plan.output)!r}), {norms!r}, [Split(1, 2)], [1],"
        f" 'detectron2', launcher={LAUNCHER!r})\n"
        "sys.exit(guarded('test', lambda: compare(plan, jobs=1)))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_run_ends_with_a_comparison_that_is_killed_and_is_resumed(tmp_path) -> None:
    """Nobody asks it to stop: it is told by the end of a pipe. It may save before it ends."""
    plan = make_plan(tmp_path, ["SLOW", "GN"])
    folder = plan.runs()[0].folder
    first = start_tool(plan, plan.norms)
    wait_for(lambda: (folder / "pid").exists(), 60)
    first.kill()
    first.communicate()
    wait_for(lambda: not is_running(int((folder / "pid").read_text())), 30)
    assert (folder / "last_checkpoint").exists(), "it was asked, not killed"
    (folder / "go").touch()
    assert compare(plan, jobs=1) == 0
    assert attempts(plan) == {"SLOW": ["start", "resume"], "GN": ["start"]}


def test_nothing_starts_while_a_run_of_a_killed_comparison_is_there(tmp_path) -> None:
    """What the run has started ends too."""
    plan = make_plan(tmp_path, ["HANG"])
    folder = plan.runs()[0].folder
    tool = start_tool(plan, plan.norms)
    wait_for(lambda: (folder / "last_checkpoint").exists(), 60)
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    watcher = os.getpgid(pids[0])
    os.kill(watcher, signal.SIGSTOP)
    wait_for(lambda: state_of(watcher) == "T", 10)
    tool.kill()
    tool.communicate()
    with pytest.raises(RuntimeError, match="another comparison is running.*try again"):
        compare(plan, jobs=1)
    assert all(map(is_running, pids))
    os.kill(watcher, signal.SIGCONT)
    wait_for(lambda: not any(map(is_running, [watcher, *pids])), 30)
    assert compare(plan, jobs=1) == 0
    assert attempts(plan) == {"HANG": ["start", "resume"]}


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("kill $$", -15)])
def test_a_child_ends_as_its_command_does(command, code) -> None:
    words = [*processes.CHILD, "sh", "-c", command]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, cwd=REPOSITORY)
    assert child.wait(60) == code


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return state_of(pid) != "Z"  # a dead process that nobody has collected yet is not running


def state_of(pid: int) -> str:
    """As Linux has it: "T" is stopped, "Z" dead; empty elsewhere."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rsplit(")", 1)[1].split()[0] if stat.exists() else ""


def test_one_comparison_per_folder(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"])
    with processes.locked(plan.output), pytest.raises(RuntimeError, match="another comparison"):
        compare(plan, jobs=1)


def test_ranks_take_places() -> None:
    narrow = Places(2)
    assert narrow.take(4) == [""] * 4, "a run wider than the machine must run alone"
    assert narrow.take(1) is None
    five = Places(5)
    four = five.take(4)
    assert len(four) == 4 and five.take(2) is None and len(five.take(1)) == 1
    five.give_back(four)
    assert five.take(5) is None and len(five.take(4)) == 4


def test_the_reference_is_bn_with_the_same_total_batch_on_one_rank(tmp_path) -> None:
    splits = [Split(8, 1), Split(4, 2), Split(2, 2)]
    plan = make_plan(tmp_path, ["CBN"], splits=splits, reference=True)
    labels = [run.label.removesuffix(" seed 1") for run in plan.runs()]
    assert labels == ["CBN 8x1", "CBN 4x2", "CBN 2x2", "BN 1x8", "BN 1x4"]
    at_one = make_plan(tmp_path, ["BN", "GN"], splits=[Split(1, 8), Split(8, 1)], reference=True)
    labels = [run.label.removesuffix(" seed 1") for run in at_one.runs()]
    assert labels == ["BN 1x8", "GN 1x8", "BN 8x1", "GN 8x1"]


def test_dry_run_starts_nothing(tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["CBN(window=4)"], splits=[Split(4, 2)], recipe="finetune")
    plan.print_commands()
    pretrain, run = map(shlex.split, capsys.readouterr().out.splitlines())
    assert "--config-file" in pretrain and "pretrain_R_18_FPN_digits_bn8.yaml" in " ".join(pretrain)
    words = run[run.index("MODEL.FPN.NORM") :]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["MODEL.FPN.NORM"] == options["MODEL.ROI_BOX_HEAD.NORM"] == "CBN(window=4)"
    assert options["SOLVER.IMS_PER_BATCH"] == "8" and run[run.index("--num-gpus") + 1] == "4"
    assert "MODEL.RESNETS.NORM" not in options
    assert not plan.output.exists()


@pytest.mark.parametrize(
    ("engine", "kept"),
    [("detectron2", "backbone.bottom_up.stem.w"), ("standalone", "backbone.body.stem.w")],
)
def test_the_finetune_recipe_trains_its_backbone_once(tmp_path, engine, kept) -> None:
    plan = make_plan(tmp_path, ["GN", "BN"], seeds=[1, 2], recipe="finetune", engine=engine)
    assert compare(plan, jobs=2) == 0
    plan.norms = ["GN", "BN", "CBN"]
    assert compare(plan, jobs=2) == 0
    assert attempts(plan)[plan.pretrain_run().folder.name] == ["start"]
    backbone = plan.pretrain_run().folder / "backbone.pth"
    assert list(torch.load(backbone)["model"]) == [kept]
    result = json.loads((plan.runs()[0].folder / "result.json").read_text())
    assert result["weights"] == str(backbone)


def test_a_checkpoint_without_a_backbone_is_refused(tmp_path) -> None:
    torch.save({"model": {"roi_heads.w": torch.ones(1)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no weights below backbone.bottom_up."):
        extract_backbone(tmp_path / "model.pth", tmp_path / "backbone.pth")


def test_threads_are_shared_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    plan = make_plan(tmp_path, ["GN"])
    compare(plan, jobs=2)
    assert json.loads((plan.runs()[0].folder / "result.json").read_text())["threads"] == "4"


# --- engines ---------------------------------------------------------------------------------


def test_a_run_names_its_engine_and_is_not_the_same_run_on_another(tmp_path) -> None:
    one = make_plan(tmp_path, ["GN"])
    other = make_plan(tmp_path, ["GN"], engine="standalone")
    command = other.runs()[0].command
    assert command[command.index("--engine") + 1] == "standalone"
    assert one.runs()[0].folder != other.runs()[0].folder
    assert compare(one, jobs=1) == compare(other, jobs=1) == 0
    folders = [plan.runs()[0].folder for plan in (one, other)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [result["engine"] for result in results] == ["detectron2", "standalone"]


def test_the_standalone_engine_takes_one_process_only(tmp_path) -> None:
    with pytest.raises(ValueError, match="split 4x2: the standalone engine runs one process only"):
        make_plan(tmp_path, ["GN"], engine="standalone", splits=[Split(1, 8), Split(4, 2)])
    make_plan(tmp_path, ["GN"], engine="standalone", splits=[Split(1, 8)])


@pytest.mark.parametrize(
    ("engine", "own", "others"),
    [("detectron2", False, False), ("standalone", True, False), ("detectron2", True, True)],
)
def test_norm_keys_that_the_config_cannot_have_are_left_out(tmp_path, engine, own, others) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("SOLVER:\n  MAX_ITER: 10\n")
    plan = make_plan(tmp_path, ["GN"], engine=engine, config=config if own else None)
    command = plan.runs()[0].command
    assert "MODEL.RESNETS.NORM" in command and "MODEL.ROI_MASK_HEAD.NORM" in command
    assert ("MODEL.RETINANET.NORM" in command) == ("MODEL.SEM_SEG_HEAD.NORM" in command) == others


# --- the plan --------------------------------------------------------------------------------


def test_every_recipe_file_exists_and_its_schedule_scales() -> None:
    for recipe in RECIPES.values():
        assert recipe.config.exists()
        assert recipe.pretrain is None or recipe.pretrain.exists()
        options = schedule(recipe.config, 240)
        assert dict(zip(options[::2], options[1::2], strict=True)) == {
            "SOLVER.MAX_ITER": "240",
            "SOLVER.STEPS": "(192,)",
            "SOLVER.WARMUP_ITERS": "20",
        }


@pytest.mark.parametrize(
    "iterations, steps", [(100, "(67, 89,)"), (5, "(3, 4,)"), (3, "(2,)"), (2, "(1,)"), (1, "()")]
)
def test_steps_of_a_short_schedule_stay_within_it(iterations, steps, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("SOLVER:\n  MAX_ITER: 90000\n  STEPS: (60000, 80000)\n")
    options = schedule(config, iterations)
    assert options[options.index("SOLVER.STEPS") + 1] == steps


def test_a_config_without_a_schedule_cannot_be_scaled(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("SOLVER:\n  BASE_LR: 0.1\n")
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER"):
        schedule(config, 10)


@pytest.mark.parametrize("text", ["4", "4x", "0x2", "x2", "4*2", "-1x2"])
def test_bad_splits_are_refused(text) -> None:
    with pytest.raises(ValueError, match="RANKSxIMAGES"):
        Split.parse(text)


def test_the_tool_parses_its_own_examples(capsys, monkeypatch) -> None:
    text = compare_norms.__doc__.replace("\\\n", " ")
    examples = [line for line in text.splitlines() if line.strip().startswith("cbn-det compare ")]
    assert len(examples) >= 4
    for example in examples:
        args = compare_norms.make_parser().parse_args(shlex.split(example)[2:])
        assert args.norms and len(args.opts) % 2 == 0


# --- progress ----------------------------------------------------------------------------------


def test_progress_reads_iteration_loss_and_time_left(tmp_path) -> None:
    assert results.state_of(tmp_path) == (0, None, "starting")
    (tmp_path / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 100\n")
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 39, "total_loss": 1.234, "time": 2.0}\n')
    assert results.state_of(tmp_path) == (40, 100, "loss 1.23, 02:00 left")
    metrics.write_text('{"iteration": 99, "total_loss": 1.2, "time": 2.0}\n')
    assert results.state_of(tmp_path) == (100, 100, "loss 1.20, evaluating")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal(monkeypatch, capsys) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = progress.Bars()
    bars.show({"GN seed 1": (40, 100, "loss 1.20"), "BN seed 1": (0, None, "starting")})
    progress.say("a line above")
    bars.show({"GN seed 1": (60, 100, "loss 1.10")})
    bars.show({})
    assert capsys.readouterr().out == "a line above\n"
    drawn = re.split("[\r\n]+", terminal.getvalue().replace("\x1b[A", ""))  # cursor up
    expected = [r"GN seed 1 \|.*\| 40/100, loss 1.20", r"GN seed 1 \|.*\| 60/100, loss 1.10"]
    for one in [*expected, r"BN seed 1 \|.*\| 0/\?, starting"]:
        assert any(re.fullmatch(f"{one} *", bar) for bar in drawn), one
    assert not drawn[-1].strip(), "they are gone at the end"


def test_without_a_terminal_a_line_is_said_once(monkeypatch, capsys) -> None:
    bars = progress.Bars()
    for done in (0, 0, 20):
        bars.show({"GN": (done, 40, "starting"), "BN": (0, None, "starting")})
    assert capsys.readouterr().out.splitlines() == [
        "GN: 0/40 starting",
        "BN: 0/? starting",
        "GN: 20/40 starting",
    ]


def test_plain_progress_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    compare(make_plan(tmp_path, ["GN"]), jobs=1)
    assert "GN 1x2 seed 1: 0/" in capsys.readouterr().out
