"""The tables of a comparison, and what a reader has to know to read them.

Rows of one table share world size and images per GPU, and so the total batch; the overview has a
column for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from cbn_det.study.plan import Run, Split
from cbn_det.study.results import TASKS, Row, Spread

TASK_NAMES = {"bbox": "", "segm": "mask "}


@dataclass(frozen=True)
class Table:
    """A table as text: `lines` are column -> cell, one for each of `rows`.

    One with a column "status" is where to say why runs did not finish.
    """

    heading: str
    rows: list[Row]
    lines: list[dict[str, str]]


def by_total_batch(rows: list[Row]) -> dict[int, list[Row]]:
    """Rows grouped by total SGD batch: AP of different total batches is not comparable."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.split.total, []).append(row)
    return dict(sorted(groups.items()))


def by_split(rows: list[Row]) -> dict[Split, list[Row]]:
    """Rows grouped by split, in the order of total batch, then of world size."""
    groups: dict[Split, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.split, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0].total, item[0].ranks)))


def heading(split: Split, rows: list[Row]) -> str:
    """What the rows of one table have in common."""
    lengths = sorted({row.iterations for row in rows if row.iterations})
    length = f", {' / '.join(map(str, lengths))} iterations" if lengths else ""
    return f"Total SGD batch {split.total} ({in_words(split)}){length}"


def in_words(split: Split) -> str:
    """E.g. "world size 8, 2 images per GPU"."""
    images = f"{split.images} image{'s' * (split.images > 1)} per GPU"
    return f"world size {split.ranks}, {images}"


def make_tables(rows: list[Row]) -> list[Table]:
    """An overview where there are several splits; then for each split accuracy and cost."""
    groups = by_split(rows)
    found = [overview(rows)] if len(groups) > 1 else []
    for split, group in groups.items():
        for task in tasks_of(group):
            what = "" if task == "bbox" else ": mask AP"
            found.append(Table(heading(split, group) + what, group, accuracy(group, task)))
        if any(row.sec_per_iter or row.parameters for row in group):
            found.append(Table(heading(split, group) + ": cost", group, cost(group)))
    return found


def tasks_of(rows: list[Row]) -> list[str]:
    """What any of the rows has an AP of; boxes where none has any."""
    return [task for task in TASKS if any(row.ap.get(task) for row in rows)] or ["bbox"]


def overview(rows: list[Row]) -> Table:
    """AP of each norm with a column for each split. A line's row is the norm's first."""
    splits = list(by_split(rows))
    known = {(row.norm, row.split): row for row in rows}
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.norm, row)
    lines = []
    for row in first.values():
        line = {"norm": row.norm}
        for task in tasks_of(rows):
            for split in splits:
                column = f"{TASK_NAMES[task]}AP, {split.ranks} x {split.images}"
                cell = known.get((row.norm, split))
                line[column] = _ap(cell.ap.get(task)) if cell else ""
        lines.append(line)
    return Table("AP by world size x images per GPU", list(first.values()), lines)


def accuracy(rows: list[Row], task: str) -> list[dict[str, str]]:
    """AP of one task, the lines of one table.

    Why a run did not finish is no part of them: it is as long as it has to be.
    """
    name = TASK_NAMES[task]
    shares = task == "bbox" and any(row.recovered is not None for row in rows)
    lines = []
    for row in rows:
        line = {
            "norm": row.norm,
            f"{name}AP": _ap(row.ap.get(task)),
            f"{name}AP50": _ap(row.ap50.get(task)),
            f"{name}AP75": _ap(row.ap75.get(task)),
            f"{name}APs": _ap(row.ap_small.get(task)),
            f"{name}APm": _ap(row.ap_medium.get(task)),
            f"{name}APl": _ap(row.ap_large.get(task)),
            f"{name}AP, PreciseBN": _ap(row.ap_precise.get(task)),
        }
        if any(row.ap_image_share.get(task) for row in rows):
            line[f"{name}AP, image share"] = _ap(row.ap_image_share.get(task))
        if any(row.to_sync for row in rows):
            line["AP - SyncBN"] = _signed(row.to_sync.get(task))
        if any(row.to_gn for row in rows):
            line["AP - GN"] = _signed(row.to_gn.get(task))
        if shares:
            line["recovered"] = _percent(row.recovered)
            line["recovered, PreciseBN"] = _percent(row.recovered_precise)
        if task == tasks_of(rows)[0]:
            line["status"] = row.status
        lines.append(line)
    return lines


def of_classes(rows: list[Row]) -> list[Table]:
    """AP of each class, a column a norm, for each split and task; none for a single class."""
    found = []
    for split, group in by_split(rows).items():
        for task in tasks_of(group):
            lines = [
                {"class": name} | {row.norm: _ap(row.ap_of_class[task][name]) for row in group}
                for name in group[0].ap_of_class[task]  # all rows have the same
            ]
            what = f"{TASK_NAMES[task]}AP of each class"
            if lines:
                found.append(Table(f"{heading(split, group)}: {what}", group, lines))
    return found


def cost(rows: list[Row]) -> list[dict[str, str]]:
    """What training and the model take, the lines of one table."""
    return [
        {
            "norm": row.norm,
            "s/iter": _scaled(row.sec_per_iter, 1, ".3f"),
            "peak MB": _scaled(row.peak_memory_mb, 1, ".0f"),
            "parameters, M": _scaled(row.parameters, 1e6, ".2f"),
            "GFLOPs": _scaled(row.flops, 1e9, ".2f"),
        }
        for row in rows
    ]


def notes(rows: list[Row], config_iterations: int | None = None, expected: str = "") -> list[str]:
    """What the numbers mean and what they do not say, a sentence each.

    Args:
        rows: of all tables.
        config_iterations: the config's own length of training, where the runs were given another.
        expected: what short runs reach.
    """
    said = ["AP on the 0-100 scale. '-': no such number."]
    if any("finished" in row.status and row.iterations and not row.ap.get("bbox") for row in rows):
        said.append("A finished run without AP detected nothing, or was not evaluated.")
    spreads = [row.ap.get("bbox") for row in rows if row.ap.get("bbox")]
    if any(spread.n > 1 for spread in spreads):
        said.append("mean ± sample standard deviation over the seeds that finished.")
    else:
        said.append("One seed: small differences mean nothing.")
    trained = min((row.iterations for row in rows if row.iterations), default=None)
    if trained and config_iterations and trained < config_iterations:
        said.append(
            f"Short runs, {trained} of the config's {config_iterations} iterations: they show how "
            "training starts, and the order may change later."
        )
        said += [expected] if expected else []
    if any(row.ap_precise.get("bbox") for row in rows):
        said.append("PreciseBN: the same weights, BatchNorm statistics recomputed after training.")
    if any(row.ap_image_share.get("bbox") for row in rows):
        said.append(
            "image share: the same weights; each test image has its share in the statistics that "
            "normalise it (--image-share). All other columns are of the plain evaluation."
        )
    if any(row.recovered is not None for row in rows):
        said.append(
            "recovered: (AP - AP of BN at this split) / (AP of SyncBN - AP of BN at this split); "
            "BN on one rank stands in for SyncBN where that was not trained. Left out where the "
            "loss is within twice the spread."
        )
    if any(row.to_sync for row in rows):
        said.append("AP - SyncBN: to SyncBN at the same world size and images.")
    if any(row.to_gn for row in rows):
        said.append("AP - GN: to GN at the same total batch.")
    if any(row.flops for row in rows):
        said.append("GFLOPs: billions of multiply-adds for one test image (fvcore).")
    if len(by_split(rows)) > 1:
        said.append(
            "Numbers of different world size or images per GPU stand in tables or columns of their "
            "own. Those of different total batch differ in more than the norm's batch: they are "
            "not comparable with each other."
        )
    return said


def machines(results: list[tuple[Run, dict]]) -> list[str]:
    """What the runs ran on, each machine once: "NAME, N threads a process"."""
    found = []
    for machine in filter(None, (result.get("machine") for _, result in results)):
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        found.append(f"{name}, {machine['threads']} threads a process")
    return list(dict.fromkeys(found))


def versions(results: list[tuple[Run, dict]]) -> list[str]:
    """The versions that the runs ran with, each set once: "python 3.11, torch 2.14"."""
    found = filter(None, (result.get("versions") for _, result in results))
    return list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in f.items()) for f in found))


def provenance(results: list[tuple[Run, dict]]) -> str:
    """One line: seeds, machine and versions of the runs, "" if none told."""
    seeds = sorted({run.seed for run, _ in results if run.seed is not None})
    parts = [f"seeds {' '.join(map(str, seeds))}"] if seeds else []
    return "; ".join([*parts, *machines(results), *versions(results)])


def text_report(
    rows: list[Row],
    results: list[tuple[Run, dict]],
    title: str,
    style: str = "simple",
    config_iterations: int | None = None,
    expected: str = "",
) -> str:
    """All tables as text; `style` is a format of tabulate."""
    parts = [title]
    for table in make_tables(rows):
        lines = table.lines
        if "status" in lines[0]:
            with_reasons = ["; ".join([row.status, *row.reasons]) for row in table.rows]
            lines = [
                line | {"status": status} for line, status in zip(lines, with_reasons, strict=True)
            ]
        text = tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)
        parts += [table.heading, text]
    below, made = notes(rows, config_iterations, expected), provenance(results)
    if made:
        below.append(f"Made with: {made}.")
    return "\n\n".join([*parts, "\n".join(below)]) + "\n"


def _ap(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.1f}" + (f" ± {spread.std:.1f}" if spread.std is not None else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _scaled(spread: Spread | None, unit: float, spec: str) -> str:
    return "-" if spread is None else format(spread.mean / unit, spec)
