"""Runs as jobs: submitit's local executor, and its SLURM executor on a made-up cluster."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cbn_det.commands.flags import add_places, submitter
from cbn_det.study import runner
from cbn_det.study.compare import compare
from cbn_det.study.plan import Plan, Split
from cbn_det.study.processes import locked

try:
    from cbn_det.study.slurm import Cluster
except ModuleNotFoundError:  # the tests that need it are skipped
    Cluster = None

HERE = Path(__file__).parent
LAUNCHER = (sys.executable, str(HERE / "fake_launcher.py"))


def make_plan(tmp_path: Path, norms: list[str], **changes) -> Plan:
    settings = {"splits": [Split(1, 2)], "seeds": [1], "engine": "detectron2"} | changes
    return Plan(tmp_path / "out", norms, launcher=LAUNCHER, **settings)


def attempts(plan: Plan) -> dict[str, list[str]]:
    folders = (plan.output / "runs").iterdir()
    return {f.name.split("_")[0]: (f / "attempts").read_text().split() for f in folders}


def result_of(plan: Plan, number: int = 0) -> dict:
    return json.loads((plan.runs()[number].folder / "result.json").read_text())


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A SLURM of this machine; the folder that it keeps its jobs in."""
    home, tools = tmp_path / "slurm", tmp_path / "bin"
    home.mkdir()
    tools.mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/fake_slurm.py {name} "$@"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_SLURM", str(home))
    from submitit import SlurmJob

    SlurmJob.watcher.clear()  # it knows jobs by their numbers, of any cluster,
    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 1.0)  # and asks every ten minutes
    return home


# --- what is said and refused ------------------------------------------------------------------


def submitter_of(*words: str):
    parser = argparse.ArgumentParser()
    add_places(parser)
    return submitter(parser.parse_args(words), on_gpu=True)


def test_without_submitit_a_line_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install submitit"):
        submitter_of("--submit", "local")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("slurm --sbatch partition=gpu", "time=: expected minutes, time=1440 for a day"),
        ("slurm --sbatch time=24:00:00", "time=24:00:00: expected minutes"),
        ("slurm --sbatch time=60 job_name=x", "job-name: is set by the tool"),
        ("local --num-machines 2", "--num-machines needs --submit slurm"),
    ],
)
def test_options_that_cannot_be_followed(words, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        submitter_of("--submit", *words.split())


# --- on this machine ---------------------------------------------------------------------------


def test_local_jobs_end_like_processes(submitit, tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["GN", "DIVERGE", "CRASH"])
    assert compare(plan, jobs=3, submit=Cluster("local", 60).submit) == 1
    printed = capsys.readouterr().out
    assert "GN 1x2 seed 1: finished AP 41.0" in printed
    assert "diverged: loss is nan at fpn_output2" in printed
    assert "failed: job " in printed and "without a result: RuntimeError: it broke" in printed
    compare(plan, jobs=3)  # whatever starts the runs, they are the same
    counts = {name: len(starts) for name, starts in attempts(plan).items()}
    assert counts == {"GN": 1, "DIVERGE": 1, "CRASH": 2}


def test_a_job_that_has_to_go_saves_and_goes_on(submitit, tmp_path) -> None:
    """The signal goes to the training as well, as SLURM sends it to all of a job."""
    plan = make_plan(tmp_path, ["SLOW"])
    run = plan.runs()[0]
    job = Cluster("local", 60).submit(run)
    try:
        pid = run.folder / "pid"
        wait_for(pid.exists)
        first = int(pid.read_text())
        signal_job(first)
        wait_for(lambda: int(pid.read_text()) != first)
        assert attempts(plan) == {"SLOW": ["start", "resume"]}
        assert not job.ended(), "the result of the first attempt is none"
    finally:
        (run.folder / "go").touch()
    wait_for(job.ended)
    assert job.result()["status"] == "finished"


def signal_job(launcher: int, number: int = signal.SIGUSR2) -> None:
    """As SLURM does, to every process of a job: the launcher, what ends it, and submitit's."""
    pid = launcher
    for _ in range(3):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(pid, number)
        pid = parent


def test_a_local_job_that_outlived_its_comparison_is_not_started_twice(submitit, tmp_path) -> None:
    run = make_plan(tmp_path, ["SLOW"]).runs()[0]
    submit = Cluster("local", 60).submit
    job = submit(run)
    wait_for((run.folder / "pid").exists)
    with pytest.raises(RuntimeError, match=f"{run.folder}: another comparison"):
        submit(run)
    (run.folder / "go").touch()
    wait_for(job.ended)
    assert job.result()["status"] == "finished"
    assert (run.folder / "attempts").read_text().split() == ["start"]


def test_a_local_job_is_ended_by_ctrl_c(submitit, tmp_path) -> None:
    plan = make_plan(tmp_path, ["SLOW"])
    run = plan.runs()[0]
    job = Cluster("local", 60).submit(run)
    wait_for((run.folder / "pid").exists)
    runner._end_all([job])
    wait_for((run.folder / "last_checkpoint").exists)
    with locked(run.folder):
        pass  # its processes are gone


# --- on a cluster ------------------------------------------------------------------------------


def test_a_job_asks_for_what_its_run_needs(submitit, cluster, tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"], splits=[Split(16, 1)], machines=2)
    options = "time=1440 partition=gpu account=vision cpus_per_task=40".split()
    submit = submitter_of("--submit", "slurm", "--num-machines", "2", "--sbatch", *options)
    assert compare(plan, jobs=16, submit=submit) == 0
    script = (cluster / "1000" / "script").read_text()
    asked = {line.split("--", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        *("nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "time=1440", "requeue"),
        *("partition=gpu", "account=vision", "cpus-per-task=40", "signal=USR2@180"),
    }
    assert not {line for line in asked if line.startswith("mem")}, "the cluster's default"
    assert result_of(plan)["machines"][:2] == [2, 0]
    assert result_of(plan)["machines"][2].startswith("tcp://localhost:")
    assert result_of(plan)["world_size"] == 16
    other = Cluster("slurm", 60, on_gpu=True, options={"gres": "gpu:a100:1"})
    other.submit(make_plan(tmp_path / "other", ["BN"]).runs()[0])
    script = (cluster / "1001" / "script").read_text()
    assert "--gres=gpu:a100:1" in script and "gpus-per-node" not in script


def test_a_job_outlives_the_comparison_and_is_found_again(submitit, cluster, tmp_path) -> None:
    """Found while it runs, it is watched through a preemption too, when nothing of it runs."""
    plan = make_plan(tmp_path, ["SLOW"])
    run, submit = plan.runs()[0], Cluster("slurm", 60).submit
    pid = run.folder / "pid"
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "from pathlib import Path\n"
        "import test_study_slurm as tests\n"
        "from cbn_det.study.compare import guarded\n"
        f"plan = tests.make_plan(Path({str(tmp_path)!r}), ['SLOW'])\n"
        "submit = tests.Cluster('slurm', 60).submit\n"
        "sys.exit(guarded('test', lambda: tests.compare(plan, 1, submit=submit)))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for(pid.exists)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130

    def preempt() -> None:
        before = int(pid.read_text())
        time.sleep(3.0)  # the second comparison watches by now
        signal_job(before)
        wait_for(lambda: int(pid.read_text()) != before)
        (run.folder / "go").touch()

    threading.Thread(target=preempt, daemon=True).start()
    assert compare(plan, jobs=1, submit=submit) == 0
    assert attempts(plan) == {"SLOW": ["start", "resume"]}
    assert (cluster / "calls").read_text().count("sbatch") == 1


def test_a_preempted_job_goes_on_in_the_queue(submitit, cluster, tmp_path) -> None:
    run = make_plan(tmp_path, ["SLOW"]).runs()[0]
    job = Cluster("slurm", 60).submit(run)
    pid = run.folder / "pid"
    wait_for(pid.exists)
    first = int(pid.read_text())
    signal_job(first)
    wait_for(lambda: int(pid.read_text()) != first)
    assert not job.ended()
    (run.folder / "go").touch()
    wait_for(job.ended)
    assert job.result()["status"] == "finished"
    assert (run.folder / "attempts").read_text().split() == ["start", "resume"]
    assert "scontrol requeue 1000" in (cluster / "calls").read_text()


def test_a_job_that_is_cancelled_is_a_row_with_its_reason(submitit, cluster, tmp_path) -> None:
    run = make_plan(tmp_path, ["SLOW"]).runs()[0]
    job = Cluster("slurm", 60).submit(run)
    wait_for((run.folder / "pid").exists)
    (cluster / "1000" / "state").write_text("CANCELLED")
    signal_job(int((run.folder / "pid").read_text()), signal.SIGKILL)
    wait_for(job.ended)
    result = job.result()
    assert result["status"] == "failed"
    assert "job 1000 ended (CANCELLED) without a result" in result["message"]
