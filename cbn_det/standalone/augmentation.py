"""How a training sample shows a stored image: resized and mirrored, and its objects with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..data.coco_api import mask_of, whole_polygons

T = TypeVar("T", bound=tv_tensors.TVTensor)


@dataclass(frozen=True)
class View:
    """An image as a sample shows it.

    Attributes:
        stored: height and width of the image as it is stored.
        shown: height and width in the sample.
        mirrored: "horizontal", "vertical" or "none".
    """

    stored: tuple[int, int]
    shown: tuple[int, int]
    mirrored: str

    @classmethod
    def draw(cls, image: tv_tensors.Image, cfg: CfgNode) -> View:
        """One of torch's global random numbers: the shorter side is one of
        ``INPUT.MIN_SIZE_TRAIN``, and every other image is mirrored."""
        resize = v2.RandomShortestSize(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
        shown = resize.make_params([image])["size"]
        mirror = cfg.INPUT.RANDOM_FLIP != "none" and bool(torch.rand(1) < 0.5)
        return cls(image.shape[-2:], shown, cfg.INPUT.RANDOM_FLIP if mirror else "none")

    def show(self, stored: T) -> T:
        """An image, boxes or masks of the stored image, as they are in the sample."""
        shown = v2.functional.resize(stored, list(self.shown), antialias=True)
        if self.mirrored == "horizontal":
            return v2.functional.horizontal_flip(shown)
        return v2.functional.vertical_flip(shown) if self.mirrored == "vertical" else shown

    def mask(self, coco: COCO, annotation: dict[str, Any]) -> np.ndarray:
        """The mask of an object, uint8 ``[H, W]`` of the sample.

        Polygons are scaled before they become pixels, as detectron2 does it: a photo of 12
        megapixels with hundreds of objects would take gigabytes. Run-length encoded masks are
        resized one by one.
        """
        if not isinstance(annotation["segmentation"], list):
            stored = tv_tensors.Mask(torch.from_numpy(mask_of(coco, annotation)))
            return self.show(stored).numpy()
        (height, width), scale = self.shown, np.divide(self.shown, self.stored)[::-1]
        polygons = [
            np.reshape(p, (-1, 2)) * scale for p in whole_polygons(annotation["segmentation"])
        ]
        for polygon in polygons:
            if self.mirrored == "horizontal":
                polygon[:, 0] = width - polygon[:, 0]
            elif self.mirrored == "vertical":
                polygon[:, 1] = height - polygon[:, 1]
        if not polygons:
            return np.zeros(self.shown, dtype=np.uint8)
        runs = mask_util.frPyObjects([p.ravel().tolist() for p in polygons], height, width)
        return mask_util.decode(mask_util.merge(runs))
