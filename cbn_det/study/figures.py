"""The figures of a comparison: curves over iterations, final AP, AP over images per GPU."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import Run
from .results import Measured, read_lines
from .tables import by_split, in_words

# Okabe and Ito's palette, without black: told apart by colour-blind readers, in print, and on dark
# ground. The last four, of Tol's muted one, are for a matrix of all norms.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
COLOURS += ("#AA4499", "#999933", "#808080", "#882255")
STYLES = ("-", "--", ":", "-.")
# Width of a figure's panel in inches.
ONE_PANEL = 6.4
# More names than these would cover what is drawn.
MANY = 6
# A norm's name is no formula, whatever signs are in it.
matplotlib.rcParams["text.parse_math"] = False

Curve = list[tuple[int, float]]


def colours(norms: list[str]) -> dict[str, str]:
    """One colour for each norm, in the order of first appearance; used wherever it is drawn."""
    distinct = dict.fromkeys(norms)
    return {norm: COLOURS[place % len(COLOURS)] for place, norm in enumerate(distinct)}


def side_by_side(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each of what must not share any; a single one goes without title."""
    figure = Figure(figsize=(ONE_PANEL * len(titles), 3.8), layout="constrained")
    all_axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axes, title in zip(all_axes, titles, strict=True):
        if len(titles) > 1:
            axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure on white ground; returns `path`."""
    figure.savefig(path, dpi=120)
    return path


def to_svg(figure: Figure) -> str:
    """A figure as an <svg> element for an HTML page, whose text colour and ground it takes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # Black text is written without a colour, so it takes the one of the element around it.
    return text.replace("<svg", '<svg role="img" fill="currentColor"', 1)


def loss_curves(runs: list[Run]) -> Figure | None:
    """Training loss, smoothed; None where no run logged any."""
    curves = {run.label: _smooth(_points(run, "total_loss")) for run in runs}
    return _draw_curves(runs, curves, "training loss (smoothed)", marker="")


def ap_curves(runs: list[Run]) -> Figure | None:
    """Box AP of the evaluations during training; None where no run was evaluated twice."""
    curves = {run.label: _points(run, "bbox/AP") for run in runs}
    if all(len(curve) < 2 for curve in curves.values()):
        return None
    return _draw_curves(runs, curves, "box AP", marker="o")


def final_ap(rows: list[Measured]) -> Figure | None:
    """Bars for each norm, one panel a split; None where no row has an AP."""
    groups = by_split([row for row in rows if row.ap()])
    if not groups:
        return None
    colour = colours([row.norm for row in rows])
    figure, all_axes = side_by_side([in_words(split) for split in groups])
    for axes, group in zip(all_axes, groups.values(), strict=True):
        _draw_bars(axes, group, colour)
    return figure


def ap_over_images(rows: list[Measured]) -> Figure | None:
    """Lines over images per GPU for each norm; None where they do not vary.

    A panel is a total batch that was split in several ways, or a world size that had several
    numbers of images: there the total batch grows with them.
    """
    known = [row for row in rows if row.ap()]
    groups: dict[str, list[Measured]] = {}
    for total in sorted({row.split.total for row in known}):
        groups[f"total batch {total}"] = [row for row in known if row.split.total == total]
    for ranks in sorted({row.split.ranks for row in known}):
        name = f"world size {ranks}: total batch grows with images"
        groups[name] = [row for row in known if row.split.ranks == ranks]
    groups = {name: few for name, few in groups.items() if len({r.split.images for r in few}) > 1}
    if not groups:
        return None
    colour = colours([row.norm for row in rows])
    figure, all_axes = side_by_side(list(groups))
    for axes, (name, few) in zip(all_axes, groups.items(), strict=True):
        axes.set_title(name, fontsize="medium")
        _draw_lines(axes, few, colour)
    _legend(figure)
    return figure


def _points(run: Run, key: str) -> Curve:
    lines = [line for line in read_lines(run.folder / "metrics.json") if key in line]
    # The AP of an evaluation without any detection is null or NaN.
    known = [(line["iteration"], line[key]) for line in lines if line[key] is not None]
    return [(iteration, value) for iteration, value in known if math.isfinite(value)]


def _smooth(curve: Curve, weight: float = 0.8) -> Curve:
    out: Curve = []
    for iteration, value in curve:
        out.append((iteration, weight * out[-1][1] + (1 - weight) * value if out else value))
    return out


def _draw_curves(
    runs: list[Run], curves: dict[str, Curve], name: str, marker: str
) -> Figure | None:
    """One line a run; colour: its norm, line style: its split."""
    drawn = [run for run in runs if curves[run.label]]
    if not drawn:
        return None
    colour = colours([run.norm for run in runs])
    totals = sorted({run.split.total for run in drawn})
    figure, all_axes = side_by_side([f"total batch {total}" for total in totals])
    for axes, total in zip(all_axes, totals, strict=True):
        splits = sorted({run.split for run in drawn if run.split.total == total})
        named = set()
        for run in (run for run in drawn if run.split.total == total):
            text = f"{run.norm} {run.split}" if len(splits) > 1 else run.norm
            axes.plot(
                *zip(*curves[run.label], strict=True),
                color=colour[run.norm],
                linestyle=STYLES[splits.index(run.split) % len(STYLES)],
                linewidth=1.5,
                marker=marker if len(curves[run.label]) > 1 else "o",
                markersize=4,
                label=None if text in named else text,
            )
            named.add(text)
        axes.set(xlabel="iteration", ylabel=name)
    _legend(figure)
    return figure


def _draw_bars(axes: Axes, rows: list[Measured], colour: dict[str, str]) -> None:
    many = len(rows) > MANY
    hatched = ""
    for place, row in enumerate(rows):
        plain, precise = row.ap(), row.ap(column="AP, PreciseBN")
        style = {"capsize": 3, "ecolor": "#808080", "edgecolor": colour[row.norm]}
        left = place - 0.2 if precise else place
        bars = [axes.bar(left, plain.mean, 0.4, yerr=plain.std, color=colour[row.norm], **style)]
        if precise:
            style |= {"color": "none", "hatch": "///"}
            bars.append(axes.bar(place + 0.2, precise.mean, 0.4, yerr=precise.std, **style))
            hatched = " (hatched: with PreciseBN)"
        for bar in bars if not many else []:
            axes.bar_label(bar, fmt="%.1f", fontsize="small", padding=2)
    turned = {"rotation": 35, "ha": "right", "fontsize": "small"} if many else {}
    axes.set_xticks(range(len(rows)), [row.norm for row in rows], **turned)
    axes.set(xlabel=f"norm at {in_words(rows[0].split)}{hatched}", ylabel="box AP")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")


def _draw_lines(axes: Axes, rows: list[Measured], colour: dict[str, str]) -> None:
    for norm in dict.fromkeys(row.norm for row in rows):
        points = sorted((r for r in rows if r.norm == norm), key=lambda row: row.split.images)
        for column, style in (("AP", "-"), ("AP, PreciseBN", ":")):
            known = [(p.split.images, s) for p in points if (s := p.ap(column=column))]
            if known:
                axes.errorbar(
                    [images for images, _ in known],
                    [spread.mean for _, spread in known],
                    yerr=[spread.std or 0.0 for _, spread in known],
                    color=colour[norm],
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=norm if column == "AP" else None,
                )
    images = sorted({row.split.images for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(i) for i in images])
    axes.minorticks_off()
    axes.set(xlabel="images per GPU", ylabel="box AP")


def _legend(figure: Figure) -> None:
    """Names the lines: in each panel, or once beside all of them where there are many."""
    named: dict[str, object] = {}
    for axes in figure.axes:
        named |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(named) > MANY:
        where = {"loc": "outside right upper", "fontsize": "small", "frameon": False}
        figure.legend(list(named.values()), list(named), **where)
    else:
        for axes in figure.axes:
            axes.legend(fontsize="small", frameon=False)
