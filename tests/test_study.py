"""The comparison tool, with a fake launcher that leaves the files a real one leaves."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cbn_det.study import progress, runner
from cbn_det.study.backbone import extract_backbone
from cbn_det.study.compare import compare
from cbn_det.study.plan import RECIPES, Plan, Run, Split, schedule
from cbn_det.study.report import by_total_batch, text_report
from cbn_det.study.results import Row, Spread, make_rows, read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]

# The norm's name decides what happens; the file "attempts" counts starts.
FAKE = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--config-file"); parser.add_argument("--num-gpus", type=int)
parser.add_argument("--precise-bn-iters", type=int, default=0)
parser.add_argument("--resume", action="store_true")
parser.add_argument("options", nargs="*")
args = parser.parse_args()
cfg = dict(zip(args.options[::2], args.options[1::2]))
out = Path(cfg["OUTPUT_DIR"]); out.mkdir(parents=True, exist_ok=True)
norm, seed = cfg.get("MODEL.FPN.NORM", "pretrain"), int(cfg.get("SEED", 0))
with open(out / "attempts", "a") as f: f.write("resume\\n" if args.resume else "start\\n")
(out / "config.yaml").write_text("SOLVER:\\n  MAX_ITER: 40\\n")
with open(out / "metrics.json", "a") as f:
    for i in (19, 39):
        f.write(json.dumps({"iteration": i, "total_loss": 2.0 - i / 40, "time": 0.1}) + "\\n")
if norm == "CRASH": sys.exit("Traceback ...\\nRuntimeError: it broke")
if norm == "KILLED": os.kill(os.getpid(), 9)
if norm == "HANG":
    child = os.fork()
    if child == 0: time.sleep(60)
    (out / "pids").write_text(f"{os.getpid()} {child}")
    (out / "last_checkpoint").write_text("model_0000019.pth")
    if not args.resume: time.sleep(60)
if norm == "DIVERGE":
    result = {"status": "diverged", "message": "loss is nan at fpn_output2"}
    (out / "result.json").write_text(json.dumps(result))
    sys.exit(3)
if norm == "pretrain":
    import torch
    weights = {"backbone.bottom_up.stem.w": torch.ones(1), "roi_heads.w": torch.ones(1)}
    torch.save({"model": weights}, out / "model_final.pth")
ap = {"GN": 40.0, "BN": 20.0}.get(norm, 30.0) + seed
boxes = {"AP": ap, "AP50": ap + 10}
result = {"status": "finished", "message": None, "results": {"bbox": boxes}, "iterations": 40,
          "results_precise_bn": None if norm == "GN" else {"bbox": {"AP": ap + 1}},
          "sec_per_iter": 0.1, "peak_memory_mb": 500.0, "weights": cfg.get("MODEL.WEIGHTS"),
          "threads": os.environ["OMP_NUM_THREADS"]}
(out / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def launcher(tmp_path) -> tuple[str, ...]:
    path = tmp_path / "fake_launcher.py"
    path.write_text(FAKE)
    return (sys.executable, str(path))


def make_plan(tmp_path, launcher, norms, **changes) -> Plan:
    settings = {"splits": [Split(1, 2)], "seeds": [1]} | changes
    return Plan(tmp_path / "out", norms, launcher=launcher, **settings)


def attempts(plan: Plan) -> dict[str, list[str]]:
    folders = (plan.output / "runs").iterdir()
    return {f.name.split("_")[0]: (f / "attempts").read_text().split() for f in folders}


# --- running ---------------------------------------------------------------------------------


def test_compares_and_reports_whoever_wins(tmp_path, launcher, capsys) -> None:
    plan = make_plan(tmp_path, launcher, ["BN", "GN", "CBN(window=4)"], seeds=[1, 3], iterations=40)
    assert compare(plan, jobs=3) == 0
    printed = capsys.readouterr().out
    rows = [
        line.split()
        for line in printed[printed.index("Total SGD batch 2, 40 iterations") :].splitlines()
        if line.startswith(("BN ", "GN ", "CBN("))
    ]
    # norm, images/GPU, world size, total batch, AP ± spread, AP50 ± spread, AP with PreciseBN
    assert rows[0][:7] == ["BN", "2", "1", "2", "22.0", "±", "1.4"]
    assert rows[0][10:13] == ["23.0", "±", "1.4"]
    assert rows[1][:7] == ["GN", "2", "1", "2", "42.0", "±", "1.4"]
    assert rows[1][10] == "-"
    assert rows[2][0] == "CBN(window=4)"
    assert "2 finished" in printed
    summary = json.loads((plan.output / "summary.json").read_text())
    assert summary["rows"][1]["ap"]["bbox"]["mean"] == 42.0
    assert len(summary["runs"]) == 6
    assert "| GN" in (plan.output / "table.md").read_text()
    for name in ("loss.png", "ap.png"):
        assert (plan.output / name).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_kept_and_changed_ones_run_anew(tmp_path, launcher) -> None:
    plan = make_plan(tmp_path, launcher, ["GN"])
    compare(plan, jobs=1)
    compare(plan, jobs=1)
    assert attempts(plan) == {"GN": ["start"]}
    plan.overrides = ["SOLVER.BASE_LR", "0.5"]
    compare(plan, jobs=1)
    assert len(list((plan.output / "runs").iterdir())) == 2


def test_a_run_is_known_by_its_config_too_but_not_by_its_place(tmp_path, launcher) -> None:
    base, leaf = tmp_path / "base.yaml", tmp_path / "leaf.yaml"
    base.write_text("SOLVER:\n  MAX_ITER: 10\n")
    leaf.write_text("_BASE_: base.yaml  # same folder\n")
    plan = make_plan(tmp_path, launcher, ["GN"], config=leaf)
    before = plan.runs()[0].signature
    plan.output = tmp_path / "elsewhere"
    assert plan.runs()[0].signature == before
    base.write_text("SOLVER:\n  MAX_ITER: 20\n")
    assert plan.runs()[0].signature != before


def test_a_crash_and_a_divergence_are_rows_and_not_the_end(tmp_path, launcher, capsys) -> None:
    plan = make_plan(tmp_path, launcher, ["CRASH", "KILLED", "DIVERGE", "GN"])
    assert compare(plan, jobs=1) == 1
    printed = capsys.readouterr().out
    assert "0 of 1 finished; failed: crashed (exit code 1): RuntimeError: it broke" in printed
    assert "failed: killed by SIGKILL" in printed
    assert "0 of 1 finished; diverged: loss is nan at fpn_output2" in printed
    assert "GN 1x2 seed 1: finished AP 41.0" in printed
    compare(plan, jobs=1)  # a divergence is a result, a crash is tried again
    counts = {name: len(starts) for name, starts in attempts(plan).items()}
    assert counts == {"CRASH": 2, "KILLED": 2, "DIVERGE": 1, "GN": 1}


def test_a_divergence_alone_is_no_failure(tmp_path, launcher) -> None:
    assert compare(make_plan(tmp_path, launcher, ["DIVERGE", "GN"]), jobs=2) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_and_says_how_to_go_on(tmp_path, launcher, number) -> None:
    plan = make_plan(tmp_path, launcher, ["HANG", "GN"])
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from cbn_det.study.plan import Plan, Split\n"
        "from cbn_det.study.compare import compare\n"
        f"plan = Plan(Path({str(plan.output)!r}), ['HANG', 'GN'], [Split(1, 2)], [1],"
        f" launcher={launcher!r})\n"
        "sys.exit(compare(plan, jobs=2))\n"
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
    stat = Path(f"/proc/{pid}/stat")  # a dead process that nobody has collected yet is not running
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_one_comparison_per_folder(tmp_path, launcher) -> None:
    plan = make_plan(tmp_path, launcher, ["GN"])
    with runner.locked(plan.output), pytest.raises(RuntimeError, match="another comparison"):
        compare(plan, jobs=1)


def test_ranks_take_places(tmp_path, launcher) -> None:
    plan = make_plan(tmp_path, launcher, ["GN"], splits=[Split(1, 8), Split(4, 2)])
    one, four = plan.runs()
    assert runner._fits(four, {}, jobs=2), "a run wider than the machine must run alone"
    assert not runner._fits(one, {four.label: (four, None)}, jobs=4)
    assert runner._fits(one, {four.label: (four, None)}, jobs=5)


def test_dry_run_starts_nothing(tmp_path, launcher, capsys) -> None:
    plan = make_plan(tmp_path, launcher, ["CBN(window=4)"], splits=[Split(4, 2)], recipe="finetune")
    assert compare(plan, jobs=1, dry_run=True) == 0
    pretrain, run = map(shlex.split, capsys.readouterr().out.splitlines())
    assert "--config-file" in pretrain and "pretrain_R_18_FPN_digits_bn8.yaml" in " ".join(pretrain)
    words = run[run.index("MODEL.FPN.NORM") :]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["MODEL.FPN.NORM"] == options["MODEL.ROI_BOX_HEAD.NORM"] == "CBN(window=4)"
    assert options["SOLVER.IMS_PER_BATCH"] == "8" and run[run.index("--num-gpus") + 1] == "4"
    assert "MODEL.RESNETS.NORM" not in options
    assert not plan.output.exists()


def test_the_finetune_recipe_trains_its_backbone_once(tmp_path, launcher) -> None:
    plan = make_plan(tmp_path, launcher, ["GN", "BN"], seeds=[1, 2], recipe="finetune")
    assert compare(plan, jobs=2) == 0
    plan.norms = ["GN", "BN", "CBN"]
    assert compare(plan, jobs=2) == 0
    assert attempts(plan)["pretrain-" + plan.pretrain_run().signature] == ["start"]
    backbone = plan.pretrain_run().folder / "backbone.pth"
    assert list(torch.load(backbone)["model"]) == ["backbone.bottom_up.stem.w"]
    result = json.loads((plan.runs()[0].folder / "result.json").read_text())
    assert result["weights"] == str(backbone)


def test_a_checkpoint_without_a_backbone_is_refused(tmp_path) -> None:
    torch.save({"model": {"roi_heads.w": torch.ones(1)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no weights below 'backbone.bottom_up.'"):
        extract_backbone(tmp_path / "model.pth", tmp_path / "backbone.pth")


def test_threads_are_shared_out(tmp_path, launcher, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    plan = make_plan(tmp_path, launcher, ["GN"])
    compare(plan, jobs=2)
    assert json.loads((plan.runs()[0].folder / "result.json").read_text())["threads"] == "4"


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
    tool = runpy.run_path(str(REPOSITORY / "tools" / "compare_norms.py"))
    text = tool["__doc__"].replace("\\\n", " ")
    examples = [line for line in text.splitlines() if "python tools/compare_norms.py" in line]
    assert len(examples) >= 4
    for example in examples:
        args = tool["make_parser"]().parse_args(shlex.split(example)[2:])
        assert args.norms and len(args.opts) % 2 == 0


# --- the numbers -----------------------------------------------------------------------------


def finished(ap: float | None, precise: float | None = None) -> dict:
    return {
        "status": "finished",
        "results": {"bbox": {"AP": ap, "AP50": ap}},
        "results_precise_bn": {"bbox": {"AP": precise}} if precise is not None else None,
    }


def test_spread_is_the_sample_standard_deviation() -> None:
    spread = Spread.of([43.0, None, 43.8])
    assert (spread.mean, spread.n) == (pytest.approx(43.4), 2)
    assert spread.std == pytest.approx(0.4 * 2**0.5)
    assert Spread.of([5.0]).std is None
    assert Spread.of([None]) is None


def test_recovered_share_reproduces_the_published_control() -> None:
    """BN 8x1: 23.0 (PreciseBN 35.8); 1x8: 43.0 and 43.8; CBN 8x1: 37.8 -> 63 % and 72.5 %."""
    small, large = Split(8, 1), Split(1, 8)
    rows = make_rows(
        [
            ("BN", large, finished(43.0)),
            ("BN", large, finished(43.8)),
            ("BN", small, finished(23.0, 35.8)),
            ("CBN", small, finished(37.8)),
            ("CBN", Split(4, 2), finished(40.0)),
        ]
    )
    by_name = {(row.norm, row.split): row for row in rows}
    assert by_name["BN", small].recovered == 0.0
    assert round(100 * by_name["BN", small].recovered_precise) == 63
    assert round(100 * by_name["CBN", small].recovered, 1) == 72.5
    assert by_name["CBN", small].recovered_precise is None
    assert by_name["CBN", Split(4, 2)].recovered is None, "there is no BN at 4x2 to compare with"
    assert by_name["BN", large].recovered is None, "one rank has the whole batch: nothing is lost"
    assert "73 %" in text_report(rows, [], "t") and "recovered" in text_report(rows, [], "t")


def test_syncbn_is_the_reference_where_it_was_run() -> None:
    split = Split(4, 2)
    results = [("SyncBN", split, 50.0), ("BN", split, 40.0), ("CBN", split, 45.0)]
    rows = make_rows(
        [(n, s, finished(ap)) for n, s, ap in results] + [("BN", Split(1, 8), finished(99.0))]
    )
    assert [row.recovered for row in rows[:3]] == [1.0, 0.0, 0.5]


def test_no_share_where_nothing_was_lost() -> None:
    rows = make_rows([("BN", Split(2, 1), finished(40.0)), ("BN", Split(1, 2), finished(39.0))])
    assert [row.recovered for row in rows] == [None, None]


def test_failed_runs_do_not_enter_the_mean() -> None:
    broken = finished(90.0) | {"status": "failed", "message": "disk full"}
    row = make_rows([("GN", Split(1, 2), finished(10.0)), ("GN", Split(1, 2), broken)])[0]
    assert (row.ap["bbox"].mean, row.ap["bbox"].n) == (10.0, 1)
    assert row.status == "1 of 2 finished; failed: disk full"


def test_different_total_batches_never_share_a_table() -> None:
    rows = make_rows(
        [("BN", Split(1, 2), finished(1.0)), ("BN", Split(1, 8), finished(2.0))]
        + [("BN", Split(4, 2), finished(3.0))]
    )
    assert {total: len(group) for total, group in by_total_batch(rows).items()} == {2: 1, 8: 2}
    text = text_report(rows, [], "t")
    assert text.count("norm ") == 2
    assert "different total batch are not comparable" in text


def test_mask_ap_gets_columns_where_there_is_one() -> None:
    result = finished(10.0)
    result["results"]["segm"] = {"AP": 7.5, "AP50": 9.0}
    text = text_report(make_rows([("GN", Split(1, 2), result)]), [], "t")
    assert "mask AP" in text and "7.5" in text
    row = Row("GN", Split(1, 2), "finished", ap={"bbox": Spread(10.0, None, 1)})
    assert "mask AP" not in text_report([row], [], "t")


def test_metrics_of_a_resumed_run_and_a_half_written_line(tmp_path) -> None:
    lines = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 19, "total_loss": 2.5},
        {"iteration": 19, "bbox/AP": 1.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 59, "tot'
    (tmp_path / "metrics.json").write_text(text)
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [19, 39]
    assert read_metrics(tmp_path)[0] == {"iteration": 19, "total_loss": 2.5, "bbox/AP": 1.0}


def test_progress_reads_iteration_loss_and_time_left(tmp_path) -> None:
    assert progress.state_of(tmp_path) == (0, None, "starting")
    (tmp_path / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 100\n")
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 39, "total_loss": 1.234, "time": 2.0}\n')
    assert progress.state_of(tmp_path) == (40, 100, "loss 1.23, 2:00 left")
    metrics.write_text('{"iteration": 99, "total_loss": 1.2, "time": 2.0}\n')
    assert progress.state_of(tmp_path) == (100, 100, "loss 1.20, evaluating")


def test_plain_progress_lines_where_there_is_no_terminal(tmp_path, launcher, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    compare(make_plan(tmp_path, launcher, ["GN"]), jobs=1)
    assert "[0/1 done] GN 1x2 seed 1: " in capsys.readouterr().out


def test_a_report_says_what_it_was_made_with(tmp_path: Path) -> None:
    machine = {"cpu": "Z80", "cores": 1, "threads": 1, "gpu": None}
    results = []
    for seed in (1, 2):
        run = Run(f"GN {seed}", tmp_path, (), "s", norm="GN", split=Split(1, 2), seed=seed)
        results.append((run, {"machine": machine, "versions": {"torch": "2"}}))
    row = Row("GN", Split(1, 2), "finished", ap={"bbox": Spread(10.0, 1.0, 2)})
    text = text_report([row], results, "t")
    assert "Made with: seeds 1 2; Z80, 1 cores, 1 threads a process; torch 2." in text
