"""The figure of how far norms' statistics are from the truth: over time, and layer by layer."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cbn_det.study.figures import colours
from cbn_det.study.statistics_results import Apart, Measured, geometric_mean, relative, typical

STYLES = ("-", "--", ":", "-.")
OVER_TIME = {
    "mean": "error of the mean\n(standard deviations)",
    "var": "error of the variance\n(RMS of log ratio)",
    "running_var": "running variance\n(RMS of log ratio)",
}
BY_LAYER = {
    "mean": "error of the mean,\ndivided by BN's",
    "var": "of the variance,\ndivided by BN's",
}


def error_figure(measured: list[Measured], norms: list[str]) -> Figure | None:
    """A column for each batch size; None where nothing was measured. Variants of a norm have its
    colour and another line style."""
    measured = [m for m in measured if m.points]
    if not measured:
        return None
    sizes = sorted({m.images for m in measured})
    style = _styles(norms)
    figure = Figure(figsize=(1.5 + 4.7 * len(sizes), 16), layout="constrained")
    grid = figure.subplots(5, len(sizes), squeeze=False, sharey="row")
    keys = [*OVER_TIME, *BY_LAYER]
    for column, images in enumerate(sizes):
        of_size = [m for m in measured if m.images == images]
        for row, key in enumerate(keys):
            axes = grid[row][column]
            _log_scale(axes)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            over_time = row < len(OVER_TIME)
            (_over_time if over_time else _by_layer)(axes, of_size, key, style)
            if column == 0:
                axes.set_ylabel(OVER_TIME[key] if over_time else BY_LAYER[key])
        grid[0][column].set_title(f"{images} image{'s' * (images > 1)} per GPU")
        for row in range(len(OVER_TIME)):
            grid[row][column].set_xlabel("iteration")
    handles, labels = grid[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(sizes), "frameon": False}
    figure.legend(handles, labels, fontsize="small", **place)
    return figure


def apart_figure(apart: list[Apart], reference: str) -> Figure:
    """How far each norm's variance is from the reference's: a thin line for each layer, over all
    points, and the median of layers; a column for each batch size."""
    sizes = sorted({row.images for row in apart})
    norms = list(dict.fromkeys(row.norm for row in apart))
    figure = Figure(figsize=(1.5 + 4.7 * len(sizes), 5), layout="constrained")
    figure.suptitle(f"from {reference}", fontsize="medium")
    for axes, images in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        curves = []
        for layer in dict.fromkeys(row.layer for row in apart):
            squares: dict[str, list[float]] = {norm: [] for norm in norms}
            for row in apart:
                if (row.images, row.layer) == (images, layer) and row.norm in squares:
                    squares[row.norm].append(row.share**2)
            curve = [statistics.fmean(squares[n] or [0.0]) ** 0.5 for n in norms]
            if any(curve):  # else the approximation leaves nothing out of so small a layer
                curves.append((layer, curve))
        highest = max(curves, key=lambda item: sum(item[1]), default=("", []))[0]
        for layer, curve in curves:
            label = _short(layer) if layer == highest else None
            axes.plot(norms, curve, color="#c06030" if label else "#9db4c8", lw=1.0, label=label)
        columns = zip(*(curve for _, curve in curves), strict=True)
        median = [statistics.median(values) for values in columns]
        if median:
            axes.plot(norms, median, color="#204a70", lw=2.5, marker="o", label="median of layers")
        axes.axhline(0.01, color="#808080", linestyle=(0, (1, 3)), label="1 %")
        _log_scale(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{images} image{'s' * (images > 1)} per GPU")
        axes.set_ylabel("distance of the variance,\nshare of the sampling error")
        axes.tick_params(axis="x", labelrotation=30, labelsize=7)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _styles(norms: list[str]) -> dict[str, dict]:
    bases = [norm.partition("(")[0] for norm in norms]
    colour = colours(bases)
    return {
        norm: {
            "color": colour[base],
            "linestyle": STYLES[bases[:place].count(base) % len(STYLES)],
            "linewidth": 2.5 if norm == "BN" else 1.3,
        }
        for place, (norm, base) in enumerate(zip(norms, bases, strict=True))
    }


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _over_time(axes: Axes, measured: list[Measured], key: str, style: dict[str, dict]) -> None:
    for norm, look in style.items():
        _line(axes, measured, norm, key, {**look, "label": norm, "marker": ".", "markersize": 4})
    if not key.startswith("running"):
        look = {"color": "#808080", "linestyle": (0, (1, 3)), "label": "the truth's own error"}
        _line(axes, measured, "", key, look)


def _line(axes: Axes, measured: list[Measured], norm: str, key: str, look: dict) -> None:
    values: dict[int, list[float]] = {}
    for point in (point for m in measured for point in m.points):
        value = typical(point, norm, key)
        if value:
            values.setdefault(point["iteration"], []).append(value)
    times = sorted(values)
    axes.plot(times, [statistics.fmean(values[t]) for t in times], **look)


def _by_layer(axes: Axes, measured: list[Measured], key: str, style: dict[str, dict]) -> None:
    points = [point for m in measured for point in m.points]
    names = list(dict.fromkeys(name for point in points for name in point["layers"]))
    for norm, look in style.items():
        ratios = [geometric_mean(relative(points, norm, key, name)) for name in names]
        known = [(place, ratio) for place, ratio in enumerate(ratios) if ratio]
        axes.plot([place for place, _ in known], [ratio for _, ratio in known], **look)
    step = 1 + len(names) // 50
    places = range(0, len(names), step)
    axes.set_xticks(places, [_short(names[p]) for p in places], rotation=90, fontsize=5.5)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _short(name: str) -> str:
    for part in ("backbone.", "bottom_up.", "body.", "roi_heads.", ".norm"):
        name = name.replace(part, "")
    return name
