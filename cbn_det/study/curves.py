"""Curves over iterations, read from the runs' metrics.json."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from cbn_det.study.figures import colours, legend, side_by_side
from cbn_det.study.plan import Run
from cbn_det.study.results import read_metrics

STYLES = ("-", "--", ":", "-.")


def loss_curves(results: list[tuple[Run, dict]]) -> Figure | None:
    """Training loss, smoothed; None where no run logged any."""
    curves = {run.label: _points(run, "total_loss") for run, _ in results}
    smooth = {
        label: [(i, v) for (i, _), v in zip(curve, _smooth([v for _, v in curve]), strict=True)]
        for label, curve in curves.items()
    }
    return _draw(results, smooth, "training loss (smoothed)", marker="")


def ap_curves(results: list[tuple[Run, dict]]) -> Figure | None:
    """Box AP of the evaluations during training; None where no run was evaluated twice."""
    curves = {run.label: _points(run, "bbox/AP") for run, _ in results}
    if all(len(curve) < 2 for curve in curves.values()):
        return None
    return _draw(results, curves, "box AP", marker="o")


def _points(run: Run, key: str) -> list[tuple[int, float]]:
    lines = [line for line in read_metrics(run.folder) if key in line]
    # The AP of an evaluation without any detection is null or NaN.
    known = [(line["iteration"], line[key]) for line in lines if line[key] is not None]
    return [(iteration, value) for iteration, value in known if math.isfinite(value)]


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(weight * out[-1] + (1 - weight) * value if out else value)
    return out


def _draw(
    results: list[tuple[Run, dict]],
    curves: dict[str, list[tuple[int, float]]],
    name: str,
    marker: str,
) -> Figure | None:
    """One line a run; colour: its norm, line style: its split."""
    drawn = [run for run, _ in results if curves[run.label]]
    if not drawn:
        return None
    colour = colours([run.norm for run, _ in results])
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
    legend(figure)
    return figure
