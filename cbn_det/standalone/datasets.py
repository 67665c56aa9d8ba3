"""COCO-format data sets for torchvision's detectors: checks before a run, images with targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..data import (
    DIGITS_NAMES,
    CocoReport,
    DataError,
    check_classes,
    check_set,
    digits_paths,
    log_reports,
    names_in_use,
    write_digits,
)
from ..data.coco_api import mask_of, open_coco, whole_polygons
from ..data.image_check import BROKEN_IMAGE, PILLOW, read_rgb

_SMALLEST_SIDE = 1e-5  # pixels; detectron2 leaves out thinner boxes too


def prepare_datasets(
    cfg: CfgNode, coco_datasets: Iterable[Sequence[str]] = (), *, eval_only: bool = False
) -> dict[str, CocoReport]:
    """Finds and checks the data sets of a run before any time is spent on training; writes the
    digits set where it is used and missing.

    Args:
        coco_datasets: ``(name, annotations, images)`` of each set beside the digits.
        eval_only: no training follows: ``DATASETS.TRAIN`` is not checked.

    Returns:
        the report of each set that the run reads, by name.

    Raises:
        DataError: a name is unknown or given twice, files are missing or broken, or the config does
            not fit them.
    """
    known = {name: tuple(map(Path.absolute, files)) for name, files in digits_paths().items()}
    for name, *paths in coco_datasets:
        files = tuple(Path(path).absolute() for path in paths)
        if known.setdefault(name, files) != files:
            raise DataError(
                f"data set '{name}' is known already, with annotations '{known[name][0]}' and "
                f"images '{known[name][1]}', not with '{files[0]}' and '{files[1]}': choose another"
                " name"
            )
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    names = names_in_use(train, test, known, eval_only=eval_only)
    if not set(names).isdisjoint(DIGITS_NAMES):
        write_digits()
    reports = {
        name: check_set(cfg, name, *known[name], eval_only=eval_only, reader=PILLOW)
        for name in names
    }
    log_reports(reports, () if eval_only else train)
    classes = {name: report.class_names for name, report in reports.items()}
    check_classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES, classes)
    return reports


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


class DetectionDataset(Dataset):
    """The images of a COCO-format set, in the order of their ids, each with its target.

    An image is a float tensor ``[3, H, W]`` in 0..255, in the channel order of ``INPUT.FORMAT``.
    In training it is augmented and its target is ``{"boxes": float [n, 4], "labels": int64 [n]}``
    and, with ``MODEL.MASK_ON``, ``"masks": uint8 [n, H, W]``: boxes in pixels of that image as
    corners ``x1, y1, x2, y2``, labels from 1 in the order of the sorted category ids; n may be 0.
    Crowd regions and objects without area are left out, and images without an object as well where
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` says so. Otherwise the image is as stored (its EXIF
    rotation applied) and its target is ``{"image_id": id}``.

    Attributes:
        coco: the annotation file, its annotations numbered from 1.
        image_ids: COCO's id of each image.
        category_ids: COCO's category id of each label; that of label 1 comes first.
        class_names: likewise.
    """

    def __init__(self, annotations: Path, images: Path, cfg: CfgNode, training: bool) -> None:
        self.annotations, self.images = annotations, images
        self.cfg = cfg
        self.training = training
        self.coco = open_coco(annotations)
        self.category_ids: list[int] = sorted(self.coco.cats)
        self.class_names = [self.coco.cats[i]["name"] for i in self.category_ids]
        self.image_ids = sorted(self.coco.imgs)
        if training and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            self.image_ids = [i for i in self.image_ids if self._objects(i)]
        self._label = {category: k for k, category in enumerate(self.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """
        Raises:
            DataError: the image file is missing, broken, or of another size than listed.
        """
        image_id = self.image_ids[index]
        image = self._read(image_id)
        if not self.training:
            return image.float(), {"image_id": image_id}
        view = View.draw(image, self.cfg)
        objects = self._objects(image_id)
        boxes = self._boxes(objects, view)
        labels = torch.tensor([self._label[a["category_id"]] for a in objects], dtype=torch.int64)
        target = {"boxes": boxes, "labels": labels}
        keep = (boxes[:, 2:] - boxes[:, :2] > _SMALLEST_SIDE).all(dim=1)
        if self.cfg.MODEL.MASK_ON:
            target["masks"] = self._masks(objects, view)
            keep &= target["masks"].any(dim=2).any(dim=1).bool()
        if not keep.all():
            target = {key: value[keep] for key, value in target.items()}
        return view.show(image).float().as_subclass(Tensor), target

    def _objects(self, image_id: Any) -> list[dict[str, Any]]:
        return [a for a in self.coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]

    def _read(self, image_id: Any) -> tv_tensors.Image:
        record = self.coco.imgs[image_id]
        path = self.images / record["file_name"]
        label = f"{self.annotations}: image {image_id} '{path}'"
        try:
            pixels = read_rgb(path)
        except BROKEN_IMAGE as e:  # the check before training looks at a sample of large sets
            raise DataError(f"{label} cannot be read ({e}): copy it there again") from e
        if pixels.shape[:2] != (record["height"], record["width"]):
            raise DataError(
                f"{label} is {pixels.shape[1]} x {pixels.shape[0]}, listed as {record['width']} x "
                f"{record['height']}: correct 'width' and 'height'"
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image.flip(0)
        return tv_tensors.Image(image.contiguous())

    def _boxes(self, objects: list[dict[str, Any]], view: View) -> Tensor:
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        stored = tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=view.stored)
        return v2.functional.clamp_bounding_boxes(view.show(stored)).as_subclass(Tensor)

    def _masks(self, objects: list[dict[str, Any]], view: View) -> Tensor:
        height, width = view.shown
        columns = np.zeros((len(objects), width, height), dtype=np.uint8)
        masks = columns.transpose(0, 2, 1)  # pycocotools gives them by columns
        for mask, annotation in zip(masks, objects, strict=True):
            mask[:] = view.mask(self.coco, annotation)
        return torch.from_numpy(masks)
