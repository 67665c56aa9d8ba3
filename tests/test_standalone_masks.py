"""Masks of the standalone engine's training samples: polygons are scaled before they become
pixels."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from tiny_set import Files

from cbn_det.standalone.config import get_cfg
from cbn_det.standalone.datasets import DetectionDataset

HEIGHT, WIDTH = 90, 120


def write_set(folder: Path, segmentations: list[Any], size: tuple[int, int]) -> Files:
    """A set of one image, all black but for its left upper quarter."""
    height, width = size
    (folder / "images").mkdir(parents=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 255
    Image.fromarray(pixels).save(folder / "images" / "1.png")
    annotations = [
        {
            "id": k,
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 0, width, height],
            "area": height * width,
            "iscrowd": 0,
            "segmentation": segmentation,
        }
        for k, segmentation in enumerate(segmentations, start=1)
    ]
    record = {"id": 1, "file_name": "1.png", "width": width, "height": height}
    content = {
        "images": [record],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "set.json").write_text(json.dumps(content))
    return Files(folder / "set.json", folder / "images")


def config(short: int, flip: str = "none") -> Any:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.RANDOM_FLIP = True, flip
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (short,), 4000
    return cfg


def polygons(count: int, size: tuple[int, int], seed: int = 0) -> list[list[list[float]]]:
    """Objects of one to three polygons of five points, some outside of the image in part."""
    rng = np.random.default_rng(seed)
    height, width = size
    return [
        [
            (
                rng.uniform(-0.1, 0.9, 2) * [width, height]
                + rng.uniform(0, 0.3, (5, 2)) * [width, height]
            )
            .ravel()
            .tolist()
            for _ in range(rng.integers(1, 4))
        ]
        for _ in range(count)
    ]


def rasterized(segmentation: list[list[float]], short: int, mirrored: str) -> np.ndarray:
    """pycocotools' pixels of polygons that are scaled, then mirrored."""
    height, width = short, short * WIDTH // HEIGHT
    moved = []
    for polygon in segmentation:
        x = np.array(polygon[::2]) * width / WIDTH
        y = np.array(polygon[1::2]) * height / HEIGHT
        x = width - x if mirrored == "horizontal" else x
        y = height - y if mirrored == "vertical" else y
        moved.append(np.stack([x, y], axis=1).ravel().tolist())
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(moved, height, width)))


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize("short", [30, 60, 180])
def test_masks_are_those_of_the_scaled_polygons(flip: str, short: int, tmp_path: Path) -> None:
    objects = polygons(8, (HEIGHT, WIDTH))
    dataset = DetectionDataset(
        *write_set(tmp_path, objects, (HEIGHT, WIDTH)), config(short, flip), True
    )
    torch.manual_seed(0)
    seen = set()
    for _ in range(8):
        image, target = dataset[0]
        corner = image[0] > 127  # where the bright quarter is says how it is mirrored
        mirrored = "none" if corner[0, 0] else "horizontal" if corner[0, -1] else "vertical"
        seen.add(mirrored)
        expected = np.stack([rasterized(o, short, mirrored) for o in objects])
        shown = expected[expected.any(axis=(1, 2))]
        assert np.array_equal(target["masks"].numpy(), shown)
        assert target["masks"].dtype == torch.uint8 and len(target["boxes"]) == len(shown)
    assert seen == {"none", flip}


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_run_length_encodings_follow_the_image(flip: str, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[: HEIGHT // 2, : WIDTH // 2] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))
    encoded["counts"] = encoded["counts"].decode()
    files = write_set(tmp_path, [encoded], (HEIGHT, WIDTH))
    dataset = DetectionDataset(*files, config(45, flip), training=True)
    torch.manual_seed(0)
    for _ in range(4):
        image, target = dataset[0]
        assert (target["masks"][0].bool() == (image[0] > 127)).float().mean() > 0.97


def test_a_large_photo_of_many_objects_stays_small(tmp_path: Path) -> None:
    size = (1500, 2000)
    files = write_set(tmp_path, polygons(60, size), size)
    dataset = DetectionDataset(*files, config(150), training=True)
    tracemalloc.start()
    try:
        masks = dataset[0][1]["masks"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert masks.shape[1:] == (150, 200) and len(masks) > 50
    assert peak < 3e7  # all masks as large as the photo take 1.8e8 bytes


@pytest.mark.detectron2
@pytest.mark.parametrize("mirrored", [False, True])
def test_they_are_detectron2_s(mirrored: bool, tmp_path: Path) -> None:
    from detectron2.data import detection_utils
    from detectron2.data import transforms as T
    from detectron2.structures import BoxMode

    objects = polygons(8, (HEIGHT, WIDTH), seed=1)
    files = write_set(tmp_path, objects, (HEIGHT, WIDTH))
    dataset = DetectionDataset(*files, config(60, "horizontal"), training=True)
    torch.manual_seed(0)
    image, target = next(
        sample
        for sample in (dataset[0] for _ in range(99))
        if bool(sample[0][0, 0, 0] < 127) == mirrored
    )
    height, width = image.shape[1:]
    steps: list[T.Transform] = [T.ResizeTransform(HEIGHT, WIDTH, height, width)]
    steps += [T.HFlipTransform(width)] if mirrored else []
    annotations = [
        detection_utils.transform_instance_annotations(
            {
                "bbox": [0, 0, WIDTH, HEIGHT],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [list(p) for p in segmentation],
            },
            T.TransformList(steps),
            (height, width),
        )
        for segmentation in objects
    ]
    instances = detection_utils.annotations_to_instances(annotations, (height, width), "bitmask")
    instances = detection_utils.filter_empty_instances(instances)
    assert torch.equal(target["masks"].bool(), instances.gt_masks.tensor)
