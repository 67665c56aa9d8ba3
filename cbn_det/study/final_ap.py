"""The figure of what came out: final AP with its spread, with and without PreciseBN."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbn_det.study.figures import colours, side_by_side
from cbn_det.study.results import Row
from cbn_det.study.tables import by_total_batch


def final_ap(rows: list[Row]) -> Figure | None:
    """Bars, or lines over images per GPU where the split varies; None where no row has an AP."""
    groups = by_total_batch([row for row in rows if row.ap.get("bbox")])
    if not groups:
        return None
    colour = colours([row.norm for row in rows])
    figure, all_axes = side_by_side(list(groups))
    for axes, group in zip(all_axes, groups.values(), strict=True):
        draw = _lines if len({row.split for row in group}) > 1 else _bars
        draw(axes, group, colour)
        axes.set_ylabel("box AP")
    return figure


def _bars(axes: Axes, rows: list[Row], colour: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        plain, precise = row.ap["bbox"], row.ap_precise.get("bbox")
        style = {"capsize": 3, "ecolor": "#808080", "edgecolor": colour[row.norm]}
        left = place - 0.2 if precise else place
        bars = [axes.bar(left, plain.mean, 0.4, yerr=plain.std, color=colour[row.norm], **style)]
        if precise:
            style |= {"color": "none", "hatch": "///"}
            bars.append(axes.bar(place + 0.2, precise.mean, 0.4, yerr=precise.std, **style))
        for bar in bars:
            axes.bar_label(bar, fmt="%.1f", fontsize="small", padding=2)
    hatched = " (hatched: with PreciseBN)" if any(r.ap_precise.get("bbox") for r in rows) else ""
    axes.set_xticks(range(len(rows)), [row.norm for row in rows])
    axes.set_xlabel(f"norm at {rows[0].split.images} images per GPU{hatched}")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")


def _lines(axes: Axes, rows: list[Row], colour: dict[str, str]) -> None:
    for norm in dict.fromkeys(row.norm for row in rows):
        points = sorted((r for r in rows if r.norm == norm), key=lambda row: row.split.images)
        for values, style, suffix in (("ap", "-", ""), ("ap_precise", ":", ", PreciseBN")):
            known = [(p.split.images, getattr(p, values).get("bbox")) for p in points]
            known = [(images, spread) for images, spread in known if spread]
            if known:
                axes.errorbar(
                    [images for images, _ in known],
                    [spread.mean for _, spread in known],
                    yerr=[spread.std or 0.0 for _, spread in known],
                    color=colour[norm],
                    linestyle=style,
                    marker="o",
                    capsize=3,
                    label=norm + suffix,
                )
    images = sorted({row.split.images for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(i) for i in images])
    axes.set_xlabel("images per GPU (total batch fixed)")
    axes.legend(fontsize="small", frameon=False)
