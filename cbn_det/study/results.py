"""Reads what runs leave behind and turns it into rows: mean and spread over seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .plan import Split

TASKS = ("bbox", "segm")
# The evaluations of a run, as its result.json names them.
EVALUATIONS = ("results", "results_precise_bn", "results_image_share")
# A column of AP -> the evaluation and the metric that its numbers are from.
AP_COLUMNS = {
    **{metric: ("results", metric) for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "AP, PreciseBN": ("results_precise_bn", "AP"),
    "AP, image share": ("results_image_share", "AP"),
}
# The AP of a class in a result: "AP-person".
OF_CLASS = "AP-"
# A small-batch loss has to be larger than so many standard deviations over seeds.
LOSS_IN_SPREADS = 2.0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `n` seeds (`std` is None for one seed)."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Over the values that exist; None when there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass
class Measured:
    """What the runs of one setting have left, one a seed: of a norm at a split.

    Attributes:
        finished: content of result.json of the finished runs.
        reasons: why the others did not finish.
        asked: what :func:`metrics_with_truth` finds in all runs on the same data.
        gains: by task and column of `tables.GAINS`; see :func:`fill_gains`.
    """

    norm: str
    split: Split
    finished: list[dict]
    reasons: list[str]
    asked: set[tuple[str, str]]
    gains: dict[str, dict[str, float]] = field(default_factory=dict)

    def ap(self, task: str = "bbox", column: str = "AP") -> Spread | None:
        """A column of `AP_COLUMNS`, or "AP-CLASS", on the 0-100 scale; None: no such number.

        A model that detects nothing has no AP in its result; where another one has, it is 0.
        """
        evaluation, metric = AP_COLUMNS.get(column, ("results", column))
        nothing = 0.0 if (task, metric) in self.asked else None
        values = []
        for result in self.finished:
            if found := result.get(evaluation):  # else there was no evaluation
                # without any detection detectron2 leaves out masks altogether
                value = (found.get(task) or {}).get(metric)
                values.append(nothing if value is None else value)
        return Spread.of(values)

    def cost(self, key: str) -> float | None:
        """Mean of a number of result.json, in seconds, MiB, parameters or multiply-adds."""
        spread = Spread.of(result.get(key) for result in self.finished)
        return spread and spread.mean

    @property
    def status(self) -> str:
        runs = len(self.finished) + len(self.reasons)
        if self.reasons:
            return f"{len(self.finished)} of {runs} finished"
        return "finished" if runs == 1 else f"{runs} finished"

    @property
    def iterations(self) -> int | None:
        return next((r["iterations"] for r in self.finished if r.get("iterations")), None)


def read_lines(path: Path) -> list[dict]:
    """The lines of JSON that a run has written so far, in the order of iterations; what a killed
    process left of a line is left out.

    A run that was resumed writes some iterations twice: the later line counts.
    """
    lines: dict[int, dict] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "iteration" in entry:
            lines[entry["iteration"]] = lines.get(entry["iteration"], {}) | entry
    return [lines[iteration] for iteration in sorted(lines)]


def state_of(folder: Path) -> tuple[int, int | None, str]:
    """Of a run under way: iterations done, iterations in all or None, and what is going on."""
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


def make_rows(results: list[tuple[str, Split, dict]]) -> list[Measured]:
    """Group (norm, split, result) of single runs, in the order of first appearance."""
    asked = metrics_with_truth(result for _, _, result in results)
    rows: dict[tuple[str, Split], Measured] = {}
    for norm, split, result in results:
        row = rows.setdefault((norm, split), Measured(norm, split, [], [], asked))
        if result.get("status") == "finished":
            row.finished.append(result)
        else:
            row.reasons.append(reason_of(result))
    for task in TASKS:
        fill_gains(list(rows.values()), task)
    return list(rows.values())


def metrics_with_truth(results: Iterable[dict]) -> set[tuple[str, str]]:
    """Tasks and metrics that the data have objects for, as a number of any evaluation shows."""
    return {
        (task, metric)
        for result in results
        for evaluation in EVALUATIONS
        for task, by_metric in (result.get(evaluation) or {}).items()
        for metric, value in by_metric.items()
        if value is not None
    }


def fill_gains(rows: list[Measured], task: str) -> None:
    """Set what each row's plain AP is above that of others, where these were trained.

    "AP - SyncBN" is to SyncBN at the same split, "AP - GN" to GN there or else, as GN normalises
    every image for itself, to GN with the same total batch at another one.

    "recovered" is a share (1.0 is all) of the small-batch loss, of boxes:
    (AP - AP_BN) / (AP_reference - AP_BN). AP_BN is BN at the same split; the reference is SyncBN
    there or, equal to it in what is normalised, BN with the same total batch on one rank. Both are
    plain also for "recovered, PreciseBN", so that what better bookkeeping of running statistics
    gains is visible as a share of its own. A loss within `LOSS_IN_SPREADS` spreads over seeds
    (where there are several) is none, and has no share.
    """
    ap = {(row.norm, row.split): spread for row in rows if (spread := row.ap(task))}
    gn_of_total = {split.total: gn for (norm, split), gn in reversed(ap.items()) if norm == "GN"}
    for row in rows:
        own, split = row.ap(task), row.split
        gains = row.gains[task] = {}
        if own is None:
            continue
        sync = ap.get(("SyncBN", split))
        gn = ap.get(("GN", split)) or gn_of_total.get(split.total)
        for name, other in (("SyncBN", sync), ("GN", gn)):
            if other and row.norm != name:
                gains[f"AP - {name}"] = own.mean - other.mean
        small, whole = ap.get(("BN", split)), sync or ap.get(("BN", Split(1, split.total)))
        if task != "bbox" or split.ranks == 1 or not small or not whole:
            continue
        loss = whole.mean - small.mean
        if loss > LOSS_IN_SPREADS * max(small.std or 0.0, whole.std or 0.0):
            gains["recovered"] = (own.mean - small.mean) / loss
            if precise := row.ap(task, "AP, PreciseBN"):
                gains["recovered, PreciseBN"] = (precise.mean - small.mean) / loss


def reason_of(result: dict) -> str:
    """Why a run did not finish: its status, and its message where that says more."""
    status, message = str(result.get("status")), result.get("message") or "no message"
    return message if message.startswith(status) else f"{status}: {message}"
