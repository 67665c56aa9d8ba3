"""What every process of a run does: prepare the data, train or evaluate, leave the run folder."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from torch import nn

from ..data.pictures import class_names, write_pictures
from ..data.worst_images import write_worst_images
from ..norms import image_share
from ..norms.freeze import with_freeze
from . import folder as run_folder
from .class_table import class_table
from .clock import RunClock
from .errors import ConfigError, one_line
from .files import remove_parts
from .folder import DIVERGED, FAILED, FINISHED
from .measure import count_parameters, peak_memory_mb
from .nonfinite import Diverged, PeerFailed, first_bad_state
from .signals import Interrupted, sigterm_interrupts

logger = logging.getLogger(__name__)

#: exit codes of a run; 130 is what shells give to Ctrl-C
OK, CRASHED, USAGE, NOT_FINITE, STOPPED = 0, 1, 2, 3, 130

T = TypeVar("T")


class Trainer(Protocol):
    """What a job needs of an engine's training loop."""

    iter: int
    clock: RunClock
    bare_model: nn.Module


class Job(ABC):
    """One process of a training or an evaluation. An engine's subclass says how each step is done;
    the order of the steps, and how a run ends that goes wrong, are the same for all.

    Args:
        cfg: checked by the engine's configuration code; not changed any more.
        args: the command line, with ``command``, its text.
        result: what :func:`~cbn_det.run.folder.describe` knows of the run.

    Attributes:
        trainer: set by :meth:`train` as soon as it exists.
        output: where results go: the run's folder, or that of an evaluation within it.
    """

    rank = 0
    world_size = 1

    def __init__(self, cfg: CfgNode, args: argparse.Namespace, result: dict[str, Any]) -> None:
        self.cfg = cfg
        self.args = args
        self.folder = Path(cfg.OUTPUT_DIR)
        self.output = self.folder / run_folder.EVALUATION if args.eval_only else self.folder
        self.result = result
        self.trainer: Trainer | None = None
        self._started = False
        self._earlier = run_folder.result_stamp(self.folder)

    @abstractmethod
    def prepare(self, eval_only: bool) -> None:
        """Makes the data sets known and checks them.

        Args:
            eval_only: no training image is needed.

        Raises:
            ValueError: they cannot be used.
        """

    @abstractmethod
    def train(self) -> dict[str, Any]:
        """Builds :attr:`trainer`, calls :meth:`start`, trains, and returns the results of the last
        evaluation."""

    @abstractmethod
    def build_trained(self) -> nn.Module:
        """The model with the weights to evaluate, which the result then names."""

    def weights_to_evaluate(self, checkpointer: Checkpointer) -> tuple[str, str]:
        """The file, and what names it in errors: the last checkpoint with ``--resume``, else
        ``MODEL.WEIGHTS``.

        Raises:
            ConfigError: there is neither.
        """
        path, named_by = self.cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS"
        if self.args.resume and checkpointer.has_checkpoint():
            path, named_by = checkpointer.get_checkpoint_file(), "--resume:"
        elif not path:
            raise ConfigError(f"--eval-only --resume: no checkpoint in {self.folder}")
        self.result["weights"] = path
        return path, named_by

    @abstractmethod
    def evaluate(self, model: nn.Module, folder: str | None = None) -> dict[str, Any]:
        """Results on ``DATASETS.TEST`` by task: ``{"bbox": {"AP": ...}}``.

        Args:
            folder: within :attr:`output`, for the predictions; None: where they are looked for.
        """

    @abstractmethod
    def evaluate_precise(self, model: nn.Module, iterations: int) -> dict[str, Any] | None:
        """The same with PreciseBN statistics, which are taken back; None without BatchNorm."""

    @abstractmethod
    def find_bad_layer(self) -> str | None:
        """After a divergence, the layer that the last batch's forward pass went bad in."""

    @abstractmethod
    def analyse_flops(self, model: nn.Module) -> FlopCountAnalysis:
        """fvcore's count of the model on the first test image."""

    @abstractmethod
    def test_files(self) -> tuple[str, str]:
        """Annotation file and image folder of the first test set, known once it was evaluated."""

    def draw(self) -> None:
        """Writes pictures of predictions beside annotations; after an evaluation on its own also
        the images with the lowest F1."""
        files = (self.output / run_folder.PREDICTIONS, *self.test_files())
        pictures = write_pictures(*files, self.output / "pictures")
        if not self.args.eval_only:
            _show_in_tensorboard(pictures, self.folder, self._iteration())
            return
        path = self.output / run_folder.WORST_IMAGES
        worst = write_worst_images(*files, path)
        if worst:
            logger.info(f"the {len(worst)} images with the lowest F1: {path}")

    def start(self) -> None:
        """Takes the folder over from the run before, once nothing can be refused any more: a
        forgotten argument costs nobody a finished training."""
        if self.rank == 0:
            if self.args.eval_only:
                run_folder.start_evaluation(self.output)
            else:
                remove_parts(self.folder)
                if self.args.resume:
                    run_folder.clear_result(self.folder)
                else:
                    run_folder.start_afresh(self.folder)
            run_folder.write_config(self.output, self.cfg)
        self.gather(None)  # no rank finds the earlier result any more
        self._started = True

    def count_flops(self, model: nn.Module) -> int | None:
        """Multiply-adds of one test image; None, with the reason in the log, for a model that
        cannot be traced."""
        training = model.training
        model.eval()
        try:
            analysis = self.analyse_flops(model)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return int(analysis.tracer_warnings("none").total())
        except Exception as error:  # tracing runs arbitrary model code; no run fails over this
            logger.warning(f"FLOPs are not counted: {type(error).__name__}: {error}")
            return None
        finally:
            model.train(training)

    def verify(self, results: dict[str, Any]) -> bool:
        """Whether the results are what the config expects."""
        return True

    def gather(self, value: T) -> list[T]:
        """The value of every rank. All ranks must call it."""
        return [value]

    def execute(self) -> int:
        """Runs the job and returns the exit code."""
        with sigterm_interrupts():
            try:
                return self._execute()
            except PeerFailed:
                return CRASHED  # the rank that failed says why
            except Exception as error:
                self._log_traceback()
                rank = f"rank {self.rank}: " if self.world_size > 1 else ""
                message = f"{rank}{type(error).__name__}: {one_line(error)}"
                code = self._end_alone(FAILED, message, CRASHED)
                traceback.print_exc()
                return code

    def _execute(self) -> int:
        try:
            # PreciseBN statistics come from training images
            without_training = self.args.eval_only and not self.args.precise_bn_iters
            built(lambda: self.prepare(without_training))
            facts = self._training_facts()  # refused before, not after, a long evaluation
            if self.args.eval_only:
                model = built(self.build_trained)
                for layer in with_freeze(model).values():
                    layer.freeze_statistics()  # the weights were trained with these, no others
                self.start()
                results = self.evaluate(model)
            else:
                results = self.train()
                model = self.trainer.bare_model
            iterations = self.args.precise_bn_iters if self.cfg.DATASETS.TEST else 0
            precise = self.evaluate_precise(model, iterations) if iterations else None
            shared = self._evaluate_image_share(model, facts)
            return self._finish(model, results, precise, shared)
        except ConfigError as error:
            self._log_traceback()
            return self._refuse(one_line(error))
        except Diverged as error:
            return self._end_together(DIVERGED, self._explain(error), NOT_FINITE, error.agreed)
        except Interrupted as error:
            return self._end_together(FAILED, str(error), STOPPED)
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            return self._end_alone(FAILED, f"interrupted at iteration {self._iteration()}", STOPPED)

    def _training_facts(self) -> dict[str, Any]:
        """``images_per_gpu`` and ``world_size`` of the training, which an evaluation may differ in.

        Raises:
            ConfigError: ``--image-share auto`` needs them, and nobody knows.
        """
        if not self.args.eval_only:
            return self.result
        facts = run_folder.read_result(self.folder) or {}
        if facts.get("iterations") is None and self.args.image_share == "auto":
            raise ConfigError(
                "--image-share auto: the images per GPU of the training are not known, as"
                f" {self.folder / run_folder.RESULT} is not of a training; give a number"
            )
        return facts

    def _evaluate_image_share(
        self, model: nn.Module, facts: dict[str, Any]
    ) -> dict[str, Any] | None:
        share = self.args.image_share
        if share is None or not self.cfg.DATASETS.TEST:
            return None
        with image_share(
            model,
            None if share == "auto" else share,
            images_per_gpu=facts.get("images_per_gpu"),
            world_size=facts.get("world_size", 1),
        ) as layers:
            if not layers:
                return None
            logger.info(f"Evaluating with --image-share {share}: {len(layers)} layers")
            return self.evaluate(model, "inference_image_share")

    def _finish(self, model: nn.Module, results: Any, precise: Any, shared: Any) -> int:
        code, message = OK, None
        if self.rank == 0:
            self._measure(model)
            self._add_results(results, precise, shared)
            if self.args.eval_only:
                run_folder.keep_training_facts(self.result, self.folder)
            self._show_classes()
            if not self.verify(results):
                code, message = CRASHED, "the results miss TEST.EXPECTED_RESULTS"
            if self.cfg.DATASETS.TEST:
                self.result["flops"] = self.count_flops(model)
                try:
                    self._name_test_set()
                    self.draw()
                except Exception:  # a model without instances, a broken font: not the run's failure
                    logger.exception("no pictures of predictions")
            self.result.update(status=FAILED if code else FINISHED, message=message)
            run_folder.write_result(self.output, self.result)
            logger.info(f"{self.result['status']}: {self.output / run_folder.RESULT}")
        return self.gather(code)[0]  # the others wait here

    def _add_results(self, results: Any, precise: Any, shared: Any) -> None:
        names = self.cfg.DATASETS.TEST
        if len(names) > 1:  # one table a data set; the first one's stands for the run
            self.result["results_by_dataset"] = results
            results, precise, shared = (r and r[names[0]] for r in (results, precise, shared))
        self.result.update(
            results=results,
            results_precise_bn=precise,
            results_image_share=shared,
            image_share=self.args.image_share,
        )

    def _name_test_set(self) -> None:
        """For whoever loads the model: the names of its classes, and images to try it on."""
        annotations, images = self.test_files()
        names = class_names(annotations)
        self.result["test_set"] = {"annotations": annotations, "images": images, "classes": names}

    def _show_classes(self) -> None:
        table = class_table(self.result["results"])
        if table:
            logger.info(f"AP of each class, worst first:\n{table}")

    def _measure(self, model: nn.Module) -> None:
        self.result.update(parameters=count_parameters(model), peak_memory_mb=peak_memory_mb())
        if self.trainer is not None:
            clock = self.trainer.clock
            self.result.update(
                iterations=self.trainer.iter,
                sec_per_iter=clock.sec_per_iter,
                train_seconds=clock.train_seconds,
                peak_memory_mb=clock.peak_memory_mb,
            )

    def _iteration(self) -> int:
        return self.trainer.iter if self.trainer is not None else 0

    def _explain(self, error: Diverged) -> str:
        where = None
        try:
            where = self.find_bad_layer()
        except RuntimeError:  # out of memory, most likely
            logger.exception("the forward pass could not be repeated")
        finding = (where or first_bad_state(self.trainer.bare_model), one_line(error))
        findings = self.gather(finding) if error.agreed else [finding]
        unknown = "no layer's output is bad when the forward pass is repeated"
        where = next((where for where, _ in findings if where), unknown)
        why = next((why for _, why in findings if why), "")
        return f"diverged at iteration {self.trainer.iter}: {where}; {why}"

    def _end_together(self, status: str, message: str, code: int, agreed: bool = True) -> int:
        """Ends a run whose ranks all are here: rank 0 writes, the others wait for it."""
        if not agreed:
            return self._end_alone(status, message, code)
        if self.rank == 0:
            self._write_failure(status, message, stopped=code == STOPPED)
        self.gather(code)
        return code

    def _end_alone(self, status: str, message: str, code: int) -> int:
        """Ends a rank that cannot count on the others. Whoever ends first knows why, and writes."""
        found = run_folder.result_stamp(self.folder)
        if not self.args.eval_only and found not in (None, self._earlier):
            of_peer = run_folder.read_result(self.folder)
            return NOT_FINITE if of_peer["status"] == DIVERGED else code
        self._write_failure(status, message)
        return code

    def _refuse(self, message: str) -> int:
        if self.rank == 0:
            self._write_failure(FAILED, message, prefix="error: ")
        return USAGE

    def _write_failure(
        self, status: str, message: str, stopped: bool = False, prefix: str = ""
    ) -> None:
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
        if self.args.eval_only:
            return  # what training left in the folder stays valid
        earlier = None if self._started else run_folder.read_result(self.folder)
        if earlier is not None and earlier["status"] == FINISHED:
            return  # so does what an earlier training left
        if self.trainer is not None:
            self._measure(self.trainer.bare_model)
            self.result["iterations"] += stopped  # the one that was finished before stopping
        self.result.update(status=status, message=message)
        run_folder.write_result(self.folder, self.result)

    def _log_traceback(self) -> None:
        name = f"log.txt.rank{self.rank}" if self.rank else "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)


def built(make: Callable[[], T]) -> T:
    """While things are built from the config, their complaints are about the config."""
    try:
        return make()
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(one_line(error)) from error


def _show_in_tensorboard(pictures: list[Path], folder: Path, iteration: int) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return  # whoever writes the curves has said so
    with SummaryWriter(str(folder)) as events:
        for path in pictures:
            with Image.open(path) as picture:
                pixels = np.asarray(picture)
            events.add_image(f"predictions/{path.stem}", pixels, iteration, dataformats="HWC")
