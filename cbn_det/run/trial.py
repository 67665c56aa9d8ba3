"""A training that is only tried: what ``cbn-det check`` and the benchmark ask of an engine."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..data import CocoReport


class Trial(ABC):
    """The training of a command line in one process of however many it will have. Nothing is
    written to ``OUTPUT_DIR``.

    Args:
        args: of :func:`~cbn_det.run.arguments.argument_parser`, with ``command``, their text.

    Attributes:
        cfg: read and checked, frozen.
        notes: a line for everything that was replaced because this machine lacks it.
        world_size: processes of the training.
        optimizer: known once it was built.
        unused_norms: config keys that name a norm of which the built model has no layer.

    Raises:
        ValueError: the command line or the config cannot be run.
    """

    cfg: CfgNode
    notes: list[str]
    optimizer: torch.optim.Optimizer
    unused_norms: list[str]
    world_size = 1

    @abstractmethod
    def __init__(self, args: argparse.Namespace) -> None: ...

    @abstractmethod
    def prepare(self) -> dict[str, CocoReport]:
        """Makes the data sets known and checks them as the training will.

        Returns:
            the report of each set in COCO format, by name.

        Raises:
            ValueError: they cannot be used.
        """

    @abstractmethod
    def build(self, folder: Path, load_weights: bool) -> nn.Module:
        """The model to train, on its device, as one process has it.

        Args:
            folder: for what an engine cannot help writing.
            load_weights: those of ``MODEL.WEIGHTS``.

        Raises:
            ValueError: it cannot be built from the config, or the weights do not fit.
        """

    @abstractmethod
    def repeat(self, batches: int) -> None:
        """Reads so many mini-batches; the steps take them in turn from now on."""

    @abstractmethod
    def step(self, iteration: int) -> None:
        """One training step on the next mini-batches."""
