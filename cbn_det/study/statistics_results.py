"""Reads what `--statistics-error` leaves in run folders and sums it up: a row for each norm."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cbn_det.study.plan import Run

FILE = "statistics_error.jsonl"  # see cbn_det.run.statistics_error


@dataclass
class Measured:
    """One run: `points` are the lines it left, in the order of iterations; `length` is how many
    iterations it was to have."""

    run: Run
    result: dict
    points: list[dict]
    length: int

    @property
    def images(self) -> int:
        return self.run.split.images

    @property
    def finished(self) -> bool:
        return self.result.get("status") == "finished"

    def is_late(self, point: dict) -> bool:
        """Whether a point is in the second half of training."""
        return 2 * point["iteration"] >= self.length


def read_points(folder: Path) -> list[dict]:
    """The lines of a run; of an iteration that was measured twice (the run was resumed), the later
    one. What a killed process left of a line is left out."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    points = {}
    for line in text.splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        points[point["iteration"]] = point
    return [points[iteration] for iteration in sorted(points)]


@dataclass
class Row:
    """One norm at one batch size, over runs, points and layers.

    `mean` and `var` are errors (see :mod:`cbn_det.run.statistics_error`), as are `running_mean` and
    `running_var`: the median over layers, averaged over points and runs. `mean_ratio` and
    `var_ratio` compare with BN's error in the same layer at the same point, as a geometric mean;
    `mean_better` and `var_better` are the shares of layers and points at which it is smaller.
    None: nothing to compare.
    """

    norm: str
    images: int
    mean: float | None
    mean_ratio: float | None
    mean_better: float | None
    var: float | None
    var_ratio: float | None
    var_better: float | None
    running_mean: float | None
    running_var: float | None


def rows_of(measured: list[Measured], late: bool) -> list[Row]:
    """A row for each batch size and norm, of the points in the second half of training (`late`) or
    of those in the first."""
    rows = []
    for images in sorted({m.images for m in measured}):
        points = [
            point
            for m in measured
            if m.images == images
            for point in m.points
            if m.is_late(point) == late
        ]
        names = dict.fromkeys(n for p in points for x in p["layers"].values() for n in x["norms"])
        rows += [_row(norm, images, points) for norm in names]
    return rows


@dataclass
class Apart:
    """How far a norm's variance is from a reference's in one layer at one point.

    Attributes:
        share: the distance, divided by the sampling error of a mini-batch's variance: what BN's
            varies by from mini-batch to mini-batch.
        error: the norm's own error, its distance from the truth, divided by the reference's; None
            where the reference has none.
    """

    norm: str
    images: int
    layer: str
    iteration: int
    late: bool
    share: float
    error: float | None


def apart_from_reference(measured: list[Measured], reference: str | None) -> list[Apart]:
    """Every other norm but BN in every layer at every point; nothing where no reference was asked
    for."""
    found = []
    for m in measured:
        for point in m.points:
            late = m.is_late(point)
            for name, layer in point["layers"].items():
                bn = layer["norms"].get("BN", {})
                if not bn.get("var"):
                    continue
                sampling = math.sqrt(max(bn["var"] ** 2 - bn["var_fixed"] ** 2, 0.0))
                own = layer["norms"].get(reference, {}).get("var")
                for norm, errors in layer["norms"].items():
                    if sampling and norm not in ("BN", reference) and "apart_var" in errors:
                        share = errors["apart_var"] / sampling
                        error = errors["var"] / own if own else None
                        row = Apart(norm, m.images, name, point["iteration"], late, share, error)
                        found.append(row)
    return found


def typical(point: dict, norm: str, key: str) -> float | None:
    """The median over the layers of a point; `norm` "" stands for the error of the truth."""
    layers = point["layers"].values()
    found = [(x["norms"].get(norm, {}) if norm else x["floor"]).get(key) for x in layers]
    known = [value for value in found if value is not None]
    return statistics.median(known) if known else None


def relative(points: Iterable[dict], norm: str, key: str, layer: str | None = None) -> list[float]:
    """Errors divided by BN's, of the layers (or one layer) of all points."""
    ratios = []
    for point in points:
        for name, found in point["layers"].items():
            if layer in (None, name):
                own, bn = (found["norms"].get(n, {}).get(key) for n in (norm, "BN"))
                if own and bn:
                    ratios.append(own / bn)
    return ratios


def geometric_mean(values: list[float]) -> float | None:
    """None of no values."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def _row(norm: str, images: int, points: list[dict]) -> Row:
    def average(key: str) -> float | None:
        known = [value for p in points if (value := typical(p, norm, key)) is not None]
        return statistics.fmean(known) if known else None

    found: dict[str, float | None] = {}
    for key in ("mean", "var"):
        ratios = relative(points, norm, key)
        found[f"{key}_ratio"] = geometric_mean(ratios)
        found[f"{key}_better"] = sum(r < 1 for r in ratios) / len(ratios) if ratios else None
    errors = {key: average(key) for key in ("mean", "var", "running_mean", "running_var")}
    return Row(norm, images, **errors, **found)
