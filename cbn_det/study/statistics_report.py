"""Writes the files of the statistics experiment: JSON, table, figure."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

from tabulate import tabulate

from cbn_det.study.figures import save_png
from cbn_det.study.files import write_text
from cbn_det.study.statistics_figure import apart_figure, error_figure
from cbn_det.study.statistics_results import Apart, Measured, Row, apart_from_reference, rows_of
from cbn_det.study.tables import provenance

JSON_NAME, TABLE_NAME, FIGURE_NAME = (
    f"statistics_error.{ending}" for ending in ("json", "md", "png")
)
APART_NAME = "statistics_apart.png"

NOTES = """\
One network was trained for each batch size; all norms were asked about the same weights and images.
mean: distance from the mean over many images, in standard deviations, RMS over mini-batches and
channels. var: log of the ratio to the variance over many images, likewise. running: the same of the
running statistics. Median over layers, averaged over the points of the second half of training.
/ BN: divided by BN's error in the same layer, geometric mean over layers and points.
better: share of layers and points where it is smaller."""


APART_NOTE = """\
Distance of the variance from that of {reference}, which sees the same mini-batches, as a share of
the sampling error of a mini-batch's variance (RMS over mini-batches and channels of what BN's
varies by). Errors add in squares: 10 % of the sampling error makes it larger by 0.5 %.
error: by how much the norm's distance from the truth is larger than the reference's, geometric mean
over layers and points."""


def write_report(
    output: Path,
    title: str,
    command: str,
    norms: list[str],
    measured: list[Measured],
    reference: str | None = None,
) -> tuple[str, list[Path]]:
    """Write everything into a folder. Points of runs that did not finish are in the JSON file only.

    Args:
        reference: the norm that the others were compared with.

    Returns:
        the table as plain text, and the files.

    Raises:
        OSError: something could not be written; what was there before is whole still.
    """
    # The others diverged or have fewer moments: averages with them would be of something else.
    finished = [m for m in measured if m.finished]
    apart = apart_from_reference(finished, reference)
    data = {
        "title": title,
        "command": command,
        "rows": {
            part: [dataclasses.asdict(row) for row in rows_of(finished, late)]
            for part, late in (("first_half", False), ("second_half", True))
        },
        "runs": [
            {
                "label": m.run.label,
                "trained_with": m.run.norm,
                "images_per_gpu": m.images,
                "seed": m.run.seed,
                "folder": str(m.run.folder.relative_to(output)),
                **{key: m.result.get(key) for key in ("status", "message", "iterations")},
                **{key: m.result.get(key) for key in ("engine", "machine", "versions")},
                "points": m.points,
            }
            for m in measured
        ],
    }
    paths = [
        write_text(output / JSON_NAME, json.dumps(data) + "\n"),
        write_text(output / TABLE_NAME, _text(title, measured, "github", apart, reference)),
    ]
    figure = error_figure(finished, norms)
    if figure is not None:
        paths.append(save_png(figure, output / FIGURE_NAME))
    if apart:
        paths.append(save_png(apart_figure(apart, reference), output / APART_NAME))
    return _text(title, measured, "simple", apart, reference), paths


def _text(
    title: str, measured: list[Measured], style: str, apart: list[Apart], reference: str | None
) -> str:
    heading = "# " if style == "github" else ""
    rows = rows_of([m for m in measured if m.finished], late=True)
    parts = [f"{heading}{title}"]
    for images in sorted({row.images for row in rows}):
        parts.append(f"{images} image{'s' * (images > 1)} per GPU")
        lines = [_cells(row) for row in rows if row.images == images]
        parts.append(tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True))
    if apart:
        parts.append(APART_NOTE.format(reference=reference))
    for images in sorted({row.images for row in apart}):
        parts.append(f"{images} image{'s' * (images > 1)} per GPU, distance from {reference}")
        lines = _apart_cells([row for row in apart if row.images == images])
        parts.append(tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True))
    made = provenance([(m.run, m.result) for m in measured])
    unfinished = [
        f"Left out: {m.run.label}: {m.result.get('status')}: {m.result.get('message')}"
        for m in measured
        if not m.finished
    ]
    parts.append("\n".join([NOTES, *unfinished, *([f"Made with: {made}."] if made else [])]))
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> dict[str, str]:
    cells = {"norm": row.norm}
    for key in ("mean", "var"):
        ratio, better = getattr(row, f"{key}_ratio"), getattr(row, f"{key}_better")
        cells[key] = _number(getattr(row, key), "{:.3f}")
        cells[f"{key} / BN"] = _number(ratio, "{:.2f}")
        if row.norm == "BN":
            better = None
        cells[f"{key} better"] = "-" if better is None else f"{100 * better:.0f} %"
    cells["running mean"] = _number(row.running_mean, "{:.3f}")
    cells["running var"] = _number(row.running_var, "{:.3f}")
    return cells


def _apart_cells(apart: list[Apart]) -> list[dict[str, str]]:
    lines = []
    for norm in dict.fromkeys(row.norm for row in apart):
        cells = {"norm": norm}
        for late, name in ((False, "first half"), (True, "second half")):
            rows = [row for row in apart if row.norm == norm and row.late == late]
            if rows:
                worst = max(rows, key=lambda row: row.share)
                median = statistics.median(row.share for row in rows)
                below = sum(row.share < 0.01 for row in rows) / len(rows)
                cells[f"{name}: median"] = f"{median:.2%}"
                cells[f"{name}: below 1 %"] = f"{below:.0%}"
                cells[f"{name}: worst"] = f"{worst.share:.1%} {worst.layer}"
                errors = [row.error for row in rows if row.error]
                mean = statistics.geometric_mean(errors) - 1 if errors else None
                cells[f"{name}: error"] = _number(mean, "{:+.2%}")
        lines.append(cells)
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
