"""What the figures of a comparison share: one colour for each norm, axes, and how they are kept."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, without black: told apart by colour-blind readers, in print, and on dark
# ground.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
# A norm's name is no formula, whatever signs are in it.
matplotlib.rcParams["text.parse_math"] = False


def colours(norms: list[str]) -> dict[str, str]:
    """One colour for each norm, in the order of first appearance; used wherever it is drawn."""
    distinct = dict.fromkeys(norms)
    return {norm: COLOURS[place % len(COLOURS)] for place, norm in enumerate(distinct)}


def side_by_side(totals: list[int]) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each total batch, which must not share any."""
    figure = Figure(figsize=(6.4 * len(totals), 3.8), layout="constrained")
    all_axes = list(figure.subplots(1, len(totals), squeeze=False)[0])
    for axes, total in zip(all_axes, totals, strict=True):
        if len(totals) > 1:
            axes.set_title(f"total batch {total}", fontsize="medium")
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
