"""Runs a plan's runs side by side, as many as there are places, each with its GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..progress import Bars, say
from ..run.files import read_result
from ..run.signals import handled
from .child import STOP_SECONDS
from .plan import Run
from .processes import Process
from .results import reason_of, state_of

POLL_SECONDS = 0.5


@dataclass
class Outcome:
    """How a run ended: the content of its result.json, or one made here where it left none."""

    run: Run
    result: dict
    reused: bool = False


class Active(Protocol):
    """A run under way, such as a :class:`~cbn_det.study.processes.Process`."""

    def ended(self) -> bool:
        """Whether it is over; cheap enough for a polling loop."""

    def result(self) -> dict:
        """After the end: what came out."""

    def stop(self) -> bool:
        """Ask it to save and end; False where it goes on without us."""

    def kill(self) -> None:
        """End all that is left of it."""


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.split() if done.returncode == 0 else []


class Places:
    """Places for `number` processes side by side, each with a GPU where there are any.

    With more processes than GPUs, GPUs are shared. `gpus` are names for CUDA_VISIBLE_DEVICES, which
    is left alone where there are none.
    """

    def __init__(self, number: int, gpus: Sequence[str] = ()) -> None:
        self.number = number
        self._gpus = list(gpus) or [""]
        self._taken: list[str] = []

    def take(self, ranks: int) -> list[str] | None:
        """The GPUs of `ranks` processes, or None while that many places are not free.

        A run with more ranks than there are places runs alone, and still gets a GPU for each of its
        ranks, as far as there are.
        """
        if len(self._taken) + min(ranks, self.number) > self.number:
            return None
        chosen = self._choose(ranks)
        self._taken += chosen
        return chosen

    def give_back(self, taken: Sequence[str]) -> None:
        """Free places that :meth:`take` has given."""
        for name in taken:
            self._taken.remove(name)

    def _choose(self, ranks: int) -> list[str]:
        chosen: list[str] = []
        for _ in range(ranks):
            # two ranks of a run on one GPU are worse than two runs on it
            use = {name: (chosen.count(name), self._taken.count(name)) for name in self._gpus}
            chosen.append(min(use, key=use.__getitem__))
        return chosen


def run_all(
    runs: list[Run],
    jobs: int,
    gpus: Sequence[str] = (),
    submit: Callable[[Run], Active] | None = None,
) -> list[Outcome]:
    """Run everything that is not finished yet, at most `jobs` processes at a time.

    A finished or diverged run is taken as it is; a failed one is started again and an interrupted
    one resumes from its last checkpoint. A run that ends badly is an outcome, never an exception.

    Args:
        jobs, gpus: see :class:`Places`.
        submit: starts a run elsewhere, or finds it running there, in place of a process here.

    Raises:
        KeyboardInterrupt: after all started processes have been ended.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = []

    def ended(run: Run, result: dict, reused: bool = False) -> None:
        outcomes[run.label] = Outcome(run, as_asked_for(run, result), reused)
        _announce(outcomes[run.label])

    for run in runs:
        result = read_result(run.folder)
        if result and result.get("status") in ("finished", "diverged"):
            ended(run, result, reused=True)
        else:
            waiting.append(run)
    places = Places(jobs, gpus)
    active: dict[str, tuple[Run, Active, list[str]]] = {}
    bars = Bars()
    try:
        while waiting or active:
            while waiting and (taken := places.take(waiting[0].ranks)) is not None:
                run = waiting.pop(0)
                sharing = max(jobs, run.ranks)
                process = submit(run) if submit else Process(run, sharing, taken)
                active[run.label] = (run, process, taken)
            for label, (run, process, taken) in list(active.items()):
                if process.ended():
                    del active[label]
                    places.give_back(taken)
                    ended(run, process.result())
            if bars.due():
                bars.show({label: state_of(run.folder) for label, (run, *_) in active.items()})
            if active:
                time.sleep(POLL_SECONDS)
    finally:
        bars.show({})
        if active:
            _end_all([process for _, process, _ in active.values()])
    return [outcomes[run.label] for run in runs]


def _announce(outcome: Outcome) -> None:
    result, kept = outcome.result, " (kept from before)" if outcome.reused else ""
    boxes = (result.get("results") or {}).get("bbox") or {}
    if result.get("status") != "finished":
        text = f"{reason_of(result)}{kept}; see {outcome.run.folder / 'console.log'}"
    elif boxes.get("AP") is not None:
        text = f"finished{kept} AP {boxes['AP']:.1f}"
    else:
        text = f"finished{kept} without AP"
    say(f"{outcome.run.label}: {text}")


def _end_all(active: list[Active]) -> None:
    # A second Ctrl-C ends the waiting for checkpoints, and must not leave processes behind.
    hurry = False

    def again(number: int, frame: object) -> None:
        nonlocal hurry
        hurry = True

    with handled(again, signal.SIGINT, signal.SIGTERM):
        ending = [process for process in active if process.stop()]
        deadline = time.monotonic() + STOP_SECONDS
        if not all(process.ended() for process in ending):
            say("waiting for the last checkpoints; Ctrl-C again ends everything at once")
        while not hurry and time.monotonic() < deadline and not all(p.ended() for p in ending):
            time.sleep(0.05)
        for process in ending:
            process.kill()


def as_asked_for(run: Run, result: dict) -> dict:
    """A result, which is a failure where the run was not the one that its row stands for."""
    images, ranks = result.get("images_per_gpu"), result.get("world_size")
    if (
        run.split is None
        or images is None
        or (ranks, images) == (run.split.ranks, run.split.images)
    ):
        return result
    message = f"trained as {ranks}x{images} where {run.split} (processes x images) was asked for"
    return result | {"status": "failed", "message": message}
