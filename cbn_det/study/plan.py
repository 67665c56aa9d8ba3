"""What a comparison runs: the matrix norms x splits x seeds as launcher command lines.

A split is a number of processes, one a GPU, and images per process.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..cli import join
from ..coco_sets import check_coco_sets
from .recipes import (
    RECIPES,
    batch,
    config_texts,
    data_sets,
    device,
    norm_keys,
    norm_words,
    schedule,
    setting,
)

LAUNCHER = (sys.executable, "-m", "cbn_det", "train")
# In the path of a base config: the norm's name in small letters, "cbn" for "CBN(window=8)".
PLACE_OF_NORM = "{norm}"
# What the matrix sets itself, and the arguments of the tool that say to what.
SET_BY_THE_PLAN = {
    "SOLVER.IMS_PER_BATCH": "--images-per-gpu and --num-gpus",
    "SOLVER.REFERENCE_WORLD_SIZE": "--images-per-gpu and --num-gpus",
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output",
}


@dataclass(frozen=True, order=True)
class Split:
    """How a total SGD batch is divided: `ranks` processes x `images` per process (per GPU)."""

    ranks: int
    images: int

    @property
    def total(self) -> int:
        return self.ranks * self.images

    def __str__(self) -> str:
        return f"{self.ranks}x{self.images}"

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read "RxI", e.g. "4x2": 4 ranks with 2 images each. Raises ValueError otherwise."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
        if not found:
            raise ValueError(f"split {text!r}: expected RANKSxIMAGES, e.g. 4x2")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Run:
    """One training run: a folder and the command that fills it, without `--resume`."""

    label: str
    folder: Path
    command: tuple[str, ...]
    ranks: int = 1
    norm: str | None = None  # None: the pre-training run of a recipe
    split: Split | None = None
    seed: int | None = None


@dataclass
class Plan:
    """A comparison on one engine. Rows of different world size or total batch share no table.

    Args:
        output: runs go below `output/runs`.
        norms: norm specs as in a config, e.g. "GN", "CBN(window=4)"; "none" for no norm.
        reference: whether BN with the same total batches on one rank is trained too: what a norm
            that makes up for the small batch would reach.
        engine: detectron2 or standalone; part of what a run is, so that two engines never mix.
        recipe: a name of `RECIPES`.
        config: base config in place of the recipe's own. With "{norm}" in its path, each norm has a
            config of its own, whose norms are left as they are where the spec has no options.
        sites: names of `cbn_det.study.recipes.SITES` to put the norm at; None: as the config does.
        iterations: the config's schedule is scaled to so many; None: it is left alone.
        precise_bn: iterations of PreciseBN for a second evaluation; 0: none.
        datasets: (name, annotations, images) triples for `--coco-dataset`.
        overrides: KEY VALUE pairs of the config, for every compared run.
        flags: further arguments of the launcher, for every compared run.
        machines: that the ranks of a run are spread over.

    Raises:
        ValueError: an unknown site, an engine that cannot run a split, ranks that the
            machines cannot share, an override of what the plan sets, or a data set that is missing
            or not used.
    """

    output: Path
    norms: list[str]
    splits: list[Split]
    seeds: list[int]
    engine: str
    recipe: str = "scratch"
    config: Path | None = None
    reference: bool = False
    iterations: int | None = None
    precise_bn: int = 50
    datasets: list[list[str]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    sites: list[str] | None = None
    machines: int = 1
    launcher: tuple[str, ...] = LAUNCHER

    def __post_init__(self) -> None:
        wide = [str(split) for split in self.splits if split.ranks > 1]
        if wide and self.engine == "standalone":
            raise ValueError(
                f"split {' '.join(wide)}: the standalone engine runs one process only; splits with "
                "more than one rank need --engine detectron2"
            )
        odd = [str(split) for split in self.splits if split.ranks % self.machines]
        if odd:
            raise ValueError(f"split {' '.join(odd)}: {self.machines} machines cannot share that")
        taken = [key for key in self.overrides[::2] if key in SET_BY_THE_PLAN]
        if taken:
            raise ValueError(f"{taken[0]} is set by {SET_BY_THE_PLAN[taken[0]]}, not by --opts")
        norm_keys(None, self.recipe, self.engine, self.sites)
        if self.datasets:
            for norm in self.norms:
                check_coco_sets(self.datasets, *data_sets(self.config_of(norm), self.overrides))

    @property
    def config_file(self) -> Path:
        """The base config, with "{norm}" in it where each norm has its own."""
        return self.config or RECIPES[self.recipe].config

    @property
    def config_name(self) -> str:
        """The base config for a reader: with its folder, where that tells more than the name."""
        return "/".join(self.config_file.parts[-2 if self.has_config_per_norm else -1 :])

    @property
    def expected(self) -> str:
        """What is known of short runs of the recipe at 2 images; "" of any others."""
        changed = self.config is not None or self.sites is not None or self.datasets
        return "" if changed or self.splits != [Split(1, 2)] else RECIPES[self.recipe].expected

    @property
    def config_iterations(self) -> int | None:
        """The config's own length of training, where the runs are given another."""
        # a whole schedule, scaled to more images a step, has fewer iterations and is not short
        if not self.iterations and "SOLVER.MAX_ITER" not in self.overrides[::2]:
            return None
        return setting(self.config_of(self.norms[0]), "SOLVER.MAX_ITER")

    @property
    def has_config_per_norm(self) -> bool:
        return PLACE_OF_NORM in str(self.config_file)

    def config_of(self, norm: str) -> Path:
        """The base config of a norm's runs."""
        name = norm.partition("(")[0].strip().lower()
        return Path(str(self.config_file).replace(PLACE_OF_NORM, name))

    @property
    def on_gpu(self) -> bool:
        """Whether the compared runs ask for a GPU."""
        return device(self.config_of(self.norms[0]), self.overrides) != "cpu"

    def pretrain_run(self) -> Run | None:
        """The run that trains the recipe's backbone, the same whatever is compared.

        None where the recipe has none, or where a config of the user's own names its MODEL.WEIGHTS.
        """
        config = RECIPES[self.recipe].pretrain
        if config is None or self.config is not None:
            return None
        return self._run("pretrain", config, 1, [])

    def runs(self) -> list[Run]:
        """The compared runs, in an order that lets every norm start early."""
        pretrain = self.pretrain_run()
        runs = []
        for seed in self.seeds:
            for split, norms in self._rows().items():
                for norm in norms:
                    config = self.config_of(norm)
                    options = [
                        *(["--precise-bn-iters", str(self.precise_bn)] if self.precise_bn else []),
                        *self.flags,
                        *dataset_words(self.datasets),
                        *self._norm_words(norm),
                        *batch(config, split.ranks, split.images, self.iterations),
                        *("SEED", str(seed)),
                        *(schedule(config, self.iterations) if self.iterations else []),
                        *(["MODEL.WEIGHTS", str(backbone_file(pretrain))] if pretrain else []),
                        *self.overrides,
                    ]
                    label = f"{norm} {split} seed {seed}"
                    extra = {"norm": norm, "split": split, "seed": seed}
                    runs.append(self._run(label, config, split.ranks, options, **extra))
        return runs

    def print_commands(self) -> None:
        """What would be started, a line each, for a shell."""
        pretrain = self.pretrain_run()
        for run in [*([pretrain] if pretrain else []), *self.runs()]:
            print(join(run.command))

    def _rows(self) -> dict[Split, list[str]]:
        """The norms to compare at each split."""
        rows = {split: list(dict.fromkeys(self.norms)) for split in self.splits}
        if self.reference:
            for split in self.splits:
                norms = rows.setdefault(Split(1, split.total), [])
                norms += [] if "BN" in norms else ["BN"]
        return rows

    def _norm_words(self, norm: str) -> list[str]:
        if self.has_config_per_norm and "(" not in norm and self.sites is None:
            return []
        config = self.config_of(norm) if self.config is not None else None
        return norm_words(norm_keys(config, self.recipe, self.engine, self.sites), norm)

    def _run(self, label: str, config: Path, ranks: int, options: list[str], **extra) -> Run:
        # The folder's place and how the processes are started are no part of what a run is; the
        # configs' contents and our version are.
        place = str(self.output)
        identity = [*config_texts(config), __version__, self.engine, str(ranks)]
        identity += [option.replace(place, "") for option in options]
        slug = re.sub(r"[^A-Za-z0-9.=x-]+", "_", label).strip("_")
        folder = self.output / "runs" / f"{slug}-{signature(identity)}"
        head = (*self.launcher, "--config-file", str(config), "--engine", self.engine)
        gpus = ("--num-gpus", str(max(1, ranks // self.machines)))
        command = (*head, *gpus, *options, "OUTPUT_DIR", str(folder))
        return Run(label, folder, command, ranks, **extra)


def dataset_words(datasets: list[list[str]]) -> list[str]:
    """``--coco-dataset`` for (name, annotations, images) triples."""
    return [word for triple in datasets for word in ("--coco-dataset", *triple)]


def signature(identity: Any) -> str:
    """Tells runs apart by what makes them what they are, in the names of their folders."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def backbone_file(pretrain: Run) -> Path:
    """Where the backbone of a pre-training run is kept for the runs that start from it."""
    return pretrain.folder / "backbone.pth"
