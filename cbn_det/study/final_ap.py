"""The figures of what came out: final AP with its spread, with and without PreciseBN."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbn_det.study.figures import MANY, colours, legend, side_by_side
from cbn_det.study.results import Row
from cbn_det.study.tables import by_split, in_words


def final_ap(rows: list[Row]) -> Figure | None:
    """Bars for each norm, one panel a split; None where no row has an AP."""
    groups = by_split([row for row in rows if row.ap.get("bbox")])
    if not groups:
        return None
    colour = colours([row.norm for row in rows])
    figure, all_axes = side_by_side([in_words(split) for split in groups])
    for axes, group in zip(all_axes, groups.values(), strict=True):
        _bars(axes, group, colour)
        axes.set_ylabel("box AP")
    return figure


def ap_over_images(rows: list[Row]) -> Figure | None:
    """Lines over images per GPU for each norm; None where they do not vary.

    A panel is a total batch that was split in several ways, or a world size that had several
    numbers of images: there the total batch grows with them.
    """
    known = [row for row in rows if row.ap.get("bbox")]
    panels: dict[str, list[Row]] = {}
    for total in sorted({row.split.total for row in known}):
        panels[f"total batch {total}"] = [row for row in known if row.split.total == total]
    for ranks in sorted({row.split.ranks for row in known}):
        name = f"world size {ranks}: total batch grows with images"
        panels[name] = [row for row in known if row.split.ranks == ranks]
    panels = {name: few for name, few in panels.items() if len({r.split.images for r in few}) > 1}
    if not panels:
        return None
    colour = colours([row.norm for row in rows])
    figure, all_axes = side_by_side(list(panels))
    for axes, (name, few) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(name, fontsize="medium")
        _lines(axes, few, colour)
        axes.set_ylabel("box AP")
    legend(figure)
    return figure


def _bars(axes: Axes, rows: list[Row], colour: dict[str, str]) -> None:
    many = len(rows) > MANY
    for place, row in enumerate(rows):
        plain, precise = row.ap["bbox"], row.ap_precise.get("bbox")
        style = {"capsize": 3, "ecolor": "#808080", "edgecolor": colour[row.norm]}
        left = place - 0.2 if precise else place
        bars = [axes.bar(left, plain.mean, 0.4, yerr=plain.std, color=colour[row.norm], **style)]
        if precise:
            style |= {"color": "none", "hatch": "///"}
            bars.append(axes.bar(place + 0.2, precise.mean, 0.4, yerr=precise.std, **style))
        for bar in bars if not many else []:
            axes.bar_label(bar, fmt="%.1f", fontsize="small", padding=2)
    hatched = " (hatched: with PreciseBN)" if any(r.ap_precise.get("bbox") for r in rows) else ""
    turned = {"rotation": 35, "ha": "right", "fontsize": "small"} if many else {}
    axes.set_xticks(range(len(rows)), [row.norm for row in rows], **turned)
    axes.set_xlabel(f"norm at {in_words(rows[0].split)}{hatched}")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")


def _lines(axes: Axes, rows: list[Row], colour: dict[str, str]) -> None:
    for norm in dict.fromkeys(row.norm for row in rows):
        points = sorted((r for r in rows if r.norm == norm), key=lambda row: row.split.images)
        for values, style in (("ap", "-"), ("ap_precise", ":")):
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
                    markersize=4,
                    capsize=3,
                    label=norm if values == "ap" else None,
                )
    images = sorted({row.split.images for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(i) for i in images])
    axes.minorticks_off()
    axes.set_xlabel("images per GPU")
