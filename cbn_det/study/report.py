"""report.html: everything about a comparison in one file that needs nothing else to be read."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from cbn_det.shell import join
from cbn_det.study import tables
from cbn_det.study.figures import ONE_PANEL, colours, to_svg
from cbn_det.study.plan import Plan, Run, Split
from cbn_det.study.results import Row

TEMPLATE = "report.html.jinja"
# Of each run; and in pixels, so that an enlarged one shows the names of classes.
MAX_PICTURES = 4
MAX_WIDTH = 1600


@dataclass
class Comparison:
    """A comparison that has been run.

    Args:
        plan: what was asked for.
        results: every run with the content of its result.json.
        rows: the same as mean and spread over seeds.
        command: the command line that was given.
        seconds: how long it took.
        reused: how many of the runs were finished before.
        config_iterations: the config's own length of training, if it has one.
    """

    plan: Plan
    results: list[tuple[Run, dict]]
    rows: list[Row]
    command: str
    seconds: float
    reused: int = 0
    config_iterations: int | None = None
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))

    @property
    def wall(self) -> str:
        """How long it took, for a reader; where nothing was left to train, how long that took."""
        if not self.results or self.reused < len(self.results):
            return _duration(self.seconds)
        trained = sum(result.get("train_seconds") or 0.0 for _, result in self.results)
        runs = "the run was" if self.reused == 1 else f"all {self.reused} runs were"
        return f"{runs} finished before, after {_duration(trained)} of training in all"

    @property
    def title(self) -> str:
        plan = self.plan
        recipe = f"recipe '{plan.recipe}', " if plan.config is None else ""
        return f"Comparison of norms, {recipe}{plan.config_name}, {plan.engine} engine"


def render(comparison: Comparison, figures: dict[str, Figure | None]) -> str:
    """The page as text; `figures` are put in under their captions, those that are None left out."""
    # Names and messages come from configs and exceptions: every value is escaped.
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(TEMPLATE).render(
        comparison=comparison,
        plan=comparison.plan,
        headline=_headline(comparison.plan),
        facts=_facts(comparison),
        tables=[
            (table.heading, list(zip(table.rows, table.lines, strict=True)))
            for table in tables.make_tables(comparison.rows)
        ],
        classes=[(table.heading, table.lines) for table in tables.of_classes(comparison.rows)],
        notes=tables.notes(comparison.rows, comparison.config_iterations, comparison.plan.expected),
        figures=[
            (caption, Markup(to_svg(f)), f.get_figwidth() > ONE_PANEL)
            for caption, f in figures.items()
            if f
        ],
        scenes=_scenes(comparison),
        machines=tables.machines(comparison.results),
        versions=tables.versions(comparison.results),
        runs=[(run, _run_facts(run, result), result) for run, result in comparison.results],
        commands=[(run.label, join(run.command)) for run, _ in comparison.results],
        colours=colours([row.norm for row in comparison.rows]),
        words=tables.in_words,
    )


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
    data = [result.get("dataset") or {} for _, result in comparison.results]
    return {
        "iterations": _either(lengths or [plan.iterations or "the config's"]),
        "seeds": " ".join(map(str, plan.seeds)),
        "splits": _either([_split(split) for split in plan.splits]),
        "train": _either(list(dict.fromkeys(n for d in data for n in d.get("train", [])))),
        "test": _either(list(dict.fromkeys(n for d in data for n in d.get("test", [])))),
        "wall": comparison.wall,
    }


def _scenes(comparison: Comparison) -> list[tuple[str, list[tuple[Run, str]]]]:
    """For each image what all norms make of it: (name, [(run, data URI), ...]).

    Each norm and split is shown by its first run that left pictures.
    """
    strips: dict[tuple, tuple[Run, list[tuple[str, str]]]] = {}
    for run, _ in comparison.results:
        if (run.norm, run.split) not in strips:
            pictures = picture_strip(run.folder)
            if pictures:
                strips[run.norm, run.split] = (run, pictures)
    scenes: dict[str, list[tuple[Run, str]]] = {}
    for row in comparison.rows:
        run, pictures = strips.get((row.norm, row.split), (None, []))
        for name, uri in pictures:
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
    parameters, flops, seconds = (
        result.get(key) for key in ("parameters", "flops", "train_seconds")
    )
    return {
        "split": str(run.split),
        "seed": str(run.seed),
        "AP": _number(boxes.get("AP"), ".1f"),
        "s/iter": _number(result.get("sec_per_iter"), ".3f"),
        "peak MB": _number(result.get("peak_memory_mb"), ".0f"),
        "training": "-" if seconds is None else _duration(seconds),
        "parameters": "-" if parameters is None else f"{parameters / 1e6:.2f} M",
        "FLOPs": "-" if flops is None else f"{flops / 1e9:.2f} G",
        "device": str(result.get("device") or "-"),
    }


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _either(values: list) -> str:
    return " / ".join(map(str, values))


def _split(split: Split) -> str:
    return f"{split.images}" + (f" on each of {split.ranks} processes" if split.ranks > 1 else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
