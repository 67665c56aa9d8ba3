"""What every process of a run does: prepare the data, train or evaluate, leave the run folder."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fvcore.common.checkpoint import Checkpointer
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import nn

from ..data import CocoReport
from ..data.coco_api import class_names
from ..norms import image_share
from . import folder as run_folder
from .display import class_table, write_all_pictures
from .errors import CRASHED, NOT_FINITE, OK, STOPPED, USAGE, ConfigError, one_line
from .files import RESULT, read_result, remove_parts
from .folder import DIVERGED, FAILED, FINISHED
from .measure import count_flops, count_parameters, peak_memory_mb
from .nonfinite import Diverged, PeerFailed, first_bad_layer, first_bad_state
from .norm_schedule import as_at_the_end
from .precise_bn import kept_statistics, recompute_statistics
from .signals import Interrupted, handled

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Job(ABC):
    """One process of a training or an evaluation. An engine's subclass says how each step is done;
    the order of the steps, and how a run ends that goes wrong, are the same for all.

    Args:
        cfg: checked by the engine's configuration code; not changed any more.
        args: the command line, with ``command``, its text.
        result: what :func:`~cbn_det.run.folder.describe` knows of the run.

    Attributes:
        trainer: set by :meth:`train` as soon as it exists; has ``iter``, ``last_batch``, ``clock``
            (a :class:`~cbn_det.run.measure.RunClock`) and ``bare_model``.
        sets: what :meth:`prepare` returned.
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
        self.trainer: Any = None
        self._started = False
        self._earlier = run_folder.result_stamp(self.folder)
        if args.eval_only:
            run_folder.keep_training_facts(result, self.folder)
        self._training_is_known = not args.eval_only or result["iterations"] is not None

    @abstractmethod
    def prepare(self, eval_only: bool) -> dict[str, CocoReport]:
        """Makes the data sets known and checks them; the report of each set in COCO format, by
        name.

        Raises:
            ValueError: they cannot be used.
        """

    @abstractmethod
    def build_trainer(self, cfg: CfgNode) -> Any:
        """What :attr:`trainer` is to be; ``cfg`` is :attr:`cfg`, or of a training that is only
        tried."""

    @abstractmethod
    def load(self, trainer: Any, resume: bool) -> None:
        """Gives a trainer the last checkpoint to go on from, or ``MODEL.WEIGHTS``."""

    def train(self) -> dict[str, Any]:
        """Trains, and returns the results of the last evaluation."""
        trainer = self.trainer = built(lambda: self.build_trainer(self.cfg))
        built(lambda: self.load(trainer, self.args.resume))
        self.start()
        return trainer.train()

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
    def training_batches(self) -> Iterable[Any]:
        """Endless, and the same in every call with the same ``SEED``."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Any:
        """A training forward pass of which nothing is logged."""

    def evaluate_precise(self, model: nn.Module, iterations: int) -> dict[str, Any] | None:
        """:meth:`evaluate` with PreciseBN statistics of :meth:`training_batches`, which are taken
        back; None without BatchNorm. All ranks must call it."""
        training = model.training
        model.train()
        try:
            with kept_statistics(model):
                forward = partial(self.forward, model)
                if not recompute_statistics(model, self.training_batches(), iterations, forward):
                    return None
                logger.info(f"Evaluating with PreciseBN statistics of {iterations} iterations")
                return self.evaluate(model, "inference_precise_bn")
        finally:
            model.train(training)

    def find_bad_layer(self) -> str | None:
        """After a divergence, the layer that the last batch's forward pass went bad in."""
        model, batch = self.trainer.bare_model, self.trainer.last_batch
        if batch is None:
            return None
        return first_bad_layer(model, lambda: self.forward(model, batch))

    @abstractmethod
    def analyse_flops(self, model: nn.Module) -> FlopCountAnalysis:
        """fvcore's count of the model on the first test image."""

    def test_files(self) -> tuple[Path, Path]:
        """Annotation file and image folder of the first test set, known once it was evaluated."""
        report = self.sets[self.cfg.DATASETS.TEST[0]]
        return report.annotations, report.images

    def start(self) -> None:
        """Takes the folder over from the run before, once nothing can be refused any more: a
        forgotten argument costs nobody a finished training."""
        if self.rank == 0:
            if self.args.eval_only:
                run_folder.start_evaluation(self.output)
            else:
                remove_parts(self.folder)
                run_folder.start_training(self.folder, self.args.resume)
            run_folder.write_config(self.output, self.cfg)
        self.gather(None)  # no rank finds the earlier result any more
        self._started = True

    def verify(self, results: dict[str, Any]) -> bool:
        """Whether the results are what the config expects."""
        return True

    def gather(self, value: T) -> list[T]:
        """The value of every rank. All ranks must call it."""
        return [value]

    def execute(self) -> int:
        """Runs the job and returns the exit code."""
        with handled(signal.default_int_handler, signal.SIGTERM):
            try:
                return self._execute()
            except PeerFailed:
                return CRASHED  # the rank that failed says why
            except Exception as error:
                self._log_traceback()
                rank = f"rank {self.rank}: " if self.world_size > 1 else ""
                code = self._end_alone(
                    FAILED, f"{rank}{type(error).__name__}: {one_line(error)}", CRASHED
                )
                traceback.print_exc()
                return code

    def _execute(self) -> int:
        try:
            # PreciseBN statistics come from training images
            without_training = self.args.eval_only and not self.args.precise_bn_iters
            self.sets = built(lambda: self.prepare(without_training))
            if self.args.image_share == "auto" and not self._training_is_known:
                raise ConfigError(
                    "--image-share auto: the images per GPU of the training are not known, as"
                    f" {self.folder / RESULT} is not of a training; give a number"
                )
            if self.args.eval_only:
                model = built(self.build_trained)
                as_at_the_end(model)  # the weights were trained with these statistics, no others
                self.start()
                results = self.evaluate(model)
            else:
                results = self.train()
                model = self.trainer.bare_model
            iterations = self.args.precise_bn_iters if self.cfg.DATASETS.TEST else 0
            precise = self.evaluate_precise(model, iterations) if iterations else None
            shared = self._evaluate_image_share(model)
            return self._finish(model, results, precise, shared)
        except ConfigError as error:
            self._log_traceback()
            if self.rank == 0:
                self._write_failure(FAILED, one_line(error), prefix="error: ")
            return USAGE
        except Diverged as error:
            end = self._end_together if error.agreed else self._end_alone
            return end(DIVERGED, self._explain(error), NOT_FINITE)
        except Interrupted as error:
            self.trainer.iter += 1  # that one was finished
            return self._end_together(FAILED, str(error), STOPPED)
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            iteration = getattr(self.trainer, "iter", 0)
            return self._end_alone(FAILED, f"interrupted at iteration {iteration}", STOPPED)

    def _evaluate_image_share(self, model: nn.Module) -> dict[str, Any] | None:
        share = self.args.image_share
        if share is None or not self.cfg.DATASETS.TEST:
            return None
        with image_share(
            model,
            None if share == "auto" else share,
            images_per_gpu=self.result["images_per_gpu"],
            world_size=self.result["world_size"],
        ) as layers:
            if not layers:
                return None
            logger.info(f"Evaluating with --image-share {share}: {len(layers)} layers")
            return self.evaluate(model, "inference_image_share")

    def _finish(self, model: nn.Module, results: Any, precise: Any, shared: Any) -> int:
        code, message = OK, None
        if self.rank == 0:
            if not self.verify(results):
                code, message = CRASHED, "the results miss TEST.EXPECTED_RESULTS"
            names = self.cfg.DATASETS.TEST
            if len(names) > 1:  # one table a data set; the first one's stands for the run
                self.result["results_by_dataset"] = results
                results, precise, shared = (r and r[names[0]] for r in (results, precise, shared))
            self._measure(model)
            self.result.update(
                status=FAILED if code else FINISHED,
                message=message,
                results=results,
                results_precise_bn=precise,
                results_image_share=shared,
                image_share=self.args.image_share,
            )
            table = class_table(results)
            if table:
                logger.info(f"AP of each class, worst first:\n{table}")
            if names:
                self.result["flops"] = count_flops(model, self.analyse_flops)
                try:
                    annotations, images = self.test_files()
                    # for whoever loads the model: names of classes, and images to try it on
                    known = {"annotations": str(annotations), "images": str(images)}
                    self.result["test_set"] = {**known, "classes": class_names(annotations)}
                    write_all_pictures(self.output, annotations, images, self.trainer)
                except Exception:  # a model without instances, a broken font: not the run's failure
                    logger.exception("no pictures of predictions")
            run_folder.write_result(self.output, self.result)
            logger.info(f"{self.result['status']}: {self.output / RESULT}")
        return self.gather(code)[0]  # the others wait here

    def _measure(self, model: nn.Module) -> None:
        self.result["parameters"] = count_parameters(model)
        if self.trainer is not None:
            clock = self.trainer.clock
            self.result.update(
                iterations=self.trainer.iter,
                sec_per_iter=clock.sec_per_iter,
                train_seconds=clock.train_seconds,
                peak_memory_mb=clock.peak_memory_mb,
            )
        elif not self._training_is_known:
            self.result["peak_memory_mb"] = peak_memory_mb()

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

    def _end_together(self, status: str, message: str, code: int) -> int:
        """Ends a run whose ranks all are here: rank 0 writes, the others wait for it."""
        if self.rank == 0:
            self._write_failure(status, message)
        self.gather(code)
        return code

    def _end_alone(self, status: str, message: str, code: int) -> int:
        """Ends a rank that cannot count on the others. Whoever ends first knows why, and writes."""
        found = run_folder.result_stamp(self.folder)
        if self.args.eval_only or found in (None, self._earlier):
            self._write_failure(status, message)
        elif read_result(self.folder)["status"] == DIVERGED:
            return NOT_FINITE
        return code

    def _write_failure(self, status: str, message: str, prefix: str = "") -> None:
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
        earlier = None if self._started else read_result(self.folder)
        if self.args.eval_only or (earlier and earlier["status"] == FINISHED):
            return  # what training left in the folder stays valid
        if self.trainer is not None:
            self._measure(self.trainer.bare_model)
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
