"""Ctrl-C and SIGTERM during training: finish the iteration, save, stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Training was stopped on request after a whole iteration, on all ranks, and can be resumed."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, a first SIGINT or a SIGTERM only sets ``requested``; a second SIGINT raises."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if request.requested:
                raise KeyboardInterrupt
            print("stopping after this iteration; Ctrl-C again stops at once", file=sys.stderr)
        request.requested = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it, a SIGTERM is a Ctrl-C."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
