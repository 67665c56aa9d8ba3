"""Writes the files of the statistics experiment: JSON, table, figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tabulate import tabulate

from cbn_det.study.figures import save_png
from cbn_det.study.files import write_text
from cbn_det.study.statistics_figure import error_figure
from cbn_det.study.statistics_results import Measured, Row, rows_of
from cbn_det.study.tables import provenance

JSON_NAME, TABLE_NAME, FIGURE_NAME = (
    f"statistics_error.{ending}" for ending in ("json", "md", "png")
)

NOTES = """\
One network was trained for each batch size; all norms were asked about the same weights and images.
mean: distance from the mean over many images, in standard deviations, RMS over mini-batches and
channels. var: log of the ratio to the variance over many images, likewise. running: the same of the
running statistics. Median over layers, averaged over the points of the second half of training.
/ BN: divided by BN's error in the same layer, geometric mean over layers and points.
better: share of layers and points where it is smaller."""


def write_report(
    output: Path, title: str, command: str, norms: list[str], measured: list[Measured]
) -> tuple[str, list[Path]]:
    """Write everything into a folder.

    Returns:
        the table as plain text, and the files.

    Raises:
        OSError: something could not be written; what was there before is whole still.
    """
    data = {
        "title": title,
        "command": command,
        "rows": {
            part: [dataclasses.asdict(row) for row in rows_of(measured, late)]
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
        write_text(output / TABLE_NAME, _text(title, measured, "github")),
    ]
    figure = error_figure(measured, norms)
    if figure is not None:
        paths.append(save_png(figure, output / FIGURE_NAME))
    return _text(title, measured, "simple"), paths


def _text(title: str, measured: list[Measured], style: str) -> str:
    heading = "# " if style == "github" else ""
    rows = rows_of(measured, late=True)
    parts = [f"{heading}{title}"]
    for images in sorted({row.images for row in rows}):
        parts.append(f"{images} image{'s' * (images > 1)} per GPU")
        lines = [_cells(row) for row in rows if row.images == images]
        parts.append(tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True))
    made = provenance([(m.run, m.result) for m in measured])
    unfinished = [
        f"{m.run.label}: {m.result.get('status')}: {m.result.get('message')}"
        for m in measured
        if m.result.get("status") != "finished"
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


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
