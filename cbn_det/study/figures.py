"""What the figures of a comparison share: one colour for each norm, axes, and how they are kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, without black: told apart by colour-blind readers, in print, and on dark
# ground. The last four, of Tol's muted one, are for a matrix of all norms.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
COLOURS += ("#AA4499", "#999933", "#808080", "#882255")
# Width of a figure's panel in inches.
ONE_PANEL = 6.4
# More names than these would cover what is drawn.
MANY = 6
# A norm's name is no formula, whatever signs are in it.
matplotlib.rcParams["text.parse_math"] = False


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


def legend(figure: Figure) -> None:
    """Names the lines: in each panel, or once beside all of them where there are many."""
    named: dict[str, object] = {}
    for axes in figure.axes:
        named |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(named) > MANY:
        names = list(named)
        figure.legend(
            [named[n] for n in names],
            names,
            loc="outside right upper",
            fontsize="small",
            frameon=False,
        )
    else:
        for axes in figure.axes:
            axes.legend(fontsize="small", frameon=False)


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
