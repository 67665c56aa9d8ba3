"""Runs as jobs of a SLURM cluster, through submitit.

Each run is one job with one task on each of its nodes, which starts the launcher for the GPUs
there. A job that reaches its time limit or is preempted writes a checkpoint, is queued again and
goes on from there. Jobs outlive the comparison that submitted them: started again, it finds those
that are still queued or running and waits for them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbn_det.study.engine import source_environment
from cbn_det.study.plan import Run
from cbn_det.study.processes import (
    LeftBehind,
    command_of,
    is_running,
    prepare_folder,
    read_note,
    result_of,
    run_lock,
    write_note,
)
from cbn_det.study.results import read_result
from cbn_det.study.runner import Active

CLUSTERS = ("slurm", "local")
# submitit counts how often a job ran out of time. As each time adds a checkpoint, let it.
MAX_TIMEOUTS = 1000
# Before the time limit: for the iteration at hand and a checkpoint.
SIGNAL_SECONDS = 180
# Where the launcher was stopped but not by us: the rest of what SLURM sends comes within this time.
AFTER_STOP_SECONDS = 120
STOPPED_BY_SIGNAL = 130
# Between two questions to SLURM whether a job is still there.
ASK_SECONDS = 30.0
# squeue shows them for some minutes.
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE"}
FINAL_STATES |= {"NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
SET_BY_THE_TOOL = ("nodes", "ntasks-per-node", "signal", "output", "error", "requeue", "job-name")


@dataclass
class Cluster:
    """Where jobs go.

    Args:
        name: "slurm", or "local" for processes on this machine in the way of jobs, to try it out.
        machines: nodes of a job.
        on_gpu: whether a job asks for a GPU for each of its processes.
        options: of sbatch, without dashes: {"partition": "gpu", "time": "24:00:00"}.

    Raises:
        RuntimeError: submitit is not installed, or there is no SLURM here.
        ValueError: an option that cannot be read, or that is none of the user's.
    """

    name: str
    machines: int = 1
    on_gpu: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {key.replace("_", "-"): value for key, value in self.options.items()}
        taken = [key for key in self.options if key in SET_BY_THE_TOOL]
        if taken:
            raise ValueError(f"--sbatch {taken[0]}: is set by the tool")
        if self.name == "slurm" and "time" not in self.options:
            raise ValueError(
                "--sbatch time=HH:MM:SS is missing: what a job may take at a time. One that takes "
                "longer is queued again and goes on"
            )
        if self.name == "local" and self.machines > 1:
            raise ValueError("--submit local has one machine only")
        self.minutes = minutes(self.options.get("time", "1-00:00:00"))
        _submitit()

    def submit(self, run: Run) -> Active:
        """Submit a run, or find the job that an earlier comparison has submitted for it."""
        earlier = read_note(run).get("job")
        folder = run.folder.resolve() / "jobs"
        if earlier and self.name == "slurm" and in_queue(earlier):
            tasks = range(self._nodes(run))
            job = _submitit().SlurmJob(folder=folder, job_id=earlier, tasks=tasks)
        elif is_running(run.folder):
            return LeftBehind(run)
        else:
            prepare_folder(run)
            job = self._executor(run, folder).submit(Training(run))
            write_note(run, command=shlex.join(run.command), job=job.job_id, cluster=self.name)
        return Job(run, job, in_queue if self.name == "slurm" else None)

    def _nodes(self, run: Run) -> int:
        return self.machines if run.ranks >= self.machines else 1

    def _executor(self, run: Run, folder: Path) -> Any:
        # the job finds this package as we do
        place = f"PYTHONPATH={shlex.quote(source_environment().get('PYTHONPATH', ''))}"
        settings = {
            "python": f"env {place} {shlex.quote(sys.executable)}",
            "max_num_timeout": MAX_TIMEOUTS,
        }
        settings = {f"{self.name}_{key}": value for key, value in settings.items()}
        try:
            executor = _submitit().AutoExecutor(folder, cluster=self.name, **settings)
        except RuntimeError as error:
            raise RuntimeError(f"--submit {self.name}: {error}") from error
        nodes = self._nodes(run)
        executor.update_parameters(
            name=run.folder.name,
            timeout_min=self.minutes,
            nodes=nodes,
            tasks_per_node=1,
            stderr_to_stdout=True,
        )
        if self.on_gpu and not {"gres", "gpus", "gpus-per-node"} & self.options.keys():
            executor.update_parameters(gpus_per_node=run.ranks // nodes)
        if self.name == "slurm":
            more = {key: value for key, value in self.options.items() if key != "time"}
            executor.update_parameters(
                slurm_signal_delay_s=SIGNAL_SECONDS,
                slurm_additional_parameters={"requeue": True, **more},
            )
        return executor


class Job:
    """A submitted run; see :class:`~cbn_det.study.runner.Active`."""

    def __init__(self, run: Run, job: Any, alive: Callable[[str], bool] | None) -> None:
        self._run, self._job, self._alive = run, job, alive
        self._asked = time.monotonic()

    def ended(self) -> bool:
        # A result that is no success may be of an attempt that will be taken up again.
        if (read_result(self._run.folder) or {}).get("status") in ("finished", "diverged"):
            return True
        if self._alive is None:
            return self._job.done()
        if self._job.paths.result_pickle.exists():  # written unless the job is queued again
            return True
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        return not self._alive(self._job.job_id)

    def result(self) -> dict:
        self._job.get_info(mode="force")
        job = f"job {self._job.job_id} ended ({self._job.state}) without a result"
        return result_of(self._run, None, job)

    def stop(self) -> bool:
        if self._alive is not None:
            return False
        self._job.cancel()
        return True

    def kill(self) -> None:
        """A local job ends by itself; others go on."""


class Training:
    """What a job does on each of its nodes; submitit pickles it, calls it there, and calls
    :meth:`checkpoint` on the first node before the job has to go."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Train to the end.

        Returns:
            the launcher's exit code.

        Raises:
            BlockingIOError: the run is running already.
        """
        here = _submitit().JobEnvironment()
        command = command_of(self.run)
        at = command.index("--config-file")
        command[at:at] = machine_words(here.num_nodes, here.node, here.hostnames, here.job_id)
        folder = self.run.folder
        node = f".node{here.node}" if here.node else ""
        with contextlib.ExitStack() as files:
            console = files.enter_context(open(folder / f"console{node}.log", "ab"))
            lock = [] if here.node else [files.enter_context(run_lock(folder)).fileno()]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=lock,
                # SLURM sends it to every process of the job; it is for submitit only
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        try:
            code = self._process.wait()
        except BaseException:
            self._stop()
            raise
        if code == STOPPED_BY_SIGNAL:
            time.sleep(AFTER_STOP_SECONDS)
        return code

    def checkpoint(self) -> Any:
        """Let the launcher save and end; what submitit is to queue in place of this job."""
        self._stop()
        return _submitit().helpers.DelayedSubmission(Training(self.run))

    def _stop(self) -> None:
        # The signal may have come while Popen.wait holds its lock: nothing here may wait for that.
        if self._process is None or self._process.returncode is not None:
            return
        pid, deadline = self._process.pid, time.monotonic() + SIGNAL_SECONDS / 2
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)  # the launcher passes it on to its ranks
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)


def machine_words(nodes: int, node: int, hosts: Sequence[str], job: str) -> list[str]:
    """The launcher's arguments for one machine of a job: they meet on the first.

    Args:
        nodes: of the job.
        node: this one's number.
        hosts: names of all, in order.
        job: its id, which gives the port, so that jobs on one machine do not compete for it.
    """
    if nodes == 1:
        return []
    port = 20_000 + int(re.sub(r"\D", "", job) or 0) % 20_000
    url = f"tcp://{hosts[0]}:{port}"
    return ["--num-machines", str(nodes), "--machine-rank", str(node), "--dist-url", url]


def minutes(time_limit: str) -> int:
    """A time limit as sbatch takes it ("90", "24:00:00", "2-12:00") in minutes, rounded up.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit.strip())
    if not found:
        raise ValueError(f"--sbatch time={time_limit}: expected [DAYS-]HH:MM:SS or minutes")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    # with days the first number is hours; else it is so only where there are three
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, mins, seconds = [*numbers, 0, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def in_queue(job: str) -> bool:
    """Whether SLURM knows a job as waiting or running. Where it gives no answer, it may be."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return bool(set(done.stdout.split()) - FINAL_STATES)


def _submitit() -> Any:
    """The module, which only this way of running needs."""
    try:
        import submitit
    except ImportError as error:
        raise RuntimeError("--submit needs submitit: pip install submitit") from error
    return submitit
