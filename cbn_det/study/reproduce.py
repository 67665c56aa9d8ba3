"""Reproduces published tables: what each row runs, what has been measured, how far apart they are.

A row always has the images per GPU and the total batch of its config. On fewer GPUs than the config
is for, each accumulates gradients of several mini-batches; norms see the same mini-batches then. It
is another row all the same for SyncBN, whose mini-batch is that of all GPUs together, and for norms
that train with what they remember: of a step that is several mini-batches then instead of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cbn_det.config_files import CONFIGS
from cbn_det.study.plan import LAUNCHER, Run
from cbn_det.study.published import TABLES, Published, Table, Values
from cbn_det.study.recipes import read_yaml, schedule
from cbn_det.study.results import TASKS, Spread, metrics_with_truth, read_result, spread_of

COCO_TABLES = CONFIGS / "coco"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
#: norms that differences are taken to, where a table has them
BASELINES = ("none", "bn", "syncbn", "gn")
_ORDER = (*BASELINES, "brn", "cbn", "cbn_as_released", "kn", "gkn", "mbn", "bgn")
#: norms that train with what they remember of earlier steps
REMEMBERING = ("brn", "cbn", "cbn_as_released", "mbn")
_SET_HERE = ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "SEED", "OUTPUT_DIR")


@dataclass(frozen=True)
class Row:
    """One config of a table."""

    table: Table
    config: Path

    @property
    def name(self) -> str:
        return self.config.stem

    @property
    def norm(self) -> str:
        return self.name.rpartition("_")[0]

    @cached_property
    def settings(self) -> dict:
        """What the config and those it builds on set."""
        return read_yaml(self.config)

    @property
    def gpus(self) -> int:
        """How many GPUs the config's batch and schedule are for.

        Raises:
            ValueError: the config does not say.
        """
        number = self.settings["SOLVER"].get("REFERENCE_WORLD_SIZE")
        if not number:
            raise ValueError(f"{self.config}: SOLVER.REFERENCE_WORLD_SIZE is missing")
        return number

    @property
    def images(self) -> int:
        """Images per GPU."""
        return self.settings["SOLVER"]["IMS_PER_BATCH"] // self.gpus

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.settings["MODEL"].get("MASK_ON") else TASKS[:1]

    @property
    def published(self) -> Published | None:
        return self.table.published.get(self.name)


@dataclass(frozen=True)
class Measured:
    """What the runs of a row have left so far.

    Attributes:
        ap: by task and metric, over the seeds that finished; None where there is no such number.
        ap_precise: box and mask AP with PreciseBN statistics.
        states: of the runs that are not finished: "not finished", "failed: ...", "diverged: ...".
        splits: (GPUs, images per GPU, accumulated mini-batches) of the finished runs.
        results: of the finished runs.
    """

    ap: dict[str, dict[str, Spread | None]]
    ap_precise: dict[str, Spread | None]
    states: list[str]
    splits: list[tuple[int, int, int]]
    results: list[dict]


@dataclass(frozen=True)
class Reproduction:
    """How rows are run, and where their results are looked for.

    Args:
        output: runs go to ``output/TABLE/ROW_seedS-HASH``; the hash stands for the config's content
            and for everything below that changes what is trained.
        gpus: of a run, on each of its machines; None: as many as its config is for.
        machines: that the GPUs of a run are spread over.
        iterations: another length of training, to try things out; None: the config's.
        precise_bn: iterations of PreciseBN for a second evaluation; 0: none.
        datasets: (name, annotations, images) triples for ``--coco-dataset``.
        overrides: KEY VALUE pairs of the config, for every row.
        configs: folder of the tables.
        launcher: how a run is started.

    Raises:
        ValueError: an override of what a row says itself.
    """

    output: Path
    gpus: int | None = None
    machines: int = 1
    iterations: int | None = None
    precise_bn: int = 200
    datasets: list[list[str]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    configs: Path = COCO_TABLES
    launcher: tuple[str, ...] = LAUNCHER

    def __post_init__(self) -> None:
        taken = [key for key in self.overrides[::2] if key in _SET_HERE]
        if taken:
            raise ValueError(f"{taken[0]} belongs to the row: --opts cannot change it")

    @property
    def is_changed(self) -> bool:
        """Whether what is run is something else than the table's rows."""
        return bool(self.iterations or self.datasets or self.overrides)

    def table(self, name: str) -> Table:
        """
        Raises:
            ValueError: there is no such table.
        """
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; known are {', '.join(TABLES)}")
        return TABLES[name]

    def rows(self, table: Table, names: Sequence[str] = ()) -> list[Row]:
        """The rows of a table, by images per GPU and norm.

        Args:
            names: only these: of a row ("cbn_2img") or a norm ("cbn", at any number of images).

        Raises:
            ValueError: there is no such row.
        """
        rows = [Row(table, path) for path in (self.configs / table.name).glob("*.yaml")]
        rows.sort(key=lambda row: (row.images, _place(row.norm), row.name))
        unknown = [name for name in names if name not in {r.name for r in rows} | _norms(rows)]
        if unknown or not rows:
            known = ", ".join(row.name for row in rows)
            raise ValueError(f"{table.name} has no row {unknown[0]!r}; known are {known}")
        return [row for row in rows if not names or {row.name, row.norm} & set(names)]

    def run(self, row: Row, seed: int) -> Run:
        """
        Raises:
            ValueError: the row's mini-batches cannot be shared out among the GPUs.
        """
        ranks = (self.gpus or max(1, row.gpus // self.machines)) * self.machines
        if row.gpus % ranks:
            raise ValueError(
                f"{row.name}: {row.gpus} mini-batches of {row.images} make a step, which {ranks} "
                f"GPUs cannot share: choose {_divisors(row.gpus)} in all"
            )
        accumulate = row.gpus // ranks
        folder = self._folder(row, seed)
        command = (
            *self.launcher,
            *("--config-file", str(row.config), "--engine", "detectron2"),
            *("--num-gpus", str(ranks // self.machines)),
            *(("--accumulate", str(accumulate)) if accumulate > 1 else ()),
            *(("--precise-bn-iters", str(self.precise_bn)) if self.precise_bn else ()),
            *self._changes(row),
            *("SEED", str(seed), "OUTPUT_DIR", str(folder)),
        )
        label = f"{row.table.name} {row.name} seed {seed}"
        return Run(label, folder, command, ranks, row.norm, seed=seed)

    def caveat(self, row: Row) -> str | None:
        """What is not the row's own where its runs get the GPUs asked for."""
        ranks = (self.gpus or max(1, row.gpus // self.machines)) * self.machines
        if ranks == row.gpus or row.gpus % ranks:  # the latter is refused by `run`
            return None
        if row.norm in REMEMBERING:
            return (
                f"{row.name}: what the norm remembers of a step is of {row.gpus // ranks} "
                "mini-batches there, on the row's GPUs of one: not the same row"
            )
        if row.norm != "syncbn":
            return None
        return (
            f"{row.name}: on {ranks} GPUs SyncBN normalises over {ranks * row.images} images, on "
            f"the {row.gpus} of the row over {row.gpus * row.images}: not the same row"
        )

    def measured(self, table: Table) -> dict[str, Measured]:
        """By row name: of all seeds, however many GPUs they ran on."""
        rows = self.rows(table)
        left = {row.name: self._left(row) for row in rows}
        asked = metrics_with_truth(result for finished, _ in left.values() for result in finished)
        return {row.name: _measured(row, *left[row.name], asked) for row in rows}

    def _left(self, row: Row) -> tuple[list[dict], list[str]]:
        """The results of a row's finished runs, and the states of the others."""
        finished, states = [], []
        pattern = f"{row.name}_seed*-{self._hash(row)}"
        for folder in sorted((self.output / row.table.name).glob(pattern)):
            result = read_result(folder)
            if result is None:
                states.append("not finished")
            elif result.get("status") != "finished":
                states.append(f"{result.get('status')}: {result.get('message')}")
            elif result.get("images_per_gpu") != row.images:
                states.append(f"trained at {result.get('images_per_gpu')} images per GPU")
            else:
                finished.append(result)
        return finished, states

    def _folder(self, row: Row, seed: int) -> Path:
        return self.output / row.table.name / f"{row.name}_seed{seed}-{self._hash(row)}"

    def _changes(self, row: Row) -> list[str]:
        """The options of the launcher that make something else of a row."""
        return [
            *[word for triple in self.datasets for word in ("--coco-dataset", *triple)],
            *(schedule(row.config, self.iterations) if self.iterations else []),
            *self.overrides,
        ]

    def _hash(self, row: Row) -> str:
        # Of values, not of the text: a comment in a config changes nothing.
        settings = {key: value for key, value in row.settings.items() if key != "OUTPUT_DIR"}
        identity = json.dumps([settings, self._changes(row)], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:8]


def differences(
    values: dict[str, Values | None], baseline: str, task: str, metric: str = "AP"
) -> dict[str, float]:
    """
    How far each row is from the row of the same images per GPU with another norm.

    Args:
        values: by row name; None for rows without numbers.
        baseline: a norm, in small letters.

    Returns:
        by row name; rows for which one of the two numbers is missing are left out, and the baseline
        itself.
    """
    found = {}
    for name, own in values.items():
        norm, _, images = name.rpartition("_")
        other = values.get(f"{baseline}_{images}")
        pair = [(v or {}).get(task, {}).get(metric) for v in (own, other)]
        if norm != baseline and None not in pair:
            found[name] = pair[0] - pair[1]
    return found


def means(measured: Measured) -> Values:
    """The means over seeds, in the form of published numbers."""
    return {
        task: {metric: spread.mean for metric, spread in metrics.items() if spread is not None}
        for task, metrics in measured.ap.items()
    }


def _measured(
    row: Row, finished: list[dict], states: list[str], asked: set[tuple[str, str]]
) -> Measured:
    """
    Args:
        asked: tasks and metrics that the table's data have objects for.
    """

    def spread(source: str, task: str, metric: str) -> Spread | None:
        return spread_of(finished, source, task, metric, asked)

    return Measured(
        {
            task: {metric: spread("results", task, metric) for metric in METRICS}
            for task in row.tasks
        },
        {task: spread("results_precise_bn", task, "AP") for task in row.tasks},
        states,
        list(dict.fromkeys(_split(result) for result in finished)),
        finished,
    )


def _split(result: dict) -> tuple[int, int, int]:
    return result["world_size"], result["images_per_gpu"], result.get("accumulate") or 1


def _norms(rows: list[Row]) -> set[str]:
    return {row.norm for row in rows}


def _place(norm: str) -> int:
    return _ORDER.index(norm) if norm in _ORDER else len(_ORDER)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
