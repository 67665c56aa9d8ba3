"""Runs commands side by side, each in a process group of its own."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cbn_det.study.disk import full_disk_note
from cbn_det.study.engine import source_environment
from cbn_det.study.plan import Run
from cbn_det.study.progress import Display
from cbn_det.study.results import read_result

# What the launcher's exit codes mean where it left no result.json.
EXIT_USAGE = 2
# Where a run that failed says why: a traceback fits in.
LAST_LINES = 60


@dataclass
class Outcome:
    """How a run ended: the content of its result.json, or one made here where it left none."""

    run: Run
    result: dict
    reused: bool = False


def run_all(
    runs: list[Run], jobs: int, done: Callable[[Outcome], None], poll_seconds: float = 0.5
) -> list[Outcome]:
    """Run everything that is not finished yet, at most `jobs` processes at a time.

    A finished or diverged run is taken as it is; a failed one is started again and a broken-off one
    goes on from its last checkpoint. A run that ends badly is an outcome, never an exception.

    Args:
        runs: what to run.
        jobs: single-rank processes side by side; a run with more ranks takes as many places.
        done: called with each outcome as it comes.

    Raises:
        KeyboardInterrupt: after all started processes have been ended.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = []
    for run in runs:
        result = read_result(run.folder)
        if result and result.get("status") in ("finished", "diverged"):
            outcomes[run.label] = Outcome(run, result, reused=True)
            done(outcomes[run.label])
        else:
            waiting.append(run)
    active: dict[str, tuple[Run, subprocess.Popen]] = {}
    with Display(total=len(runs)) as display:
        try:
            while waiting or active:
                while waiting and _fits(waiting[0], active, jobs):
                    run = waiting.pop(0)
                    active[run.label] = (run, _start(run, jobs))
                for label, (run, process) in list(active.items()):
                    if process.poll() is None:
                        continue
                    del active[label]
                    end_group(process)  # ranks that outlived their parent
                    outcomes[label] = Outcome(run, _result_of(run, process.returncode))
                    display.forget(label)
                    done(outcomes[label])
                display.update([run for run, _ in active.values()], len(outcomes))
                if active:
                    time.sleep(poll_seconds)
        finally:
            if active:
                _end_all([process for _, process in active.values()])
    return [outcomes[run.label] for run in runs]


def signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to a process and all it started; False when none of them is left."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def end_group(process: subprocess.Popen, patience: float = 5.0) -> None:
    """End a process and everything it started: politely first, then for certain."""
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(process, signal.SIGKILL)
    process.wait()


def _end_all(processes: list[subprocess.Popen]) -> None:
    # A second, impatient Ctrl-C must not leave processes behind.
    ignored = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    for process in processes:
        signal_group(process, signal.SIGTERM)
    for process in processes:
        end_group(process)
    for number, handler in ignored.items():
        signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one comparison. Raises RuntimeError when another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another comparison is running in this folder") from None
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that no run outlives the comparison."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def command_of(run: Run) -> list[str]:
    """The command line that starts a run, or lets it go on from its last checkpoint."""
    command = list(run.command)
    if (run.folder / "last_checkpoint").exists():
        command.insert(command.index("--config-file"), "--resume")
    return command


def _fits(run: Run, active: dict[str, tuple[Run, subprocess.Popen]], jobs: int) -> bool:
    return not active or sum(other.ranks for other, _ in active.values()) + run.ranks <= jobs


def _start(run: Run, jobs: int) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    # A result that is here now is of an attempt that failed; the coming attempt writes its own.
    (run.folder / "result.json").unlink(missing_ok=True)
    command = command_of(run)
    note = {"signature": run.signature, "command": shlex.join(command)}
    (run.folder / "study.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, (cores or 1) // max(jobs, run.ranks)))
    env = source_environment() | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with open(run.folder / "console.log", "ab") as console:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def _result_of(run: Run, code: int) -> dict:
    log = (run.folder / "console.log").read_text("utf-8", "replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    result = read_result(run.folder)
    if not result:
        if code < 0:
            kind = f"killed by {signal.Signals(-code).name}"
        else:
            kind = f"{'refused' if code == EXIT_USAGE else 'crashed'} (exit code {code})"
        result = {"status": "failed", "message": f"{kind}: {lines[-1] if lines else 'no output'}"}
    if result.get("status") == "failed":
        said = "\n".join([str(result.get("message")), *lines[-LAST_LINES:]])
        note = full_disk_note(said, run.folder)
        if note:
            result["message"] = f"{note}; {result.get('message')}"
    return result
