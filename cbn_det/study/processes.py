"""A run as a process of this machine: how it is started, found again and asked to stop, and what is
made of its end."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from cbn_det.study.disk import full_disk_note
from cbn_det.study.engine import source_environment
from cbn_det.study.plan import Run
from cbn_det.study.results import read_result

# What the launcher's exit codes mean where it left no result.json.
EXIT_USAGE = 2
# Where a run that failed says why: a traceback fits in.
LAST_LINES = 60
# What is known of a run in its folder, and what its process holds as long as it is there.
NOTE, RUN_LOCK = "study.json", ".running"


class Process:
    """A run as a process group of this machine. It holds a lock in its folder as long as it lives,
    so that whoever comes later can tell.

    Args:
        run: starts at once, from its last checkpoint if it has one.
        jobs: processes side by side, which share the cores.
        gpus: one for each process, as CUDA_VISIBLE_DEVICES names it; empty ones leave it alone.
    """

    def __init__(self, run: Run, jobs: int, gpus: Sequence[str] = ()) -> None:
        self._run = run
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = str(max(1, (cores or 1) // max(jobs, run.ranks)))
        env = source_environment() | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        gpus = [name for name in gpus if name]
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus))
        command = command_of(run)
        prepare_folder(run)
        with run_lock(run.folder) as lock, open(run.folder / "console.log", "ab") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        pid, host = self._process.pid, socket.gethostname()
        facts = {"pid": pid, "host": host, "ranks": run.ranks, "gpus": gpus}
        write_note(run, command=shlex.join(command), **facts)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> dict:
        end_group(self._process)  # ranks that outlived their parent
        return result_of(self._run, self._process.returncode)

    def stop(self) -> bool:
        return signal_group(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        end_group(self._process, patience=0.0)


class LeftBehind:
    """A run whose comparison was killed: its process, started by somebody else, still trains.

    Attributes:
        gpus: of this machine that it uses, one for each process; empty where that is not known.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        note = read_note(run)
        here = note.get("host") == socket.gethostname()
        self._pid = note.get("pid") if here else None
        self.gpus: list[str] = note.get("gpus", []) if here else []

    def ended(self) -> bool:
        return not is_running(self._run.folder)

    def result(self) -> dict:
        return result_of(self._run, None)

    def stop(self) -> bool:
        return self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        # As long as the lock is held, the process group is still this run's.
        return bool(self._pid) and not self.ended() and signal_group(self._pid, number)


def signal_group(leader: int, number: int) -> bool:
    """Send a signal to a process group; False when none of it is left."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def end_group(process: subprocess.Popen, patience: float = 5.0) -> None:
    """End a process and everything it started: politely first, then for certain."""
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def run_lock(folder: Path) -> Iterator[IO[str]]:
    """The file that a run's process inherits open and locked: the lock lasts as long as it does.

    Raises:
        BlockingIOError: the run is running already.
    """
    with open(folder / RUN_LOCK, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


def is_running(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    if not (folder / RUN_LOCK).exists():
        return False
    try:
        with run_lock(folder):
            return False
    except BlockingIOError:
        return True


def running_beside(runs: Sequence[Run]) -> list[Run]:
    """Other runs that processes of this machine are at, in the folders beside those of `runs`."""
    ours = {run.folder for run in runs}
    found = []
    for parent in dict.fromkeys(folder.parent for folder in ours):
        for folder in sorted(note.parent for note in parent.glob(f"*/{NOTE}")):
            other = Run(folder.name, folder, (), "")
            note = read_note(other)
            here = note.get("host") == socket.gethostname()
            if folder not in ours and here and is_running(folder):
                found.append(replace(other, ranks=note.get("ranks", 1)))
    return found


def command_of(run: Run) -> list[str]:
    """The command line that starts a run, or lets it go on from its last checkpoint."""
    command = list(run.command)
    if (run.folder / "last_checkpoint").exists():
        command.insert(command.index("--config-file"), "--resume")
    return command


def prepare_folder(run: Run) -> None:
    """Make a run's folder ready for an attempt, which writes a result of its own."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "result.json").unlink(missing_ok=True)


def write_note(run: Run, **facts: object) -> None:
    """Leave in a run's folder how it was started."""
    note = {"signature": run.signature, **facts}
    (run.folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def read_note(run: Run) -> dict:
    """What :func:`write_note` has left; empty where there is nothing to be read."""
    try:
        return json.loads((run.folder / NOTE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def result_of(run: Run, code: int | None, ending: str = "ended without a result") -> dict:
    """The result of a run that is over; made up where it left none.

    Args:
        code: of its process; None where somebody else started it.
        ending: what to say of it then.
    """
    log = run.folder / "console.log"
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    result = read_result(run.folder)
    if not result:
        if code is not None and code < 0:
            ending = f"killed by {signal.Signals(-code).name}"
        elif code is not None:
            ending = f"{'refused' if code == EXIT_USAGE else 'crashed'} (exit code {code})"
        result = {"status": "failed", "message": f"{ending}: {lines[-1] if lines else 'no output'}"}
    if result.get("status") == "failed":
        said = "\n".join([str(result.get("message")), *lines[-LAST_LINES:]])
        note = full_disk_note(said, run.folder)
        if note:
            result["message"] = f"{note}; {result.get('message')}"
    return result
