"""Writes the files of a comparison: table.md, summary.json, figures, report.html."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from cbn_det.study.curves import ap_curves, loss_curves
from cbn_det.study.figures import save_png
from cbn_det.study.final_ap import ap_over_images, final_ap
from cbn_det.study.report import Comparison, render
from cbn_det.study.tables import text_report


def write_files(comparison: Comparison) -> list[Path]:
    """Write everything into the comparison's folder; the paths, report.html last.

    Raises:
        OSError: something could not be written; what was there before is whole still.
    """
    output = comparison.plan.output
    title, rows, results = f"# {comparison.title}", comparison.rows, comparison.results
    markdown = text_report(
        rows, results, title, "github", comparison.config_iterations, comparison.plan.expected
    )
    figures = {
        ("ap_curves.png", "Box AP of the evaluations during training, one line a run."): ap_curves(
            results
        ),
        ("loss.png", "Training loss, smoothed, one line a run."): loss_curves(results),
        (
            "ap.png",
            "Final box AP; error bars: spread over seeds, where there are several.",
        ): final_ap(rows),
        (
            "ap_over_images.png",
            "Final box AP over images per GPU, with spread over seeds; dotted: with PreciseBN.",
        ): ap_over_images(rows),
    }
    page = render(comparison, {caption: figure for (_, caption), figure in figures.items()})
    paths = [
        write_text(output / "table.md", markdown),
        write_text(output / "summary.json", json.dumps(_summary(comparison), indent=2) + "\n"),
    ]
    paths += [save_png(f, output / name) for (name, _), f in figures.items() if f]
    return [*paths, write_text(output / "report.html", page)]


def _summary(comparison: Comparison) -> dict:
    return {
        "title": comparison.title,
        "engine": comparison.plan.engine,
        "command": comparison.command,
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
        "runs": [
            {
                "label": run.label,
                "norm": run.norm,
                "ranks": run.split.ranks,
                "images_per_gpu": run.split.images,
                "seed": run.seed,
                "folder": str(run.folder.relative_to(comparison.plan.output)),
                "result": result,
            }
            for run, result in comparison.results
        ],
    }


def write_text(path: Path, text: str) -> Path:
    """Replace a file's text all at once, so that a full disk leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
