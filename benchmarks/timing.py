"""Processes that hold a norm's model each, and take turns."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ratios import FEWEST

from cbn_det.study.processes import source_environment

#: glibc gives large freed blocks back to the system or keeps them, depending on the order in which
#: they came, and getting them anew takes as long as a norm does. So workers keep what they once
#: had, as CUDA's caching allocator does: the ratios are then of the norms. The caller's environment
#: takes precedence.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**36),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}


class WorkerFailed(RuntimeError):
    """A worker could not be built, or died."""


class Worker:
    """A process that holds one norm's model and runs its steps when asked.

    Args:
        norm: its name.
        command: that starts the process.
        log: file for what it prints.
        threads: of torch; None: the default.
    """

    def __init__(
        self, norm: str, command: Sequence[str], log: Path, threads: int | None = None
    ) -> None:
        self.norm = norm
        self.log = log
        limit = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=KEEP_FREED_MEMORY | source_environment() | (limit if threads else {}),
            )

    def answer(self) -> dict:
        """The next line the worker prints.

        Raises:
            WorkerFailed: it says why it cannot go on, or is gone.
        """
        line = self._process.stdout.readline()
        content = json.loads(line) if line else {"error": self._last_words()}
        if "error" in content:
            raise WorkerFailed(f"{self.norm}: {content['error']}")
        return content

    def _last_words(self) -> str:
        self._process.wait()
        said = self.log.read_text("utf-8", "replace").strip().splitlines()
        return (
            f"it died (exit code {self._process.returncode}): {said[-1] if said else 'no output'}"
        )

    def ask(self, request: str) -> dict:
        """Sends a request and waits for the answer; raises as :meth:`answer` does."""
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it had to say is still to be read
        return self.answer()

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def started(
    commands: Mapping[str, Sequence[str]], threads: int | None = None
) -> Iterator[list[Worker]]:
    """Workers side by side, which end with the context; ``commands`` start them, by norm."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for number, (norm, command) in enumerate(commands.items()):
            workers.append(Worker(norm, command, logs / f"{number}.log", threads))
            stack.callback(workers[-1].end)
        yield workers


def take_turns(
    workers: Sequence[Worker], steps: int, repetitions: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Lets every worker make `steps` steps in each repetition, in an order drawn anew each time.

    Returns:
        for each norm, what its worker answered: "wall" and "cpu" seconds of a step.
    """
    order = random.Random(0)
    taken: dict[str, list[dict[str, float]]] = {worker.norm: [] for worker in workers}
    started = said = time.monotonic()
    for done in range(repetitions):
        now = time.monotonic()
        if done >= FEWEST and now - started > seconds:
            say(f"--seconds {seconds:g} are over: {done} repetitions instead of {repetitions}")
            break
        if now - said > 15:
            say(f"{done} of {repetitions} repetitions")
            said = now
        for worker in order.sample(workers, len(workers)):
            taken[worker.norm].append(worker.ask(f"time {steps}"))
    return taken


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
