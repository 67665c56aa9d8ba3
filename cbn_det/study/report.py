"""The files of a comparison: table.md, summary.json, figures, and report.html, which has everything
in one file that needs nothing else to be read."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ..cli import join
from ..run.files import write_text
from . import figures, tables
from .plan import Plan, Run
from .results import AP_COLUMNS, TASKS, Measured, make_rows
from .runner import Outcome

TEMPLATE = "report.html.jinja"
# Of each run; and in pixels, so that an enlarged one shows the names of classes.
MAX_PICTURES = 4
MAX_WIDTH = 1600


@dataclass
class Comparison:
    """A comparison that has been run, by a command line and in so many seconds."""

    plan: Plan
    outcomes: list[Outcome]
    command: str
    seconds: float

    def __post_init__(self) -> None:
        self.runs = [outcome.run for outcome in self.outcomes]
        self.results = [outcome.result for outcome in self.outcomes]
        self.rows = make_rows([(o.run.norm, o.run.split, o.result) for o in self.outcomes])
        self.reused = sum(outcome.reused for outcome in self.outcomes)

    @property
    def wall(self) -> str:
        """How long it took, for a reader; where nothing was left to train, how long that took."""
        if self.reused < len(self.outcomes):
            return _duration(self.seconds)
        trained = sum(result.get("train_seconds") or 0.0 for result in self.results)
        runs = "the run was" if self.reused == 1 else f"all {self.reused} runs were"
        return f"{runs} finished before, after {_duration(trained)} of training in all"

    def text(self, style: str = "simple") -> str:
        """All tables; `style` is a format of tabulate."""
        plan = self.plan
        recipe = f"recipe '{plan.recipe}', " if plan.config is None else ""
        title = f"Comparison of norms, {recipe}{plan.config_name}, {plan.engine} engine"
        title = f"# {title}" if style == "github" else title
        return tables.text_report(
            self.rows, self.results, title, plan.seeds, style, plan.config_iterations, plan.expected
        )

    def write(self) -> list[Path]:
        """Write everything into the comparison's folder; the paths, report.html last.

        Raises:
            OSError: something could not be written; what was there before is whole still.
        """
        output = self.plan.output
        drawn = {
            "ap_curves.png": (
                "Box AP of the evaluations during training, one line a run.",
                figures.ap_curves(self.runs),
            ),
            "loss.png": (
                "Training loss, smoothed, one line a run.",
                figures.loss_curves(self.runs),
            ),
            "ap.png": (
                "Final box AP; error bars: spread over seeds, where there are several.",
                figures.final_ap(self.rows),
            ),
            "ap_over_images.png": (
                "Final box AP over images per GPU, with spread over seeds; dotted: with PreciseBN.",
                figures.ap_over_images(self.rows),
            ),
        }
        drawn = {name: (caption, figure) for name, (caption, figure) in drawn.items() if figure}
        page = _page(self, list(drawn.values()))
        summary = {
            "engine": self.plan.engine,
            "command": self.command,
            "rows": [_summary(row) for row in self.rows],
            "runs": [dataclasses.asdict(o.run) | {"result": o.result} for o in self.outcomes],
        }
        return [
            write_text(output / "table.md", self.text("github")),
            write_text(output / "summary.json", json.dumps(summary, indent=2, default=str) + "\n"),
            *(figures.save_png(figure, output / name) for name, (_, figure) in drawn.items()),
            write_text(output / "report.html", page),
        ]


def _page(comparison: Comparison, drawn: list[tuple[str, Figure]]) -> str:
    """report.html; `drawn` are figures with their captions."""
    # Names and messages come from configs and exceptions: every value is escaped.
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plan, rows = comparison.plan, comparison.rows
    return env.get_template(TEMPLATE).render(
        comparison=comparison,
        made=time.strftime("%Y-%m-%d %H:%M"),
        python=sys.executable,
        plan=plan,
        headline=_headline(plan),
        facts=_facts(comparison),
        tables=[
            (table.heading, list(zip(table.rows, table.lines, strict=True)))
            for table in tables.make_tables(rows)
        ],
        classes=[
            (table.heading, [(None, line) for line in table.lines])
            for table in tables.of_classes(rows)
        ],
        notes=tables.notes(rows, plan.config_iterations, plan.expected),
        figures=[
            (caption, Markup(figures.to_svg(figure)), figure.get_figwidth() > figures.ONE_PANEL)
            for caption, figure in drawn
        ],
        scenes=_scenes(comparison),
        machines=tables.machines(comparison.results),
        versions=tables.versions(comparison.results),
        runs=[(o.run, _run_facts(o.run, o.result), o.result) for o in comparison.outcomes],
        commands=[(run.label, join(run.command)) for run in comparison.runs],
        colours=figures.colours([row.norm for row in rows]),
        words=tables.in_words,
    )


def _summary(row: Measured) -> dict[str, Any]:
    spreads = {task: {c: row.ap(task, c) for c in AP_COLUMNS} for task in TASKS}
    return {
        "norm": row.norm,
        "split": dataclasses.asdict(row.split),
        "status": row.status,
        "reasons": row.reasons,
        "ap": {
            task: {column: one and dataclasses.asdict(one) for column, one in columns.items()}
            for task, columns in spreads.items()
        },
        "gains": row.gains,
        "cost": {key: row.cost(key) for key, *_ in tables.COSTS.values()},
    }


def _headline(plan: Plan) -> str:
    images = sorted({split.images for split in plan.splits})
    norms = list(dict.fromkeys(plan.norms))
    names = " and ".join(filter(None, (", ".join(norms[:-1]), norms[-1])))
    return f"{names} at {_either(images)} image{'' if images == [1] else 's'} per GPU"


def _facts(comparison: Comparison) -> dict[str, str]:
    """What the first paragraph says."""
    plan = comparison.plan
    # What the runs said of themselves; where none got far enough, what they were asked to do.
    lengths = sorted({row.iterations for row in comparison.rows if row.iterations})
    data = [result.get("dataset") or {} for result in comparison.results]
    wide = {s: f" on each of {s.ranks} processes" for s in plan.splits if s.ranks > 1}
    return {
        "iterations": _either(lengths or [plan.iterations or "the config's"]),
        "seeds": " ".join(map(str, plan.seeds)),
        "splits": _either([f"{split.images}{wide.get(split, '')}" for split in plan.splits]),
        "train": _either(list(dict.fromkeys(n for d in data for n in d.get("train", [])))),
        "test": _either(list(dict.fromkeys(n for d in data for n in d.get("test", [])))),
        "wall": comparison.wall,
    }


def _scenes(comparison: Comparison) -> list[tuple[str, list[tuple[Run, str]]]]:
    """For each image what all norms make of it: (name, [(run, data URI), ...]).

    Each norm and split is shown by its first run that left pictures.
    """
    scenes: dict[str, list[tuple[Run, str]]] = {}
    shown = set()
    for run in comparison.runs:
        if (run.norm, run.split) not in shown:
            for name, uri in picture_strip(run.folder):
                shown.add((run.norm, run.split))
                scenes.setdefault(name, []).append((run, uri))
    return list(scenes.items())


def picture_strip(folder: Path) -> list[tuple[str, str]]:
    """(name, data URI) of the first few of `folder/pictures`; unreadable files are left out.

    Sorted by name, so that runs evaluated on the same images show the same ones.
    """
    paths = sorted(p for p in (folder / "pictures").glob("*") if p.suffix in (".png", ".jpg"))
    strip = []
    for path in paths[:MAX_PICTURES]:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError):  # of a run that was ended while it wrote
            continue
        image.thumbnail((MAX_WIDTH, image.height))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=82)
        data = base64.b64encode(jpeg.getvalue()).decode("ascii")
        strip.append((path.stem, f"data:image/jpeg;base64,{data}"))
    return strip


def _run_facts(run: Run, result: dict) -> dict[str, str]:
    boxes = (result.get("results") or {}).get("bbox") or {}
    seconds = result.get("train_seconds")
    return {
        "split": str(run.split),
        "seed": str(run.seed),
        "AP": "-" if boxes.get("AP") is None else f"{boxes['AP']:.1f}",
        **tables.cost_cells(result),
        "training": "-" if seconds is None else _duration(seconds),
        "device": str(result.get("device") or "-"),
    }


def _either(values: list) -> str:
    return " / ".join(map(str, values))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
