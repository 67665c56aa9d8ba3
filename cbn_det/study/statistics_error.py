"""Measures how far norms' statistics are from the truth while detectors train at small batches.

:mod:`cbn_det.run.statistics_error` says what is measured, and why one training serves all norms.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cbn_det.study.compare import EXIT_FAILED, announce, say, side_by_side, train_backbone
from cbn_det.study.engine import LAUNCHER
from cbn_det.study.plan import Plan, Split
from cbn_det.study.recipes import RECIPES, config_iterations
from cbn_det.study.runner import Outcome, interruptible, locked, run_all
from cbn_det.study.statistics_report import write_report
from cbn_det.study.statistics_results import Measured, read_points

#: Without burn-in where a norm has one that is a matter of choice: nothing depends on these layers,
#: and where their curves cross BN's is what a burn-in should be. BRN's is part of the method.
NORMS = [
    "BN",
    "CBN(burn_in=0)",
    "CBN(burn_in=0, compensation='none')",
    "MBN(burn_in=0)",
    "MBN(burn_in=0, double_forward=False)",
    "KN",
    "BRN",
    "BGN",
    "CBN(burn_in=0, window=8, compensation='none')",
    "KN(gain=0.5)",
]
#: of the training; the learning rate of the built-in recipes drops at 0.8
MOMENTS = (0.1, 0.3, 0.5, 0.78, 1.0)


@dataclass
class Experiment:
    """What to measure, and where.

    Args:
        output: folder of the experiment; runs go below `output/runs`.
        norms: whose statistics are measured, as in a config; BN is measured in any case.
        images: images per GPU, one run for each and each seed.
        seeds: of the runs.
        engine: detectron2 or standalone.
        trained_with: the norm that the networks are trained with, for all sizes.
        truth_images: training images that the truth is taken from.
        reference: a norm that the others are compared with, mini-batch by mini-batch; None for
            none.
        iterations: length of the runs; None: the config's SOLVER.MAX_ITER. With
            SOLVER.REFERENCE_WORLD_SIZE the learning rate follows the images, the length does not.

    The others are those of :class:`~cbn_det.study.plan.Plan`.

    Raises:
        ValueError: the config does not say how long to train, or the overrides do.
    """

    output: Path
    norms: list[str]
    images: list[int]
    seeds: list[int]
    engine: str
    trained_with: str = "BN"
    truth_images: int = 200
    reference: str | None = None
    iterations: int | None = None
    recipe: str = "scratch"
    config: Path | None = None
    datasets: list[list[str]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    launcher: tuple[str, ...] = LAUNCHER

    def __post_init__(self) -> None:
        reference = [self.reference] if self.reference else []
        self.norms = list(dict.fromkeys(["BN", *reference, *self.norms]))
        config = self.config or RECIPES[self.recipe].config
        if "SOLVER.MAX_ITER" in self.overrides[::2]:
            raise ValueError("SOLVER.MAX_ITER is set by --iters, not by --opts")
        self.length = self.iterations or config_iterations(config)
        if self.length is None:
            raise ValueError(
                f"{config} does not set SOLVER.MAX_ITER: --iters says how long to train"
            )

    def plan(self) -> Plan:
        """The runs, which are not evaluated."""
        request = {"norms": self.norms, "at": self.moments(), "images": self.truth_images}
        if self.reference:
            request["reference"] = self.reference
        return Plan(
            self.output,
            [self.trained_with],
            [Split(1, images) for images in self.images],
            self.seeds,
            self.engine,
            recipe=self.recipe,
            config=self.config,
            # not None, which lets a config scale its length, away from the moments
            iterations=self.length,
            precise_bn=0,
            datasets=self.datasets,
            overrides=["DATASETS.TEST", "()", *self.overrides],
            flags=["--statistics-error", json.dumps(request)],
            launcher=self.launcher,
        )

    def moments(self) -> list[int]:
        """Iterations before which to measure."""
        return sorted({max(1, round(part * self.length)) - 1 for part in MOMENTS} - {0})

    @property
    def title(self) -> str:
        recipe = self.recipe if self.config is None else self.config.stem
        return (
            f"Errors of norms' statistics: {recipe}, trained with {self.trained_with}, "
            f"{self.engine} engine, {self.length} iterations"
        )


def measure(
    experiment: Experiment, jobs: int, dry_run: bool = False, gpus: Sequence[str] = ()
) -> int:
    """Run everything that is not finished yet, then print and write the report.

    Args:
        jobs: runs side by side.
        dry_run: only print the commands.
        gpus: names for CUDA_VISIBLE_DEVICES, shared out among the runs.

    Returns:
        an exit code: 0, also when a run diverged, 1 when a run failed.

    Raises:
        KeyboardInterrupt, OSError, RuntimeError, ValueError: as in
            :func:`cbn_det.study.compare.compare`.
    """
    plan = experiment.plan()
    pretrain, runs = plan.pretrain_run(), plan.runs()
    if dry_run:
        plan.print_commands()
        return 0
    started = time.monotonic()
    with locked(plan.output), interruptible():
        broken = train_backbone(pretrain, gpus) if pretrain else None
        if broken:
            outcomes = [Outcome(run, {"status": "failed", "message": broken}) for run in runs]
        else:
            say(
                f"training with {experiment.trained_with} on the {plan.engine} engine: "
                f"{len(runs)} run{'s' * (len(runs) > 1)}, {side_by_side(runs, jobs, gpus)}, "
                f"in {plan.output / 'runs'}"
            )
            outcomes = run_all(runs, jobs, announce, gpus=gpus)
        measured = [
            Measured(o.run, o.result, read_points(o.run.folder), experiment.length)
            for o in outcomes
        ]
        command = shlex.join(["python", *sys.argv])
        text, paths = write_report(
            plan.output,
            experiment.title,
            command,
            experiment.norms,
            measured,
            experiment.reference,
        )
    print("\n" + text)
    seconds = time.monotonic() - started
    print(f"Files: {', '.join(map(str, paths))}. Wall time {seconds:.0f} s.", flush=True)
    return EXIT_FAILED if any(o.result.get("status") == "failed" for o in outcomes) else 0
