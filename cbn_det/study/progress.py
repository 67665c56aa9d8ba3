"""Live progress of runs, read from their folders: bars on a terminal, plain lines elsewhere.

The bars are rich's; without it there are plain lines on a terminal too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
except ImportError:
    Console = None

from cbn_det.study.plan import Run
from cbn_det.study.results import read_metrics

PLAIN_SECONDS = 15.0

console = Console(highlight=False) if Console else None


def say(text: str) -> None:
    """Print a line, above the bars where there are any."""
    if console is None:
        print(text, flush=True)
    else:
        console.print(text, markup=False, soft_wrap=True)


def state_of(folder: Path) -> tuple[int, int | None, str]:
    """(iterations done, iterations in all or None, what is going on) of a run."""
    total = _max_iter(folder)
    metrics = [line for line in read_metrics(folder) if "total_loss" in line]
    if not metrics:
        return 0, total, "starting"
    last = metrics[-1]
    done = last["iteration"] + 1
    text = f"loss {last['total_loss']:.2f}"
    if total and done >= total:
        return done, total, f"{text}, evaluating"
    if total and "time" in last:
        text += f", {_minutes((total - done) * last['time'])} left"
    return done, total, text


class Display:
    """Context manager that shows the active runs; `update` is cheap enough for a polling loop."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bars: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._last = 0.0

    def __enter__(self) -> Display:
        if console is not None and console.is_terminal:
            label = TextColumn("{task.description}")
            self._bars = Progress(
                label, BarColumn(), TextColumn("{task.fields[text]}"), console=console
            )
            self._bars.start()
            self._all = self._bars.add_task("all runs", total=self._total, text="")
        return self

    def __exit__(self, *exc) -> None:
        if self._bars:
            self._bars.stop()

    def update(self, active: Sequence[Run], finished: int) -> None:
        """Show the state of the active runs."""
        every = 1.0 if self._bars else PLAIN_SECONDS
        if time.monotonic() - self._last < every:
            return
        self._last = time.monotonic()
        if self._bars:
            text = f"{finished}/{self._total} done"
            self._bars.update(self._all, completed=finished, text=text)
        for run in active:
            done, total, text = state_of(run.folder)
            text = f"{done}/{total or '?'} {text}"
            if self._bars:
                if run.label not in self._tasks:
                    self._tasks[run.label] = self._bars.add_task(run.label, text=text)
                task = self._tasks[run.label]
                self._bars.update(task, completed=done, total=total, text=text)
            else:
                say(f"[{finished}/{self._total} done] {run.label}: {text}")

    def forget(self, label: str) -> None:
        """Take a run off the display."""
        if self._bars and label in self._tasks:
            self._bars.remove_task(self._tasks.pop(label))


def _max_iter(folder: Path) -> int | None:
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found = re.search(r"^\s+MAX_ITER: (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
