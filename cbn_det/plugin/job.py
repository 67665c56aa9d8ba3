"""What every process of a run does: prepare the data, train or evaluate, leave the run folder."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from . import run_folder
from .config import ConfigError, one_line
from .datasets import prepare_datasets
from .measure import count_flops, count_parameters, peak_memory_mb
from .nonfinite import Diverged, PeerFailed, first_bad_layer, first_bad_state, has_sync_norm
from .pictures import draw_predictions
from .processes import INTERRUPTED
from .registry import register
from .run_folder import DIVERGED, FAILED, FINISHED
from .signals import Interrupted
from .trainer import Trainer, check_evaluable, evaluate_precise

logger = logging.getLogger(__name__)

OK, CRASHED, USAGE, NOT_FINITE, STOPPED = 0, 1, 2, 3, INTERRUPTED

T = TypeVar("T")


def run(cfg: CfgNode, notes: list[str], args: argparse.Namespace) -> int:
    """Runs one process of a training or an evaluation and returns its exit code.

    Args:
        cfg: checked by :func:`~cbn_det.plugin.config.build_config`.
        notes: what that replaced; logged as warnings.
        args: the command line, with ``command``, its text.
    """
    default_setup(cfg, args)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="cbn_det", abbrev_name="cbn"
    )
    for note in notes:
        logger.warning(note)
    with _sigterm_interrupts():
        return _Run(cfg, args).execute()


class _Run:
    def __init__(self, cfg: CfgNode, args: argparse.Namespace) -> None:
        self.cfg = cfg
        self.args = args
        self.folder = Path(cfg.OUTPUT_DIR)
        self.result = run_folder.describe(cfg, args.command, comm.get_world_size())
        self.trainer: Trainer | None = None

    def execute(self) -> int:
        try:
            return self._execute()
        except PeerFailed:
            return CRASHED  # the rank that failed says why
        except Exception as error:
            self._log_traceback()
            rank = f"rank {comm.get_rank()}: " if comm.get_world_size() > 1 else ""
            message = f"{rank}{type(error).__name__}: {one_line(error)}"
            code = self._end_alone(FAILED, message, CRASHED)
            traceback.print_exc()
            return code

    def _execute(self) -> int:
        try:
            self._begin()
            if self.args.eval_only:
                model, results, precise = self._evaluate()
            else:
                model, results, precise = self._train()
            return self._finish(model, results, precise)
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

    def _begin(self) -> None:
        if comm.is_main_process() and not self.args.eval_only:
            if self.args.resume:
                run_folder.clear_result(self.folder)
            else:
                run_folder.start_afresh(self.folder)
        register()

        # PreciseBN statistics come from training images
        without_training = self.args.eval_only and not self.args.precise_bn_iters
        _built(
            lambda: prepare_datasets(self.cfg, self.args.coco_dataset, eval_only=without_training)
        )
        for name in self.cfg.DATASETS.TEST:
            _built(lambda name=name: check_evaluable(name))

    def _train(self) -> tuple[nn.Module, Any, Any]:
        trainer = self.trainer = _built(lambda: Trainer(self.cfg))
        _built(lambda: trainer.resume_or_load(resume=self.args.resume))
        results = trainer.train()
        return trainer.bare_model, results, self._precise(trainer.bare_model)

    def _evaluate(self) -> tuple[nn.Module, Any, Any]:
        model = _built(lambda: Trainer.build_model(self.cfg))
        checkpointer = DetectionCheckpointer(model, self.cfg.OUTPUT_DIR)
        if not self.cfg.MODEL.WEIGHTS and not checkpointer.has_checkpoint():
            raise ConfigError(f"--eval-only --resume: no checkpoint in {self.folder}")
        checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=self.args.resume)
        return model, Trainer.test(self.cfg, model), self._precise(model)

    def _precise(self, model: nn.Module) -> Any:
        iterations = self.args.precise_bn_iters
        if not iterations or not self.cfg.DATASETS.TEST:
            return None
        return evaluate_precise(self.cfg, model, iterations)

    def _finish(self, model: nn.Module, results: Any, precise: Any) -> int:
        code, message = OK, None
        if comm.is_main_process():
            self._measure(model)
            self._add_results(results, precise)
            if self.args.eval_only:
                run_folder.keep_training_facts(self.result, self.folder)
            try:
                verify_results(self.cfg, results)
            except SystemExit:
                code, message = CRASHED, "the results miss TEST.EXPECTED_RESULTS"
            if self.cfg.DATASETS.TEST:
                self.result["flops"] = count_flops(self.cfg, model)
                try:
                    draw_predictions(self.cfg, model, self.folder / "pictures")
                except Exception:  # a model without instances, a broken font: not the run's failure
                    logger.exception("no pictures of predictions")
            self.result.update(status=FAILED if code else FINISHED, message=message)
            run_folder.write_result(self.folder, self.result)
            logger.info(f"{self.result['status']}: {self.folder / run_folder.RESULT}")
        return comm.all_gather(code)[0]  # the others wait here

    def _add_results(self, results: Any, precise: Any) -> None:
        names = self.cfg.DATASETS.TEST
        if len(names) > 1:  # one table a data set; the first one's stands for the run
            self.result["results_by_dataset"] = results
            results, precise = results[names[0]], precise and precise[names[0]]
        self.result.update(results=results, results_precise_bn=precise)

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
        trainer = self.trainer
        model = trainer.bare_model
        where = None
        batch = trainer.step.last_batch
        if batch is not None and (comm.get_world_size() == 1 or not has_sync_norm(model)):
            try:
                where = first_bad_layer(model, batch, autocast=self.cfg.SOLVER.AMP.ENABLED)
            except RuntimeError:  # out of memory, most likely
                logger.exception("the forward pass could not be repeated")
        finding = (where or first_bad_state(model), one_line(error))
        findings = comm.all_gather(finding) if error.agreed else [finding]
        unknown = "no layer's output is bad when the forward pass is repeated"
        where = next((where for where, _ in findings if where), unknown)
        why = next((why for _, why in findings if why), "")
        return f"diverged at iteration {trainer.iter}: {where}; {why}"

    def _end_together(self, status: str, message: str, code: int, agreed: bool = True) -> int:
        """Ends a run whose ranks all are here: rank 0 writes, the others wait for it."""
        if not agreed:
            return self._end_alone(status, message, code)
        if comm.is_main_process():
            self._write_failure(status, message, stopped=code == STOPPED)
        comm.synchronize()
        return code

    def _end_alone(self, status: str, message: str, code: int) -> int:
        """Ends a rank that cannot count on the others. Whoever ends first knows why, and writes."""
        earlier = None if self.args.eval_only else run_folder.read_result(self.folder)
        if earlier is not None:
            return NOT_FINITE if earlier["status"] == DIVERGED else code
        self._write_failure(status, message)
        return code

    def _refuse(self, message: str) -> int:
        if comm.is_main_process():
            self._write_failure(FAILED, message, prefix="error: ")
        return USAGE

    def _write_failure(
        self, status: str, message: str, stopped: bool = False, prefix: str = ""
    ) -> None:
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
        if self.args.eval_only:
            return  # what training left in the folder stays valid
        if self.trainer is not None:
            self._measure(self.trainer.bare_model)
            self.result["iterations"] += stopped  # the one that was finished before stopping
        self.result.update(status=status, message=message)
        run_folder.write_result(self.folder, self.result)

    def _log_traceback(self) -> None:
        rank = comm.get_rank()
        name = f"log.txt.rank{rank}" if rank else "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)


def _built(make: Callable[[], T]) -> T:
    """While things are built from the config, their complaints are about the config."""
    try:
        return make()
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(one_line(error)) from error


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
