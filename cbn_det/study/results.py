"""Reads what runs leave behind and turns it into rows: mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cbn_det.study.plan import Split

TASKS = ("bbox", "segm")
# The evaluations of a run, as its result.json names them.
EVALUATIONS = ("results", "results_precise_bn", "results_image_share")
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
    def of(cls, values: list[float | None]) -> Spread | None:
        """Over the values that exist; None when there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known))


@dataclass
class Row:
    """One line of a table: a norm at one split, over seeds.

    AP values are on the 0-100 scale, by task. `reasons` are those of the runs that did not finish.
    `recovered` and `recovered_precise` are shares (1.0 = all) of the small-batch loss; see
    `fill_recovered`. `to_sync` and `to_gn` are by task the AP above SyncBN's and GN's (below it:
    negative), see `fill_distances`.
    """

    norm: str
    split: Split
    status: str
    reasons: list[str] = field(default_factory=list)
    ap: dict[str, Spread | None] = field(default_factory=dict)
    ap50: dict[str, Spread | None] = field(default_factory=dict)
    ap75: dict[str, Spread | None] = field(default_factory=dict)
    ap_small: dict[str, Spread | None] = field(default_factory=dict)
    ap_medium: dict[str, Spread | None] = field(default_factory=dict)
    ap_large: dict[str, Spread | None] = field(default_factory=dict)
    ap_precise: dict[str, Spread | None] = field(default_factory=dict)
    ap_image_share: dict[str, Spread | None] = field(default_factory=dict)
    ap_of_class: dict[str, dict[str, Spread | None]] = field(default_factory=dict)
    sec_per_iter: Spread | None = None
    peak_memory_mb: Spread | None = None
    parameters: Spread | None = None
    flops: Spread | None = None
    iterations: int | None = None
    recovered: float | None = None
    recovered_precise: float | None = None
    to_sync: dict[str, float] = field(default_factory=dict)
    to_gn: dict[str, float] = field(default_factory=dict)


def read_result(folder: Path) -> dict | None:
    """The content of a run's result.json, or None where it is missing or cut short."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) else None


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.json so far."""
    try:
        return read_lines(folder / "metrics.json")
    except FileNotFoundError:
        return []


def read_lines(path: Path) -> list[dict]:
    """The lines of JSON that a run has written, in the order of iterations; what a killed process
    left of a line is left out.

    A run that was resumed writes some iterations twice: the later line counts.
    """
    lines: dict[int, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "iteration" in entry:
            lines[entry["iteration"]] = lines.get(entry["iteration"], {}) | entry
    return [lines[iteration] for iteration in sorted(lines)]


def make_rows(results: list[tuple[str, Split, dict]]) -> list[Row]:
    """Group (norm, split, result) of single runs into rows, in the order of first appearance.

    AP, times and memory are over finished runs only; the others are counted in `status`. A model
    that detects nothing at all has no AP in its result; where another evaluation has one, it is 0.
    """
    asked = metrics_with_truth(result for _, _, result in results)
    classes = {task: _class_metrics([result for _, _, result in results], task) for task in TASKS}
    groups: dict[tuple[str, Split], list[dict]] = {}
    for norm, split, result in results:
        groups.setdefault((norm, split), []).append(result)
    rows = []
    for (norm, split), group in groups.items():
        good = [result for result in group if result.get("status") == "finished"]
        row = Row(norm, split, status=_status(len(good), len(group)), reasons=_reasons(group))
        for task in TASKS:
            for values, source, metric in (
                (row.ap, "results", "AP"),
                (row.ap50, "results", "AP50"),
                (row.ap75, "results", "AP75"),
                (row.ap_small, "results", "APs"),
                (row.ap_medium, "results", "APm"),
                (row.ap_large, "results", "APl"),
                (row.ap_precise, "results_precise_bn", "AP"),
                (row.ap_image_share, "results_image_share", "AP"),
            ):
                values[task] = spread_of(good, source, task, metric, asked)
            row.ap_of_class[task] = {
                name.removeprefix(OF_CLASS): spread_of(good, "results", task, name, asked)
                for name in classes[task]
            }
        for fact in ("sec_per_iter", "peak_memory_mb", "parameters", "flops"):
            setattr(row, fact, Spread.of([r.get(fact) for r in good]))
        row.iterations = next((r["iterations"] for r in good if r.get("iterations")), None)
        rows.append(row)
    fill_recovered(rows)
    fill_distances(rows)
    return rows


def _class_metrics(results: list[dict], task: str) -> list[str]:
    """Names of the metrics of single classes, in the order of the first run that has them."""
    found = ((result.get("results") or {}).get(task) or {} for result in results)
    return list(dict.fromkeys(name for one in found for name in one if name.startswith(OF_CLASS)))


def metrics_with_truth(results: Iterable[dict]) -> set[tuple[str, str]]:
    """Tasks and metrics that the data have objects for, as a number of any evaluation shows."""
    return {
        (task, metric)
        for result in results
        for source in EVALUATIONS
        for task, by_metric in (result.get(source) or {}).items()
        for metric, value in by_metric.items()
        if value is not None
    }


def spread_of(
    results: Iterable[dict], source: str, task: str, metric: str, asked: set[tuple[str, str]]
) -> Spread | None:
    """A number of finished runs: 0 for one that detects nothing.

    Args:
        source: one of `EVALUATIONS`.
        asked: what :func:`metrics_with_truth` finds in all runs on the same data.
    """
    nothing = 0.0 if (task, metric) in asked else None
    return Spread.of([_number(result.get(source), task, metric, nothing) for result in results])


def _number(results: dict | None, task: str, metric: str, nothing: float | None) -> float | None:
    """`nothing` where an evaluation found none; detectron2 then leaves out masks altogether."""
    if not results:
        return None  # there was no evaluation
    value = (results.get(task) or {}).get(metric)
    return nothing if value is None else value


def fill_recovered(rows: list[Row], task: str = "bbox") -> None:
    """Set what share of the small-batch loss each row recovers, where the rows for it are there.

    (AP - AP_BN) / (AP_reference - AP_BN): AP_BN is BN at the same split, the reference that of
    :func:`_sync_ap`. Both are the plain AP, also for `recovered_precise`, so that what better
    bookkeeping of running statistics gains is visible as a share of its own. A loss within
    `LOSS_IN_SPREADS` spreads over seeds (where there are several) is none, and has no share.
    """
    ap = {(row.norm, row.split): row.ap.get(task) for row in rows}
    for row in rows:
        if row.split.ranks == 1:
            continue
        small = ap.get(("BN", row.split))
        reference = _sync_ap(ap, row.split)
        if small is None or reference is None:
            continue
        loss = reference.mean - small.mean
        if loss <= LOSS_IN_SPREADS * max(small.std or 0.0, reference.std or 0.0):
            continue
        for name, own in (("recovered", row.ap), ("recovered_precise", row.ap_precise)):
            if own.get(task) is not None:
                setattr(row, name, (own[task].mean - small.mean) / loss)


def fill_distances(rows: list[Row]) -> None:
    """Set how far each row's plain AP is from SyncBN's and GN's at the same split.

    GN normalises every image for itself, so where it was not trained at that split, GN with the
    same total batch at another one serves as well.
    """
    for task in TASKS:
        ap = {(row.norm, row.split): row.ap.get(task) for row in rows}
        gn = [row for row in rows if row.norm == "GN" and row.ap.get(task)]
        for row in rows:
            if not row.ap.get(task):
                continue
            same = [g for g in gn if g.split.total == row.split.total]
            same.sort(key=lambda g: g.split != row.split)
            if same and row.norm != "GN":
                row.to_gn[task] = row.ap[task].mean - same[0].ap[task].mean
            sync = ap.get(("SyncBN", row.split))
            if sync and row.norm != "SyncBN":
                row.to_sync[task] = row.ap[task].mean - sync.mean


def _sync_ap(ap: dict[tuple[str, Split], Spread | None], split: Split) -> Spread | None:
    """AP of SyncBN at a split or, equal to it in what is normalised, of BN with the same total
    batch on one rank."""
    return ap.get(("SyncBN", split)) or ap.get(("BN", Split(1, split.total)))


def _status(finished: int, runs: int) -> str:
    if finished < runs:
        return f"{finished} of {runs} finished"
    return "finished" if runs == 1 else f"{finished} finished"


def reason_of(result: dict) -> str:
    """Why a run did not finish: its status, and its message where that says more."""
    status, message = str(result.get("status")), result.get("message") or "no message"
    return message if message.startswith(status) else f"{status}: {message}"


def _reasons(group: list[dict]) -> list[str]:
    return [reason_of(result) for result in group if result.get("status") != "finished"]
