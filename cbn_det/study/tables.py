"""The tables of a comparison, and what a reader has to know to read them.

Rows of one table share world size and images per GPU, and so the total batch; the overview has a
column for each. A column in which no row has a number is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from .plan import Split
from .results import AP_COLUMNS, OF_CLASS, TASKS, Measured, Spread

TASK_NAMES = {"bbox": "", "segm": "mask "}
# What :func:`~cbn_det.study.results.fill_gains` sets -> its unit and how it is written.
GAINS = {
    "AP - SyncBN": (1, "{:+.1f}"),
    "AP - GN": (1, "{:+.1f}"),
    "recovered": (0.01, "{:.0f} %"),
    "recovered, PreciseBN": (0.01, "{:.0f} %"),
}
# A column -> key of a result.json, its unit and how it is written.
COSTS = {
    "s/iter": ("sec_per_iter", 1, ".3f"),
    "peak MB": ("peak_memory_mb", 1, ".0f"),
    "parameters, M": ("parameters", 1e6, ".2f"),
    "GFLOPs": ("flops", 1e9, ".2f"),
}
# Columns that have to be explained where they are shown.
EXPLAINED = {
    "AP, PreciseBN": (
        "PreciseBN: the same weights, BatchNorm statistics recomputed after training."
    ),
    "AP, image share": (
        "image share: the same weights; each test image has its share in the statistics that "
        "normalise it (--image-share). All other columns are of the plain evaluation."
    ),
    "recovered": (
        "recovered: (AP - AP of BN at this split) / (AP of SyncBN - AP of BN at this split); "
        "BN on one rank stands in for SyncBN where that was not trained. Left out where the "
        "loss is within twice the spread."
    ),
    "AP - SyncBN": "AP - SyncBN: to SyncBN at the same world size and images.",
    "AP - GN": "AP - GN: to GN at the same total batch.",
    "GFLOPs": "GFLOPs: billions of multiply-adds for one test image (fvcore).",
}


@dataclass(frozen=True)
class Grid:
    """Cells to be printed: `lines` are column -> text, one for each of `rows`.

    One with a column "status" is where to say why runs did not finish.
    """

    heading: str
    rows: list[Measured]
    lines: list[dict[str, str]]


def by_split(rows: list[Measured]) -> dict[Split, list[Measured]]:
    """Rows grouped by split, in the order of total batch, then of world size."""
    groups: dict[Split, list[Measured]] = {}
    for row in sorted(rows, key=lambda row: (row.split.total, row.split.ranks)):
        groups.setdefault(row.split, []).append(row)
    return groups


def heading(split: Split, rows: list[Measured]) -> str:
    """What the rows of one table have in common."""
    lengths = sorted({row.iterations for row in rows if row.iterations})
    length = f", {' / '.join(map(str, lengths))} iterations" if lengths else ""
    return f"Total SGD batch {split.total} ({in_words(split)}){length}"


def in_words(split: Split) -> str:
    """E.g. "world size 8, 2 images per GPU"."""
    images = f"{split.images} image{'s' * (split.images > 1)} per GPU"
    return f"world size {split.ranks}, {images}"


def make_tables(rows: list[Measured]) -> list[Grid]:
    """An overview where there are several splits; then for each split accuracy and cost."""
    groups = by_split(rows)
    found = [overview(rows)] if len(groups) > 1 else []
    for split, group in groups.items():
        for task in tasks_of(group):
            what = "" if task == "bbox" else ": mask AP"
            found.append(Grid(heading(split, group) + what, group, accuracy(group, task)))
        if len((lines := cost(group))[0]) > 1:
            found.append(Grid(heading(split, group) + ": cost", group, lines))
    return found


def tasks_of(rows: list[Measured]) -> list[str]:
    """What any of the rows has an AP of; boxes where none has any."""
    return [task for task in TASKS if any(row.ap(task) for row in rows)] or ["bbox"]


def overview(rows: list[Measured]) -> Grid:
    """AP of each norm with a column for each split. A line's row is the norm's first."""
    known = {(row.norm, row.split): row for row in rows}
    first: dict[str, Measured] = {}
    for row in rows:
        first.setdefault(row.norm, row)
    lines = []
    for norm in first:
        line = {"norm": norm}
        for task in tasks_of(rows):
            for split in by_split(rows):
                row = known.get((norm, split))
                column = f"{TASK_NAMES[task]}AP, {split.ranks} x {split.images}"
                line[column] = cell(row.ap(task)) if row else ""
        lines.append(line)
    return Grid("AP by world size x images per GPU", list(first.values()), lines)


def accuracy(rows: list[Measured], task: str) -> list[dict[str, str]]:
    """AP of one task, the lines of one table.

    Why a run did not finish is no part of them: it is as long as it has to be.
    """
    name = TASK_NAMES[task]
    lines = []
    for row in rows:
        line = {"norm": row.norm, f"{name}AP": "-"}
        for column in AP_COLUMNS:
            line[f"{name}{column}"] = cell(row.ap(task, column))
        for column, (unit, form) in GAINS.items():
            gain = row.gains.get(task, {}).get(column)
            line[column] = "-" if gain is None else form.format(gain / unit)
        if task == tasks_of(rows)[0]:
            line["status"] = row.status
        lines.append(line)
    return _with_numbers(lines, f"{name}AP")


def of_classes(rows: list[Measured]) -> list[Grid]:
    """AP of each class, a column a norm, for each split and task; none for a single class."""
    found = []
    for split, group in by_split(rows).items():
        for task in tasks_of(group):
            evaluated = [one["results"].get(task) or {} for row in rows for one in row.finished]
            metrics = dict.fromkeys(m for one in evaluated for m in one if m.startswith(OF_CLASS))
            lines = [
                {"class": metric.removeprefix(OF_CLASS)}
                | {row.norm: cell(row.ap(task, metric)) for row in group}
                for metric in metrics
            ]
            what = f"{TASK_NAMES[task]}AP of each class"
            if lines:
                found.append(Grid(f"{heading(split, group)}: {what}", group, lines))
    return found


def cost(rows: list[Measured]) -> list[dict[str, str]]:
    """What training and the model take, the lines of one table."""
    means = [{key: row.cost(key) for key, *_ in COSTS.values()} for row in rows]
    lines = [{"norm": row.norm} | cost_cells(mean) for row, mean in zip(rows, means, strict=True)]
    return _with_numbers(lines)


def cost_cells(facts: Mapping[str, Any]) -> dict[str, str]:
    """Cells of the columns of cost, by their heading.

    Args:
        facts: numbers by the keys of `COSTS`, such as a result.json has.
    """
    return {
        column: "-" if facts.get(key) is None else format(facts[key] / unit, spec)
        for column, (key, unit, spec) in COSTS.items()
    }


def _with_numbers(lines: list[dict[str, str]], *always: str) -> list[dict[str, str]]:
    """Without the columns in which no line has a number."""
    kept = [name for name in lines[0] if name in always or any(line[name] != "-" for line in lines)]
    return [{name: line[name] for name in kept} for line in lines]


def cell(spread: Spread | None) -> str:
    return "-" if spread is None else str(spread)


def notes(
    rows: list[Measured], config_iterations: int | None = None, expected: str = ""
) -> list[str]:
    """What the numbers mean and what they do not say, a sentence each.

    Args:
        rows: of all tables.
        config_iterations: the config's own length of training, where the runs were given another.
        expected: what short runs reach.
    """
    said = ["AP on the 0-100 scale. '-': no such number."]
    if any("finished" in row.status and row.iterations and not row.ap() for row in rows):
        said.append("A finished run without AP detected nothing, or was not evaluated.")
    if any(spread.n > 1 for row in rows if (spread := row.ap())):
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
    shown = {column for table in make_tables(rows) for column in table.lines[0]}
    said += [text for column, text in EXPLAINED.items() if column in shown]
    if len(by_split(rows)) > 1:
        said.append(
            "Numbers of different world size or images per GPU stand in tables or columns of their "
            "own. Those of different total batch differ in more than the norm's batch: they are "
            "not comparable with each other."
        )
    return said


def machines(results: list[dict]) -> list[str]:
    """What the runs ran on, each machine once: "NAME, N threads a process"."""
    found = []
    for machine in filter(None, (result.get("machine") for result in results)):
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        found.append(f"{name}, {machine['threads']} threads a process")
    return list(dict.fromkeys(found))


def versions(results: list[dict]) -> list[str]:
    """The versions that the runs ran with, each set once: "python 3.11, torch 2.14"."""
    found = filter(None, (result.get("versions") for result in results))
    return list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in f.items()) for f in found))


def text_report(
    rows: list[Measured],
    results: list[dict],
    title: str,
    seeds: Sequence[int],
    style: str = "simple",
    config_iterations: int | None = None,
    expected: str = "",
) -> str:
    """All tables as text, and below them seeds, machine and versions of the runs; `style` is a
    format of tabulate, and for the rest see :func:`notes`."""
    parts = [title]
    for table in make_tables(rows):
        lines = table.lines
        if "status" in lines[0]:
            lines = [
                line | {"status": "; ".join([row.status, *row.reasons])}
                for line, row in zip(lines, table.rows, strict=True)
            ]
        text = tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)
        parts += [table.heading, text]
    made = [f"seeds {' '.join(map(str, sorted(seeds)))}", *machines(results), *versions(results)]
    below = [*notes(rows, config_iterations, expected), f"Made with: {'; '.join(made)}."]
    return "\n\n".join([*parts, "\n".join(below)]) + "\n"
