"""A run on detectron2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch import nn

from ..data import CocoReport
from ..run.errors import ConfigError
from ..run.files import replace_file
from ..run.folder import CONFIG, describe
from ..run.job import Job
from .checkpointer import AtomicCheckpointer
from .datasets import prepare_datasets
from .loading import place
from .registry import check_config_norms, norms_in_use, register
from .step import has_sync_norm
from .trainer import Trainer, check_evaluable, in_process_loading

T = TypeVar("T")


def run(cfg: CfgNode, notes: list[str], args: argparse.Namespace) -> int:
    """Runs one process of a training or an evaluation and returns its exit code.

    Args:
        cfg: checked by :func:`~cbn_det.plugin.config.build_config`.
        notes: what that replaced; logged as warnings.
        args: the command line, with ``command``, its text.
    """
    _set_up(cfg, args)
    logger = setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="cbn_det", abbrev_name="cbn"
    )
    logger.info("engine: detectron2")
    for note in notes:
        logger.warning(note)
    return Detectron2Job(cfg, args).execute()


def _set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """detectron2's. It writes ``config.yaml`` before anything can be refused: the earlier run's is
    put back, until :meth:`.run.job.Job.start`."""
    config = Path(cfg.OUTPUT_DIR, CONFIG)
    earlier = config.read_bytes() if config.exists() else None
    comm.synchronize()  # all have looked before rank 0 writes
    default_setup(cfg, args)
    if comm.is_main_process():
        if earlier is None:
            config.unlink()
        else:
            replace_file(config, lambda file: file.write(earlier))


def describe_run(cfg: CfgNode, args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """What is known of a run on detectron2 before it starts; see
    :func:`~cbn_det.run.folder.describe`."""
    versions = {"detectron2": detectron2.__version__}
    norms = norms_in_use(cfg)
    return describe(cfg, args.command, args.accumulate, world_size, "detectron2", norms, versions)


class Detectron2Job(Job):
    """See :class:`~cbn_det.run.job.Job`."""

    def __init__(self, cfg: CfgNode, args: argparse.Namespace) -> None:
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        super().__init__(cfg, args, describe_run(cfg, args, self.world_size))

    def prepare(self, eval_only: bool) -> dict[str, CocoReport]:
        register()
        check_config_norms(self.cfg)  # each process keeps the keys to name in its errors
        reports = prepare_datasets(self.cfg, self.args.coco_dataset, eval_only=eval_only)
        for name in self.cfg.DATASETS.TEST:
            check_evaluable(name)
        return reports

    def build_trainer(self, cfg: CfgNode) -> Trainer:
        trainer = Trainer(cfg, self.args.accumulate)
        if self.args.strict and trainer.unused_norms:
            keys = ", ".join(trainer.unused_norms)
            raise ConfigError(f"--strict: {keys}: the model has no layer of this norm")
        return trainer

    def load(self, trainer: Trainer, resume: bool) -> None:
        trainer.resume_or_load(resume)

    def build_trained(self) -> nn.Module:
        model = Trainer.build_model(self.cfg)
        checkpointer = AtomicCheckpointer(model, self.cfg.OUTPUT_DIR, self.cfg)
        path, named_by = self.weights_to_evaluate(checkpointer)
        checkpointer.load_complete(path, f"{named_by} {path}")
        return model

    def evaluate(self, model: nn.Module, folder: str | None = None) -> dict[str, Any]:
        return Trainer.test(self.cfg, model, output=self.output / (folder or ""))

    def training_batches(self) -> Any:
        seed = max(self.cfg.SEED, 0)
        seed_all_rng(seed + self.rank)
        loader = Trainer.build_train_loader(in_process_loading(self.cfg))
        place(loader, seed)
        return loader

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with EventStorage():  # what heads log is dropped
            return model(batch)

    def find_bad_layer(self) -> str | None:
        model = self.trainer.bare_model
        if self.world_size > 1 and has_sync_norm(model):
            return None
        device = next(model.parameters()).device.type
        with torch.autocast(device, enabled=self.cfg.SOLVER.AMP.ENABLED):
            return super().find_bad_layer()

    def analyse_flops(self, model: nn.Module) -> FlopCountAnalysis:
        record = DatasetCatalog.get(self.cfg.DATASETS.TEST[0])[0]
        sample = DatasetMapper(self.cfg, is_train=False)(dict(record))
        return FlopCountAnalysis(model, [{"image": sample["image"]}])

    def test_files(self) -> tuple[Path, Path]:
        metadata = MetadataCatalog.get(self.cfg.DATASETS.TEST[0])
        return Path(metadata.json_file), Path(metadata.get("image_root") or "")

    def verify(self, results: dict[str, Any]) -> bool:
        try:
            verify_results(self.cfg, results)
        except SystemExit:
            return False
        return True

    def gather(self, value: T) -> list[T]:
        return comm.all_gather(value)
