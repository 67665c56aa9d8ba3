"""A run as a process of this machine: how it is started and asked to stop, and what is made of its
end."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..run.cores import usable_cores
from ..run.errors import USAGE
from ..run.files import RESULT, read_result
from ..run.signals import handled
from .plan import Run

CHILD = (sys.executable, "-m", "cbn_det.study.child")
# Where a run that failed says why: a traceback fits in.
LAST_LINES = 60
# The last is what torch.save says of it.
DISK_IS_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|inline_container\.cc.*unexpected pos"
)
# Less than a checkpoint of any detector: whatever is said to have failed, this is why.
NEARLY_FULL_BYTES = 20 * 2**20
# The folder that this package is imported from.
HOME = Path(__file__).resolve().parents[2]


def source_environment() -> dict[str, str]:
    """The environment in which a child process finds this package, installed or not."""
    # an installed package is found anyway, and behind python's own
    if {"site-packages", "dist-packages"} & set(HOME.parts):
        return dict(os.environ)
    paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Process:
    """A run as a process group of this machine, which ends when this process does.

    Args:
        run: starts at once, from its last checkpoint if it has one.
        sharing: processes that share the cores of this machine.
        gpus: one for each process, as CUDA_VISIBLE_DEVICES names it; empty ones leave it alone.
        more: further arguments of the launcher.
        log: file in the run's folder for what the launcher prints.
    """

    def __init__(
        self,
        run: Run,
        sharing: int,
        gpus: Sequence[str] = (),
        more: Sequence[str] = (),
        log: str = "console.log",
    ) -> None:
        self._run = run
        threads = str(max(1, usable_cores() // sharing))
        env = source_environment() | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # GNU OpenMP's threads wait for each other in a loop, for most of a core where something
        # else runs too: 12 convolutions with two threads on two busy cores took 5.7 s instead of
        # 0.2 s with so short a loop, which costs 5 % where nothing else runs
        env.setdefault("GOMP_SPINCOUNT", "1000")
        if gpus := [name for name in gpus if name]:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus))
        prepare_folder(run)
        at = run.command.index("--config-file")
        resume = ["--resume"] if (run.folder / "last_checkpoint").exists() else []
        with open(run.folder / log, "ab") as console:
            self._process = subprocess.Popen(
                [*CHILD, *run.command[:at], *resume, *more, *run.command[at:]],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                close_fds=False,  # the lock of the folder is held until the last run has ended
            )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int | None:
        """Wait for its end; None in place of the exit code in a handler of a signal that has come
        meanwhile."""
        with suppress(ChildProcessError):  # whoever was interrupted has it
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return self._process.poll()

    def result(self) -> dict:
        self.kill()  # ranks that outlived their parent
        code = self._process.returncode
        if code < 0:
            return result_of(self._run, f"killed by {signal.Signals(-code).name}")
        what = "refused" if code == USAGE else "crashed"
        return result_of(self._run, f"{what} (exit code {code})")

    def stop(self) -> bool:
        return self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()

    def _signal(self, number: int) -> bool:
        """Send a signal to the process group; False when none of it is left."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


#: within it, SIGTERM and SIGHUP are a Ctrl-C, so that runs can save before they end
interruptible = partial(handled, signal.default_int_handler, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: for this process, and for those that inherit the file.

    Raises:
        RuntimeError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{folder}: another comparison is running in this folder, or the runs of one that "
                "was killed are writing their last checkpoints: try again in a minute"
            ) from None
        os.set_inheritable(file.fileno(), True)
        yield


def prepare_folder(run: Run) -> None:
    """Make a run's folder ready for an attempt, which writes a result of its own."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RESULT).unlink(missing_ok=True)


def result_of(run: Run, ending: str) -> dict:
    """The result of a run that is over; made up where it left none.

    Args:
        ending: what to say of it then.
    """
    log = run.folder / "console.log"
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    result = read_result(run.folder) or {
        "status": "failed",
        "message": f"{ending}: {lines[-1] if lines else 'no output'}",
    }
    if result.get("status") == "failed":
        said = "\n".join([str(result.get("message")), *lines[-LAST_LINES:]])
        if note := full_disk_note(said, run.folder):
            result["message"] = f"{note}; {result.get('message')}"
    return result


def full_disk_note(text: str, folder: Path) -> str | None:
    """The words for a run that failed since the disk was full, of what it said at its end; None
    where there is no sign of it."""
    free = shutil.disk_usage(folder).free
    if DISK_IS_FULL.search(text) or free < NEARLY_FULL_BYTES:
        return f"the disk is full ({free / 2**20:.0f} MB free now): free some space, then run again"
    return None
