"""Live progress of runs, read from their folders: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .plan import Run
from .results import read_lines

PLAIN_SECONDS = 15.0
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"


def say(text: str) -> None:
    """Print a line, above the bars where there are any."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def state_of(folder: Path) -> tuple[int, int | None, str]:
    """(iterations done, iterations in all or None, what is going on) of a run."""
    config = folder / "config.yaml"
    written = config.read_text(encoding="utf-8") if config.exists() else ""
    found = re.search(r"^\s+MAX_ITER: (\d+)", written, re.MULTILINE)
    total = int(found[1]) if found else None
    metrics = [line for line in read_lines(folder / "metrics.json") if "total_loss" in line]
    if not metrics:
        return 0, total, "starting"
    last = metrics[-1]
    done = last["iteration"] + 1
    text = f"loss {last['total_loss']:.2f}"
    if total and done >= total:
        return done, total, f"{text}, evaluating"
    if total and "time" in last:
        text += f", {tqdm.format_interval((total - done) * last['time'])} left"
    return done, total, text


class Display:
    """Context manager that shows the active runs; `update` is cheap enough for a polling loop."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bars: dict[str, tqdm] = {}
        self._last = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        for label in list(self._bars):
            self.forget(label)

    def update(self, active: Sequence[Run], finished: int) -> None:
        """Show the state of the active runs."""
        on_terminal = sys.stderr.isatty()
        if time.monotonic() - self._last < (1.0 if on_terminal else PLAIN_SECONDS):
            return
        self._last = time.monotonic()
        if on_terminal:
            self._show("all runs", finished, self._total, "")
        for run in active:
            done, total, text = state_of(run.folder)
            if on_terminal:
                self._show(run.label, done, total, text)
            else:
                say(f"[{finished}/{self._total} done] {run.label}: {done}/{total or '?'} {text}")

    def _show(self, label: str, done: int, total: int | None, text: str) -> None:
        if label not in self._bars:
            self._bars[label] = tqdm(desc=label, bar_format=BAR, leave=False, dynamic_ncols=True)
        bar = self._bars[label]
        bar.n, bar.total = done, total
        bar.set_postfix_str(text)

    def forget(self, label: str) -> None:
        """Take a run off the display."""
        if label in self._bars:
            self._bars.pop(label).close()
