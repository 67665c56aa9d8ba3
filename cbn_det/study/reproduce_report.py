"""The text of a reproduced table: published, measured, and the differences."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from cbn_det.shell import join
from cbn_det.study.published import Elsewhere, Published, Source, Table, Values
from cbn_det.study.reproduce import (
    BASELINES,
    REMEMBERING,
    Measured,
    Reproduction,
    Row,
    differences,
    means,
)
from cbn_det.study.results import Spread
from cbn_det.study.tables import machines, versions

TASK_NAMES = {"bbox": "box", "segm": "mask"}
BASELINE_NAMES = {"none": "none", "bn": "BN", "syncbn": "SyncBN", "gn": "GN"}
NOT_RUN = "not run yet"

LEGEND = (
    "AP on COCO val2017, 0-100. A number in brackets is published, one without is measured here; "
    "'-': there is no such number. Measured: mean ± sample standard deviation over seeds, where "
    "there are several. PreciseBN: the same weights, BatchNorm statistics recomputed after "
    "training."
)


def overview(reproduction: Reproduction, tables: Sequence[Table]) -> str:
    """One line a table."""
    lines = []
    for table in tables:
        rows = reproduction.rows(table)
        done = sum(bool(one.results) for one in reproduction.measured(table).values())
        lines.append(
            {
                "table": table.name,
                "rows": len(rows),
                "published": sum(row.published is not None for row in rows),
                "measured": done,
                "what": table.title,
            }
        )
    return tabulate(lines, headers="keys", tablefmt="simple") + "\n"


def table_text(reproduction: Reproduction, table: Table, rows: Sequence[Row]) -> str:
    """A table with what has been measured so far, for a terminal.

    Args:
        rows: of :meth:`Reproduction.rows`.
    """
    known = reproduction.measured(table)
    measured = {row.name: known[row.name] for row in rows}
    parts = [table.title]
    if reproduction.is_changed:
        words = [*(["--iters", str(reproduction.iterations)] if reproduction.iterations else [])]
        words += [
            word for triple in reproduction.datasets for word in ("--coco-dataset", triple[0])
        ]
        words += reproduction.overrides
        parts.append(
            f"Changed by {join(words)}: these are not the table's rows, and no differences "
            "to published numbers are given."
        )
    for task in rows[0].tasks:
        lines = [_line(row, measured[row.name], task, reproduction.is_changed) for row in rows]
        if any(row.published for row in rows):
            for line, row in zip(lines, rows, strict=True):
                line["published in"] = _place(row.published)
        parts.append(_text(lines))
        gains = _gains(rows, measured, task)
        if gains:
            parts += [f"Differences between norms, {TASK_NAMES[task]} AP:", _text(gains)]
    if table.elsewhere:
        lines = [_elsewhere(entry, rows[0].tasks) for entry in table.elsewhere]
        parts += ["Published elsewhere, for orientation:", _text(lines)]
    remarks = [*table.remarks, *_remarks(rows, measured)]
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    sources = _sources(table, rows)
    if sources:
        names = (f"{source.name}, {source.url}" for source in sources)
        parts.append("Sources: " + "; ".join(names) + ".")
    return "\n\n".join(parts) + "\n"


def document(reproduction: Reproduction, tables: Sequence[Table], command: str) -> str:
    """Several tables as one page of Markdown: rows with a number, published or measured."""
    measured = sum(
        bool(one.results) for table in tables for one in reproduction.measured(table).values()
    )
    parts = [
        "# Model zoo",
        f"<!-- written by {command}; do not edit -->",
        "AP on COCO val2017, 0-100. A number in brackets is published, at the address beside it. "
        "One without brackets is measured here: mean ± sample standard deviation over seeds, where "
        f"there are several. Rows measured here so far: {measured}.",
        "A row is `configs/coco/TABLE/ROW.yaml`, which `python tools/reproduce.py TABLE --rows ROW "
        "--run` trains. Rows without a number are not listed; `python tools/reproduce.py TABLE` "
        "prints them, with AP50, AP75 and the differences between norms.",
    ]
    nothing = []
    for table in tables:
        known = reproduction.measured(table)
        rows = [row for row in reproduction.rows(table) if row.published or known[row.name].results]
        if not (rows or table.elsewhere):
            nothing.append(table)
            continue
        parts += [f"## {table.title}", f"`{table.name}`"]
        if rows:
            parts.append(_text([_zoo_line(row, known[row.name]) for row in rows], "github"))
        if table.elsewhere:
            tasks = reproduction.rows(table)[0].tasks
            lines = [_elsewhere(entry, tasks, markdown=True) for entry in table.elsewhere]
            parts += ["Published elsewhere, for orientation:", _text(lines, "github")]
        remarks = [*table.remarks, *_remarks(rows, known)]
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    if nothing:
        lines = [{"table": f"`{table.name}`", "what": table.title} for table in nothing]
        parts += ["## Tables without a number", _text(lines, "github")]
    return "\n\n".join(filter(None, parts)) + "\n"


def _zoo_line(row: Row, measured: Measured) -> dict[str, str]:
    line = {"row": row.name, "GPUs x images": _splits(row, measured)}
    for task in row.tasks:
        own = _state(measured.ap[task]["AP"], measured) if measured.results else ""
        published = row.published.values.get(task, {}).get("AP") if row.published else None
        cells = [own, _number(published) if published is not None else ""]
        line[f"{TASK_NAMES[task]} AP"] = " ".join(filter(None, cells))
    return {**line, "published in": _place(row.published, markdown=True)}


def _line(row: Row, measured: Measured, task: str, changed: bool) -> dict[str, str]:
    name = TASK_NAMES[task]
    published = row.published.values.get(task, {}) if row.published else {}
    own = measured.ap[task]
    return {
        "row": row.name,
        "GPUs x images": _splits(row, measured),
        f"published {name} AP": _number(published.get("AP")),
        f"measured {name} AP": _state(own["AP"], measured),
        "difference": "-" if changed else _gap(own["AP"], published.get("AP")),
        "AP, PreciseBN": _spread(measured.ap_precise[task]),
        "AP50": _both(own["AP50"], published.get("AP50")),
        "AP75": _both(own["AP75"], published.get("AP75")),
    }


def _gains(rows: Sequence[Row], measured: dict[str, Measured], task: str) -> list[dict[str, str]]:
    """Lines with the differences to each baseline, measured and published."""
    ours = {row.name: means(measured[row.name]) for row in rows}
    theirs = {row.name: row.published.values if row.published else None for row in rows}
    lines: dict[str, dict[str, str]] = {row.name: {"row": row.name} for row in rows}
    for baseline in BASELINES:
        own, published = differences(ours, baseline, task), differences(theirs, baseline, task)
        if not own and not published:
            continue
        for name, line in lines.items():
            cell = [f"{own[name]:+.1f}"] if name in own else []
            cell += [f"({published[name]:+.1f})"] if name in published else []
            line[f"AP - AP of {BASELINE_NAMES[baseline]}"] = " ".join(cell) or "-"
    return [line for line in lines.values() if set(list(line.values())[1:]) - {"-"}]


def _elsewhere(entry: Elsewhere, tasks: Sequence[str], markdown: bool = False) -> dict[str, str]:
    values: Values = entry.published.values
    line = {"what": entry.what}
    for task in tasks:
        line[f"{TASK_NAMES[task]} AP"] = _number(values.get(task, {}).get("AP"))
    return {**line, "published in": _place(entry.published, markdown), "remark": entry.remark}


def _remarks(rows: Sequence[Row], measured: dict[str, Measured]) -> list[str]:
    """What the runs say about themselves."""
    found = []
    for row in rows:
        for gpus, images, accumulated in measured[row.name].splits:
            if row.norm == "syncbn" and gpus * images != row.gpus * row.images:
                found.append(
                    f"{row.name}: run with SyncBN over {gpus * images} images, its mini-batch is "
                    f"{row.gpus * row.images}"
                )
            if row.norm in REMEMBERING and accumulated > 1:
                found.append(
                    f"{row.name}: run with what the norm remembers of a step from {accumulated} "
                    "mini-batches, in its config from one"
                )
            if gpus * accumulated != row.gpus:
                found.append(
                    f"{row.name}: run with {gpus * images * accumulated} images a step, its config "
                    f"has {row.gpus * row.images}"
                )
        found += [f"{row.name}: {state}" for state in measured[row.name].states]
    results = [(None, result) for one in measured.values() for result in one.results]
    made = [*machines(results), *versions(results)]
    return [*found, f"Measured with: {'; '.join(made)}"] if made else found


def _sources(table: Table, rows: Sequence[Row]) -> list[Source]:
    found = [row.published.source for row in rows if row.published]
    return list(dict.fromkeys([*found, *(entry.published.source for entry in table.elsewhere)]))


def _place(published: Published | None, markdown: bool = False) -> str:
    if published is None:
        return "-"
    text = f"{published.source.name}, {published.place}"
    line = published.place.removeprefix("line ")
    anchor = f"?plain=1#L{line}" if line.isdigit() else ""
    return f"[{text}]({published.source.url}{anchor})" if markdown else text


def _splits(row: Row, measured: Measured) -> str:
    if not measured.splits:
        return f"({row.gpus}x{row.images})"
    return ", ".join(
        f"{gpus}x{images}" + (f", {accumulated} accumulated" if accumulated > 1 else "")
        for gpus, images, accumulated in measured.splits
    )


def _state(own: Spread | None, measured: Measured) -> str:
    if own is not None:
        return _spread(own)
    if measured.states:
        return ", ".join(dict.fromkeys(state.partition(":")[0] for state in measured.states))
    return "no AP" if measured.results else NOT_RUN


def _gap(own: Spread | None, published: float | None) -> str:
    return "-" if own is None or published is None else f"{own.mean - published:+.1f}"


def _both(own: Spread | None, published: float | None) -> str:
    cells = [f"{own.mean:.1f}"] if own is not None else []
    cells += [_number(published)] if published is not None else []
    return " ".join(cells) or "-"


def _number(value: float | None) -> str:
    """As printed: with one decimal place, or with two where the source has them."""
    if value is None:
        return "-"
    text = f"{value:.2f}"
    return f"({text[:-1] if text.endswith('0') else text})"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.1f}" + (f" ± {spread.std:.1f}" if spread.std is not None else "")


def _text(lines: list[dict[str, str]], style: str = "simple") -> str:
    return tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)
