"""A command that ends with the process which started it.

``python -m cbn_det.study.child COMMAND`` runs COMMAND and ends as it does. The starter keeps the
other end of stdin and never writes to it. The kernel closes it when the starter is gone, however it
died; the command is then asked to save and end, and killed where it does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# For a run to finish its iteration and write a checkpoint once it is asked to stop.
STOP_SECONDS = 60.0


def main(command: Sequence[str]) -> int:
    """Run a command in this process group, whose leader this process is; its exit code."""
    # SIGTERM comes to the whole group, and is for the command. A handler, as an ignored signal
    # would be ignored by the command too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # SLURM sends it to every process of a job, and it is for submitit: the command inherits this.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    orphaned = threading.Event()

    def watch() -> None:
        os.read(0, 1)
        orphaned.set()
        os.killpg(os.getpgrp(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    if orphaned.is_set():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # ranks that outlived their parent
    if code < 0:  # the same death, for the starter to name
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
