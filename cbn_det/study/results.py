"""Reads what runs leave behind and turns it into rows: mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from cbn_det.study.plan import Split

TASKS = ("bbox", "segm")


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

    AP values are on the 0-100 scale. `reasons` are those of the runs that did not finish.
    `recovered` and `recovered_precise` are shares (1.0 = all) of the small-batch loss; see
    `fill_recovered`. `to_gn` is the box AP above GN's (below it: negative), see `fill_distances`.
    """

    norm: str
    split: Split
    status: str
    reasons: list[str] = field(default_factory=list)
    ap: dict[str, Spread | None] = field(default_factory=dict)
    ap50: dict[str, Spread | None] = field(default_factory=dict)
    ap_precise: dict[str, Spread | None] = field(default_factory=dict)
    sec_per_iter: Spread | None = None
    peak_memory_mb: Spread | None = None
    iterations: int | None = None
    recovered: float | None = None
    recovered_precise: float | None = None
    to_gn: float | None = None


def read_result(folder: Path) -> dict | None:
    """The content of a run's result.json, or None where it is missing or cut short."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) else None


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.json so far; a half-written last line is left out.

    A run that was resumed logs some iterations twice: the later line counts.
    """
    try:
        text = (folder / "metrics.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines: dict[int, dict] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "iteration" in entry:
            lines[entry["iteration"]] = lines.get(entry["iteration"], {}) | entry
    return [lines[iteration] for iteration in sorted(lines)]


def make_rows(results: list[tuple[str, Split, dict]]) -> list[Row]:
    """Group (norm, split, result) of single runs into rows, in the order of first appearance.

    AP, times and memory are over finished runs only; the others are counted in `status`.
    """
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
                (row.ap_precise, "results_precise_bn", "AP"),
            ):
                numbers = [((r.get(source) or {}).get(task) or {}).get(metric) for r in good]
                values[task] = Spread.of(numbers)
        row.sec_per_iter = Spread.of([r.get("sec_per_iter") for r in good])
        row.peak_memory_mb = Spread.of([r.get("peak_memory_mb") for r in good])
        row.iterations = next((r["iterations"] for r in good if r.get("iterations")), None)
        rows.append(row)
    fill_recovered(rows)
    fill_distances(rows)
    return rows


def fill_recovered(rows: list[Row], task: str = "bbox") -> None:
    """Set what share of the small-batch loss each row recovers, where the rows for it are there.

    (AP - AP_BN) / (AP_reference - AP_BN): AP_BN is BN at the same split, the reference SyncBN at
    the same split or, equal to it in what is normalised, BN with the same total batch on one rank.
    Both are the plain AP, also for `recovered_precise`, so that what better bookkeeping of running
    statistics gains is visible as a share of its own. No loss (reference not above BN): left out.
    """
    ap = {(row.norm, row.split): row.ap.get(task) for row in rows}
    for row in rows:
        if row.split.ranks == 1:
            continue
        small = ap.get(("BN", row.split))
        reference = ap.get(("SyncBN", row.split)) or ap.get(("BN", Split(1, row.split.total)))
        if small is None or reference is None or reference.mean <= small.mean:
            continue
        loss = reference.mean - small.mean
        for name, own in (("recovered", row.ap), ("recovered_precise", row.ap_precise)):
            if own.get(task) is not None:
                setattr(row, name, (own[task].mean - small.mean) / loss)


def fill_distances(rows: list[Row], task: str = "bbox") -> None:
    """Set how far each row's plain AP is from GN's at the same split.

    GN normalises every image for itself, so where it was not trained at that split, GN with the
    same total batch at another one serves as well.
    """
    gn = [row for row in rows if row.norm == "GN" and row.ap.get(task)]
    for row in rows:
        same = [g for g in gn if g.split.total == row.split.total]
        same.sort(key=lambda g: g.split != row.split)
        if same and row.ap.get(task) and row.norm != "GN":
            row.to_gn = row.ap[task].mean - same[0].ap[task].mean


def _status(finished: int, runs: int) -> str:
    if finished < runs:
        return f"{finished} of {runs} finished"
    return "finished" if runs == 1 else f"{finished} finished"


def _reasons(group: list[dict]) -> list[str]:
    bad = [result for result in group if result.get("status") != "finished"]
    return [f"{r.get('status')}: {r.get('message') or 'no message'}" for r in bad]
