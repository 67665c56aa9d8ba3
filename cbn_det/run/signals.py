"""Ctrl-C and SIGTERM during training: finish the iteration, save, stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was stopped on request after a whole iteration, on all ranks, and can be resumed."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    requested = False


@contextmanager
def handled(handler: Callable[[int, Any], Any], *numbers: int) -> Iterator[None]:
    """Within it, signals go to a handler. ``signal.default_int_handler`` makes a Ctrl-C of each."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, a first SIGINT or a SIGTERM only sets ``requested``; a second SIGINT raises."""
    request = StopRequest()

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if request.requested:
                raise KeyboardInterrupt
            print("stopping after this iteration; Ctrl-C again stops at once", file=sys.stderr)
        request.requested = True

    with handled(stop, signal.SIGINT, signal.SIGTERM):
        yield request


def ignore_interrupts(worker: int) -> None:
    """For the processes of a data loader, as its ``worker_init_fn``: Ctrl-C reaches the whole
    process group, and so may SIGTERM, but the main process decides when loading ends. A SIGTERM of
    its own is obeyed: it waits for them when it exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM keeps its effect
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
