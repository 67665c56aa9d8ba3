"""Runs as jobs of a SLURM cluster, through submitit.

A run is one job with one task on each of its nodes: the launcher for the GPUs there. A job that
reaches its time limit or is preempted writes a checkpoint, is queued again and resumes. Jobs
outlive the comparison that submitted them, which finds them again.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import Any

try:
    import submitit
except ImportError:  # only --submit needs it
    submitit = None

from cbn_det.study.plan import Run
from cbn_det.study.processes import Process, locked, prepare_folder, result_of, source_environment
from cbn_det.study.progress import say
from cbn_det.study.results import read_result

CLUSTERS = ("slurm", "local")
SIGNAL_SECONDS = 180  # before the time limit: for the iteration at hand and a checkpoint
SET_BY_THE_TOOL = {"nodes", "ntasks-per-node", "signal", "output", "error", "requeue", "job-name"}


@dataclass
class Cluster:
    """Where jobs go: "slurm", or "local" for processes of this machine, to try it out.

    Args:
        machines: nodes of a job.
        on_gpu: whether a job asks for a GPU for each of its processes.
        options: of sbatch, without dashes: {"partition": "gpu", "time": "1440"}, time in minutes.

    Raises:
        RuntimeError: submitit is not installed.
        ValueError: an option that cannot be read, or that is none of the user's.
    """

    name: str
    machines: int = 1
    on_gpu: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {key.replace("_", "-"): value for key, value in self.options.items()}
        if taken := self.options.keys() & SET_BY_THE_TOOL:
            raise ValueError(f"--sbatch {min(taken)}: is set by the tool")
        self.minutes = self.options.pop("time", "1440" if self.name == "local" else "")
        if not self.minutes.isdecimal():
            raise ValueError(
                f"--sbatch time={self.minutes}: expected minutes, time=1440 for a day. It is what "
                "a job takes at a time; one that needs longer is queued again and resumes"
            )
        if self.name == "local" and self.machines > 1:
            raise ValueError("--submit local has one machine only")
        if submitit is None:
            raise RuntimeError("--submit needs submitit: pip install submitit")

    def submit(self, run: Run) -> Job:
        """Submit a run, or find the job that an earlier comparison has submitted for it.

        Raises:
            RuntimeError: there is no SLURM here, or something else trains in the run's folder.
        """
        folder = run.folder.resolve() / "jobs"
        nodes = self.machines if run.ranks >= self.machines else 1
        jobs = sorted(folder.glob("*_submitted.pkl"), key=os.path.getmtime)
        if jobs and self.name == "slurm":
            job = submitit.SlurmJob(folder, jobs[-1].name.split("_")[0], tasks=range(nodes))
            job.get_info(mode="force")
            if not job.done():
                say(f"{run.label}: job {job.job_id} of an earlier call is {job.state}")
                return Job(run, job)
        with locked(run.folder):  # nothing trains there
            prepare_folder(run)
        os.environ.update(source_environment())  # jobs get it, and find this package as we do
        often = {f"{self.name}_max_num_timeout": 1000}  # each adds a checkpoint
        executor = submitit.AutoExecutor(folder, cluster=self.name, **often)
        asked = {"nodes": nodes, "tasks_per_node": 1, "timeout_min": int(self.minutes)}
        if self.on_gpu and not {"gres", "gpus", "gpus-per-node"} & self.options.keys():
            asked["gpus_per_node"] = run.ranks // nodes
        more = {"requeue": True, **self.options}
        asked |= {"slurm_additional_parameters": more, "slurm_signal_delay_s": SIGNAL_SECONDS}
        executor.update_parameters(name=run.folder.name, stderr_to_stdout=True, **asked)
        return Job(run, executor.submit(Training(run)))


@dataclass
class Job:
    """A submitted run; see :class:`~cbn_det.study.runner.Active`."""

    run: Run
    job: Any

    def ended(self) -> bool:
        # A result that is no success may be of an attempt that will be resumed.
        result = read_result(self.run.folder) or {}
        return result.get("status") in ("finished", "diverged") or self.job.done()

    def result(self) -> dict:
        state = self.job.get_info(mode="force") and self.job.state
        return result_of(self.run, f"job {self.job.job_id} ended ({state}) without a result")

    def stop(self) -> bool:
        if isinstance(self.job, submitit.SlurmJob):
            return False
        self.job.cancel()
        return True

    def kill(self) -> None:
        """A local job ends by itself; others go on."""


@dataclass
class Training:
    """What submitit pickles and calls on each node of a job. It calls :meth:`checkpoint` on the
    first one before the job has to go."""

    run: Run

    def __call__(self) -> int:
        """Train to the end; the launcher's exit code."""
        here = submitit.JobEnvironment()
        first = submitit.helpers.TorchDistributedEnvironment()
        words = f"--num-machines {here.num_nodes} --machine-rank {here.node}".split()
        words += ["--dist-url", f"tcp://{first.master_addr}:{first.master_port}"]
        with contextlib.nullcontext() if here.node else locked(self.run.folder):
            self._process = Process(
                self.run,
                sharing=self.run.ranks // here.num_nodes,
                more=words if here.num_nodes > 1 else (),
                log=f"console{here.node or ''}.log",
            )
            code = self._process.wait()
        if code == 130:  # stopped, not by us: SLURM, which signals all, ends or requeues this job
            time.sleep(120)
        return code

    def checkpoint(self) -> Any:
        """Let the launcher save and end; what submitit is to queue in place of this job."""
        self._process.stop()
        self._process.wait()
        return submitit.helpers.DelayedSubmission(Training(self.run))
