"""The text of a reproduced table: published, measured, and the differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate

from ..cli import join
from .published import CHECKS, TABLES, Check, Published, Table
from .reproduce import BASELINES, Reproduction, Row, layouts
from .results import Measured, Spread
from .tables import cell, machines, versions

TASK_NAMES = {"bbox": "box", "segm": "mask"}
NOT_RUN = "not run yet"
PRECISE = "AP, PreciseBN"

LEGEND = (
    "AP on COCO val2017, 0-100. A number in brackets is published, one without is measured here; "
    "'-': there is no such number. Measured: mean ± sample standard deviation over seeds, where "
    "there are several. PreciseBN: the same weights, BatchNorm statistics recomputed after "
    "training."
)
_CHECKS = "Checks, to pass before any other row is believed: AP with PreciseBN as published."


def checks_text(reproduction: Reproduction) -> str:
    """Whether the rows come out here that others have published."""
    lines = [f"- {_checked(reproduction, check)}" for check in CHECKS]
    return "\n".join([_CHECKS, "", *lines]) + "\n"


def _checked(reproduction: Reproduction, check: Check) -> str:
    # of the row itself, whatever else is tried out
    plain = replace(reproduction, iterations=None, datasets=[], overrides=[])
    table = TABLES[check.table]
    (row,) = plain.rows(table, [check.row])
    measured = plain.measured(table)[check.row]
    found = {task: measured.ap(task, PRECISE) for task in check.expected}
    wanted = ", ".join(
        f"{TASK_NAMES[task]} AP {ap} ± {within}" for task, (ap, within) in check.expected.items()
    )
    departures = [text for layout in layouts(measured) for text in row.departures(*layout)]
    if not measured.finished:
        outcome = _state(None, measured)
    elif None in found.values():
        outcome = "NOT CHECKED, its runs were not evaluated with PreciseBN"
    elif departures:
        outcome = f"NOT CHECKED, {departures[0]}"
    else:
        missed = [
            t for t, (ap, within) in check.expected.items() if abs(found[t].mean - ap) > within
        ]
        numbers = ", ".join(f"{TASK_NAMES[task]} AP {cell(ap)}" for task, ap in found.items())
        outcome = f"{'FAILED' if missed else 'passed'}, {numbers}"
    return f"{check.table} {check.row}, {wanted}: {outcome}"


def overview(reproduction: Reproduction, tables: Sequence[Table]) -> str:
    """One line a table."""
    lines = []
    for table in tables:
        rows = reproduction.rows(table)
        done = sum(bool(one.finished) for one in reproduction.measured(table).values())
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
    measured = reproduction.measured(table)
    parts = [table.title]
    if reproduction.is_changed:
        words = ["--iters", str(reproduction.iterations)] if reproduction.iterations else []
        words += [word for name, *_ in reproduction.datasets for word in ("--coco-dataset", name)]
        parts.append(
            f"Changed by {join([*words, *reproduction.overrides])}: these are not the table's rows,"
            " and no differences to published numbers are given."
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
    parts += _elsewhere(table, rows[0].tasks)
    parts += _remarks(table, rows, measured)
    published = [*(row.published for row in rows if row.published), *table.elsewhere]
    if published:
        sources = dict.fromkeys(f"{one.source.name}, {one.source.url}" for one in published)
        parts.append(f"Sources: {'; '.join(sources)}.")
    return "\n\n".join(parts) + "\n"


def document(reproduction: Reproduction, tables: Sequence[Table], command: str) -> str:
    """Several tables as one page of Markdown: rows with a number, published or measured."""
    measured = {table.name: reproduction.measured(table) for table in tables}
    done = sum(bool(one.finished) for rows in measured.values() for one in rows.values())
    parts = [
        "# Model zoo",
        f"<!-- written by {command}; do not edit -->",
        "AP on COCO val2017, 0-100. A number in brackets is published, at the address beside it. "
        "One without brackets is measured here: mean ± sample standard deviation over seeds, where "
        f"there are several. Rows measured here so far: {done}.",
        "A row is `configs/coco/TABLE/ROW.yaml`, which `python tools/reproduce.py TABLE --rows ROW "
        "--run` trains. Rows without a number are not listed; `python tools/reproduce.py TABLE` "
        "prints them, with AP50, AP75 and the differences between norms.",
        checks_text(reproduction),
    ]
    nothing = []
    for table in tables:
        known, everything = measured[table.name], reproduction.rows(table)
        rows = [row for row in everything if row.published or known[row.name].finished]
        if not (rows or table.elsewhere):
            nothing.append({"table": f"`{table.name}`", "what": table.title})
            continue
        parts += [f"## {table.title}", f"`{table.name}`"]
        if rows:
            parts.append(_text([_zoo_line(row, known[row.name]) for row in rows], "github"))
        parts += _elsewhere(table, everything[0].tasks, "github")
        parts += _remarks(table, rows, known)
    if nothing:
        parts += ["## Tables without a number", _text(nothing, "github")]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def differences(ap: dict[str, float | None], baseline: str) -> dict[str, float]:
    """How far each row is from the row of the same images per GPU with another norm.

    Args:
        ap: by row name; None for rows without.
        baseline: a norm, in small letters.

    Returns:
        by row name; rows for which one of the two numbers is missing are left out, and the baseline
        itself.
    """
    found = {}
    for name, own in ap.items():
        norm, _, images = name.rpartition("_")
        other = ap.get(f"{baseline}_{images}")
        if norm != baseline and own is not None and other is not None:
            found[name] = own - other
    return found


def _gains(rows: Sequence[Row], measured: dict[str, Measured], task: str) -> list[dict[str, str]]:
    """Lines with the differences to each baseline, measured and published."""
    spreads = {row.name: measured[row.name].ap(task) for row in rows}
    ours = {name: None if spread is None else spread.mean for name, spread in spreads.items()}
    theirs = {row.name: row.published_ap(task) for row in rows}
    lines: dict[str, dict[str, str]] = {row.name: {"row": row.name} for row in rows}
    for baseline, known_as in BASELINES.items():
        own, published = differences(ours, baseline), differences(theirs, baseline)
        if not own and not published:
            continue
        for name, line in lines.items():
            cell = [f"{own[name]:+.1f}"] if name in own else []
            cell += [f"({published[name]:+.1f})"] if name in published else []
            line[f"AP - AP of {known_as}"] = " ".join(cell) or "-"
    return [line for line in lines.values() if set(list(line.values())[1:]) - {"-"}]


def _zoo_line(row: Row, measured: Measured) -> dict[str, str]:
    line = {"row": row.name, "GPUs x images": _splits(row, measured)}
    for task in row.tasks:
        own = _state(measured.ap(task), measured) if measured.finished else ""
        line[f"{TASK_NAMES[task]} AP"] = _both(own, row.published_ap(task))
    return {**line, "published in": _place(row.published, "github")}


def _line(row: Row, measured: Measured, task: str, changed: bool) -> dict[str, str]:
    name, own, published = TASK_NAMES[task], measured.ap(task), row.published_ap(task)
    precise = measured.ap(task, PRECISE)
    like = precise if row.published and row.published.precise_bn else own
    gap = None if changed or like is None or published is None else like.mean - published
    line = {
        "row": row.name,
        "GPUs x images": _splits(row, measured),
        f"published {name} AP": _number(published),
        f"measured {name} AP": _state(own, measured),
        "difference": "-" if gap is None else f"{gap:+.1f}",
        PRECISE: cell(precise),
    }
    for metric in ("AP50", "AP75"):
        own = measured.ap(task, metric)
        mean = "" if own is None else f"{own.mean:.1f}"
        line[metric] = _both(mean, row.published_ap(task, metric))
    return line


def _elsewhere(table: Table, tasks: Sequence[str], style: str = "simple") -> list[str]:
    lines = [
        {
            "what": one.what,
            **{f"{TASK_NAMES[t]} AP": _number(one.values.get(t, {}).get("AP")) for t in tasks},
            "published in": _place(one, style),
            "remark": one.remark,
        }
        for one in table.elsewhere
    ]
    return ["Published elsewhere, for orientation:", _text(lines, style)] if lines else []


def _remarks(table: Table, rows: Sequence[Row], measured: dict[str, Measured]) -> list[str]:
    """The table's, and what the runs say about themselves."""
    found = list(table.remarks)
    for row in rows:
        for layout in layouts(measured[row.name]):
            found += row.departures(*layout)
        found += [f"{row.name}: {reason}" for reason in measured[row.name].reasons]
    results = [result for row in rows for result in measured[row.name].finished]
    made = [*machines(results), *versions(results)]
    found += [f"Measured with: {'; '.join(made)}"] if made else []
    return ["\n".join(f"- {remark}" for remark in found)] if found else []


def _place(published: Published | None, style: str = "simple") -> str:
    if published is None:
        return "-"
    text = f"{published.source.name}, {published.place}"
    if style != "github":
        return text
    lines = re.fullmatch(r"lines? (\d+)(?:, (\d+))?", published.place)
    anchor = "-".join(f"L{line}" for line in lines.groups() if line) if lines else ""
    return f"[{text}]({published.source.url}{f'?plain=1#{anchor}' if anchor else ''})"


def _splits(row: Row, measured: Measured) -> str:
    if not measured.finished:
        return f"({row.gpus}x{row.images})"
    return ", ".join(
        f"{gpus}x{row.images}" + (f", {accumulated} accumulated" if accumulated > 1 else "")
        for gpus, accumulated in layouts(measured)
    )


def _state(own: Spread | None, measured: Measured) -> str:
    if own is not None:
        return cell(own)
    if measured.reasons:
        return ", ".join(dict.fromkeys(why.partition(":")[0] for why in measured.reasons))
    return "no AP" if measured.finished else NOT_RUN


def _both(own: str, published: float | None) -> str:
    cells = [own, "" if published is None else _number(published)]
    return " ".join(filter(None, cells)) or "-"


def _number(value: float | None) -> str:
    """As printed: with one decimal place, or with two where the source has them."""
    if value is None:
        return "-"
    text = f"{value:.2f}"
    return f"({text[:-1] if text.endswith('0') else text})"


def _text(lines: list[dict[str, str]], style: str = "simple") -> str:
    return tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)
