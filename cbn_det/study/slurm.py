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

import submitit

from ..progress import say
from ..run.files import read_result
from .plan import Run
from .processes import Process, locked, prepare_folder, result_of, source_environment
from .runner import Active


@dataclass
class Cluster:
    """Where jobs go: "slurm", or "local" for processes of this machine, to try it out.

    Args:
        minutes: that a job takes at a time.
        machines: nodes of a job.
        on_gpu: whether a job asks for a GPU for each of its processes.
        options: of sbatch, without dashes: {"partition": "gpu"}.
    """

    name: str
    minutes: int
    machines: int = 1
    on_gpu: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def submit(self, run: Run) -> Submitted:
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
                return Submitted(run, job)
        with locked(run.folder):  # nothing trains there
            prepare_folder(run)
        os.environ.update(source_environment())  # jobs get it, and find this package as we do
        often = {f"{self.name}_max_num_timeout": 1000}  # each adds a checkpoint
        executor = submitit.AutoExecutor(folder, cluster=self.name, **often)
        asked = {"nodes": nodes, "tasks_per_node": 1, "timeout_min": self.minutes}
        if self.on_gpu and not {"gres", "gpus", "gpus-per-node"} & self.options.keys():
            asked["gpus_per_node"] = run.ranks // nodes
        asked["slurm_additional_parameters"] = {"requeue": True, **self.options}
        asked["slurm_signal_delay_s"] = 180  # for the iteration at hand and a checkpoint
        executor.update_parameters(name=run.folder.name, stderr_to_stdout=True, **asked)
        return Submitted(run, executor.submit(Training(run)))


@dataclass
class Submitted(Active):
    """A submitted run; a local one ends by itself where :meth:`kill` would end it."""

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
        if is_here := isinstance(self.job, submitit.LocalJob):
            self.job.cancel()
        return is_here


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
        more = words if here.num_nodes > 1 else []
        sharing = self.run.ranks // here.num_nodes
        with contextlib.nullcontext() if here.node else locked(self.run.folder):
            log = f"console{here.node or ''}.log"
            self._process = Process(self.run, sharing, more=more, log=log)
            code = self._process.wait()
        if code == 130:  # stopped, not by us: SLURM, which signals all, ends or requeues this job
            time.sleep(120)
        return code

    def checkpoint(self) -> Any:
        """Let the launcher save and end; what submitit is to queue in place of this job."""
        self._process.stop()
        self._process.wait()
        return submitit.helpers.DelayedSubmission(Training(self.run))
