"""A trained detector that takes images as they are on disk, whichever engine it is of."""

from __future__ import annotations

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor, nn

from ..data import image_check
from .errors import ConfigError, one_line
from .files import read_result

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Predictions:
    """What a detector found in an image, best first.

    Attributes:
        boxes: float [n, 4], corners x1, y1, x2, y2 in pixels of the image as it was given.
        scores: float [n].
        labels: int [n], from 0, in the order of the data set's category ids.
        masks: bool [n, H, W], or None for a detector without masks.
        names: of the class of each, "class 3" where the run does not know the class's name.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    names: list[str]

    def __len__(self) -> int:
        return len(self.scores)

    def best(self, score: float) -> Predictions:
        """Those with at least this score."""
        n = int((self.scores >= score).sum())
        masks = None if self.masks is None else self.masks[:n]
        return Predictions(self.boxes[:n], self.scores[:n], self.labels[:n], masks, self.names[:n])


class Detector(ABC):
    """A trained model in evaluation mode; call it with an image.

    Args:
        cfg: of the run, as its engine reads it.
        model: with its weights, on ``MODEL.DEVICE``.
        run: the run's folder.

    Attributes:
        result: content of its ``result.json``; {} where there is none.
        class_names: by label; empty where the run was never evaluated.
    """

    #: the label of the first class in what the model itself puts out
    first_label = 0

    def __init__(self, cfg: CfgNode, model: nn.Module, run: Path) -> None:
        self.cfg = cfg
        self.model = model.eval()
        self.run = run
        self.result: dict[str, Any] = read_result(run) or {}
        self.class_names: list[str] = (self.result.get("test_set") or {}).get("classes", [])

    @classmethod
    @abstractmethod
    def load(cls, run: Path, weights: Path, opts: Sequence[str]) -> Detector:
        """See :func:`cbn_det.predict.load_run`.

        Raises:
            ConfigError: the config or the checkpoint cannot be read, or they do not fit.
        """

    def __call__(self, image: ImageLike) -> Predictions:
        """
        Args:
            image: path of a file (its EXIF rotation is applied), a Pillow image, or RGB values as
                uint8 [H, W, 3].

        Raises:
            ConfigError: a file that cannot be read.
        """
        boxes, scores, labels, masks = self.detect(read_rgb(image))
        order = np.argsort(-scores, kind="stable")
        masks = None if masks is None else masks[order]
        known = self.class_names
        names = [known[i] if i < len(known) else f"class {i}" for i in labels[order]]
        return Predictions(boxes[order], scores[order], labels[order], masks, names)

    @abstractmethod
    def detect(
        self, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Boxes, scores, labels and masks of RGB values, see :class:`Predictions`."""

    @abstractmethod
    def model_input(self, image: np.ndarray) -> Tensor:
        """RGB values as the model is given them in evaluation: resized, float [3, H, W], 0 to 255,
        in the channel order of ``INPUT.FORMAT``."""

    @abstractmethod
    def traceable(self, image: Tensor) -> nn.Module:
        """The model as a function of one :meth:`model_input` that returns a tuple of tensors:
        boxes [n, 4] in pixels of it, scores [n], labels [n] from 0 and, with masks, [n, 1, s, s]:
        the probability of each cell of a grid on the box.

        Raises:
            ConfigError: it puts out something else than instances.
        """

    @abstractmethod
    def write_plain(self, folder: Path, images: list[Tensor]) -> tuple[Any, list[Path]]:
        """Writes the model in the engine's own terms, for users without this package.

        Args:
            images: of :meth:`model_input`, to try it on.

        Returns:
            What became of the norms (a :class:`~cbn_det.deploy.Deployment`), and the files.

        Raises:
            ConfigError: it cannot be expressed so.
            RuntimeError: it puts out something else than the trained model.
        """


@contextmanager
def without_notices_of_torch() -> Iterator[None]:
    """Keeps from the terminal what torch says to the authors of the code that it runs: that its
    tracer, which nothing replaces for detectors yet, will go."""
    tracer = logging.getLogger("torch.fx._symbolic_trace")
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|torchvision|detectron2|onnxscript)\b")
        try:
            yield
        finally:
            tracer.setLevel(level)


def read_rgb(image: ImageLike) -> np.ndarray:
    """An image as RGB values, uint8 [H, W, 3].

    Raises:
        ConfigError: the file cannot be read, or an array is of another kind.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(
                f"image: expected RGB values as uint8 [H, W, 3], got {image.dtype}"
                f" {list(image.shape)}"
            )
        return image
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    try:
        return image_check.read_rgb(image)
    except image_check.BROKEN_IMAGE as error:
        raise ConfigError(f"{image}: not an image that can be read ({one_line(error)})") from error
