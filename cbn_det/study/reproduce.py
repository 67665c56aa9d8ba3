"""The rows of published tables: what each runs, and what has been measured of it so far.

A row always has the images per GPU and the total batch of its config. On fewer GPUs than the config
is for, each accumulates gradients of several mini-batches; norms see the same mini-batches then. It
is another row all the same for SyncBN, whose mini-batch is that of all GPUs together, and for norms
that train with what they remember: of a step that is several mini-batches then instead of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..config_files import CONFIGS
from ..run.files import read_result
from .plan import LAUNCHER, SET_BY_THE_PLAN, Run, Split, dataset_words, signature
from .published import Published, Table
from .recipes import device, read_yaml, schedule
from .results import TASKS, Measured, metrics_with_truth, reason_of

COCO_TABLES = CONFIGS / "coco"
#: norms that differences are taken to, where a table has them, with the names readers know
BASELINES = {"none": "none", "bn": "BN", "syncbn": "SyncBN", "gn": "GN"}
_CBN = ("cbn", "cbn_naive", "cbn_as_released")
_ORDER = (*BASELINES, "gn+ws", "brn", *_CBN, "kn", "gkn", "mbn", "bgn")
#: norms that train with what they remember of earlier steps
_REMEMBERING = ("brn", *_CBN, "mbn")
NOT_FINISHED = {"status": "not finished", "message": "it runs, or was interrupted"}


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

    def published_ap(self, task: str, metric: str = "AP") -> float | None:
        return self.published.values[task].get(metric) if self.published else None

    def departures(self, gpus: int, accumulated: int) -> list[str]:
        """In what a run on so many GPUs, with so many mini-batches of each a step, is not this
        row."""
        found, here = [], f"{self.name}: on {gpus} GPU{'s' * (gpus > 1)}"
        if self.norm == "syncbn" and gpus != self.gpus:
            ours, own = gpus * self.images, self.gpus * self.images
            found.append(f"{here} SyncBN normalises over {ours} images, in the row over {own}")
        if self.norm in _REMEMBERING and accumulated > 1:
            found.append(f"{here} a remembered step is of {accumulated} mini-batches, in the row 1")
        if gpus * accumulated != self.gpus:
            ours, own = gpus * accumulated * self.images, self.gpus * self.images
            found.append(f"{here} a step had {ours} images, in the row {own}")
        return found


def layouts(measured: Measured) -> list[tuple[int, int]]:
    """(GPUs, accumulated mini-batches) of the finished runs of a row."""
    found = ((one["world_size"], one.get("accumulate") or 1) for one in measured.finished)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Reproduction:
    """How rows are run, and where their results are looked for.

    Args:
        output: runs go to ``output/TABLE/ROW_seedS-HASH``; the hash stands for the config's content
            and for everything below that changes what is trained.
        gpus: of a run, on each of its machines; None: as many as its config is for.
        machines: that the GPUs of a run are spread over.
        iterations: another length of training, to try things out; None: the config's.
        precise_bn, datasets, overrides: see :class:`~cbn_det.study.plan.Plan`.
        configs: folder of the tables.

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
        taken = [key for key in self.overrides[::2] if key in SET_BY_THE_PLAN]
        if taken:
            raise ValueError(f"{taken[0]} belongs to the row: --opts cannot change it")

    @property
    def is_changed(self) -> bool:
        """Whether what is run is something else than the table's rows."""
        return bool(self.iterations or self.datasets or self.overrides)

    def rows(self, table: Table, names: Sequence[str] = ()) -> list[Row]:
        """The rows of a table, by images per GPU and norm.

        Args:
            names: only these: of a row ("cbn_2img") or a norm ("cbn", at any number of images).

        Raises:
            ValueError: there is no such row.
        """
        rows = [Row(table, path) for path in (self.configs / table.name).glob("*.yaml")]
        rows.sort(key=lambda row: (row.images, (*_ORDER, row.norm).index(row.norm), row.name))
        known = {name for row in rows for name in (row.name, row.norm)}
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = ", ".join(row.name for row in rows)
            raise ValueError(f"{table.name} has no row {unknown[0]!r}; known are {listed}")
        return [row for row in rows if not names or {row.name, row.norm} & set(names)]

    def run(self, row: Row, seed: int) -> Run:
        """
        Raises:
            ValueError: the row's mini-batches cannot be shared out among the GPUs.
        """
        ranks, accumulate = self._split(row)
        folder = self.output / row.table.name / f"{row.name}_seed{seed}-{self._hash(row)}"
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

    def runs(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
        """In an order that gives every row its first seed early."""
        return [self.run(row, seed) for seed in seeds for row in rows]

    def on_gpu(self, rows: Sequence[Row]) -> bool:
        """Whether any row asks for a GPU."""
        return any(device(row.config, self.overrides) != "cpu" for row in rows)

    def departures(self, row: Row) -> list[str]:
        """In what the runs asked for are not the row.

        Raises:
            ValueError: as :meth:`run`.
        """
        return row.departures(*self._split(row))

    def measured(self, table: Table) -> dict[str, Measured]:
        """What runs have left so far by row name, however many GPUs they ran on."""
        left = [(row, self._results(row)) for row in self.rows(table)]
        asked = metrics_with_truth(result for _, results in left for result in results)
        measured = {}
        for row, results in left:
            split = Split(row.gpus, row.images)
            known = measured[row.name] = Measured(row.norm, split, [], [], asked)
            for result in results:
                if result.get("status") != "finished":
                    known.reasons.append(reason_of(result))
                elif result.get("images_per_gpu") != row.images:
                    why = f"trained at {result.get('images_per_gpu')} images per GPU"
                    known.reasons.append(why)
                else:
                    known.finished.append(result)
        return measured

    def _results(self, row: Row) -> list[dict]:
        folders = (self.output / row.table.name).glob(f"{row.name}_seed*-{self._hash(row)}")
        return [read_result(folder) or NOT_FINISHED for folder in sorted(folders)]

    def _split(self, row: Row) -> tuple[int, int]:
        """(GPUs, mini-batches that each accumulates) of a run."""
        ranks = (self.gpus or max(1, row.gpus // self.machines)) * self.machines
        if row.gpus % ranks:
            fitting = [str(n) for n in range(1, row.gpus + 1) if row.gpus % n == 0]
            raise ValueError(
                f"{row.name}: {row.gpus} mini-batches of {row.images} make a step, which {ranks} "
                f"GPUs cannot share: choose {', '.join(fitting)} in all"
            )
        return ranks, row.gpus // ranks

    def _changes(self, row: Row) -> list[str]:
        """The options of the launcher that make something else of a row."""
        return [
            *dataset_words(self.datasets),
            *(schedule(row.config, self.iterations) if self.iterations else []),
            *self.overrides,
        ]

    def _hash(self, row: Row) -> str:
        # Of values, not of the text: a comment in a config changes nothing.
        settings = {key: value for key, value in row.settings.items() if key != "OUTPUT_DIR"}
        return signature([settings, self._changes(row)])
