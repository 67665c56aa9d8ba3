"""Small annotated images in detectron2's form, made up anew on each call from a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

SIZE = 96


def images(
    count: int = 2,
    size: int = SIZE,
    *,
    classes: int = 2,
    masks: str | None = None,
    keypoints: bool = False,
    points: bool = False,
) -> list[dict[str, Any]]:
    """Images of noise with two boxes each.

    Args:
        masks: None, "polygon", "bitmask", or "tensor": a plain one (MaskFormer, Mask2Former).
        keypoints: whether there are 17 keypoints an object.
        points: whether there are 10 labelled points an object (PointSup).
    """
    generator = torch.Generator().manual_seed(7)
    batch = []
    for index in range(count):
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        instances = Instances((size, size))
        low = torch.rand(2, 2, generator=generator) * size * 0.4
        boxes = torch.cat(
            [low, low + size * (0.3 + 0.2 * torch.rand(2, 2, generator=generator))], 1
        )
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(2) % classes
        corners = [b[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy() for b in boxes]
        if masks == "polygon":
            instances.gt_masks = PolygonMasks([[corner] for corner in corners])
        elif masks:
            bitmasks = BitMasks.from_polygon_masks([[c] for c in corners], size, size)
            instances.gt_masks = bitmasks if masks == "bitmask" else bitmasks.tensor
        if keypoints:
            middle = (boxes[:, :2] + boxes[:, 2:]) / 2
            visible = torch.full((2, 17, 1), 2.0)
            instances.gt_keypoints = Keypoints(
                torch.cat([middle[:, None].expand(2, 17, 2), visible], 2)
            )
        if points:
            share = torch.rand(2, 10, 2, generator=generator)
            spans = (boxes[:, 2:] - boxes[:, :2])[:, None]
            instances.gt_point_coords = boxes[:, None, :2] + share * spans
            instances.gt_point_labels = (share.sum(2) > 1).float()
        batch.append(
            {
                "image": image,
                "height": size,
                "width": size,
                "instances": instances,
                "image_id": index,
                "file_name": f"{index}.png",
            }
        )
    return batch


def labelled_maps(
    count: int = 2, size: int = SIZE, *, classes: int = 3, masks: str = "bitmask"
) -> list[dict[str, Any]]:
    """Images with a class for every pixel, and Panoptic-DeepLab's centres and offsets."""
    batch = images(count, size, masks=masks)
    rows, columns = np.mgrid[:size, :size]
    label = torch.from_numpy(rows * classes // size + columns * 0).long()
    for one in batch:
        one["sem_seg"] = label
        one["sem_seg_weights"] = torch.ones(size, size)
        one["center"] = torch.zeros(size, size)
        one["center"][size // 2, size // 2] = 1.0
        one["center_weights"] = torch.ones(size, size)
        one["center_points"] = [[size // 2, size // 2]]
        one["offset"] = torch.stack(
            [torch.from_numpy(size // 2 - v) for v in (rows, columns)]
        ).float()
        one["offset_weights"] = torch.ones(size, size)
    return batch
