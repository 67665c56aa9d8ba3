"""A training iteration of Faster R-CNN R50-FPN on two made-up images, to be counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import cbn_det
from cbn_det.norms import DoubleForward

BASE = Path(__file__).resolve().parents[1] / "configs/coco/base/rcnn_R_50_FPN_1x.yaml"
_SIZE = 64  # height and width of the images, in pixels
_FPN_AND_HEAD = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
#: places of the norm -> config keys that name it, and MODEL.BACKBONE.FREEZE_AT
PLACES = {
    "fpn_and_head": (_FPN_AND_HEAD, 2),
    "everywhere": (("MODEL.RESNETS.NORM", *_FPN_AND_HEAD), 0),
}


def detector_step(norm: str, place: str, *, rois: int = 16) -> tuple[nn.Module, Callable[[], None]]:
    """The model, with random weights, and a function that makes one training step with it: forward,
    backward, optimiser step and Double Forward, on the same two images each time.

    Args:
        norm: as in a config.
        place: a key of ``PLACES``; "fpn_and_head" has FrozenBN in the backbone.
        rois: RoIs of an image that the head is trained on.

    Raises:
        ImportError: detectron2 is not installed.
        ValueError: an unknown norm, or one that does not fit a layer.
    """
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cbn_det.register()
    cfg = get_cfg()
    cfg.merge_from_file(str(BASE))
    keys, freeze_at = PLACES[place]
    values = [word for key in keys for word in (key, norm)]
    values += ["MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.DEVICE", "cpu"]
    # weights hardly move, so that the random network stays one that has proposals
    cfg.merge_from_list([*values, "SOLVER.BASE_LR", 1e-5])
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = rois
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    double_forward = DoubleForward(model, proposals=model.proposal_generator)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8]]) * _SIZE
    batch = []
    for _ in range(2):
        truth = Instances((_SIZE, _SIZE), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([3, 7]))
        batch.append({"image": torch.randint(256, (3, _SIZE, _SIZE)), "instances": truth})

    def step() -> None:
        torch.manual_seed(0)  # the same proposals are drawn each time
        optimizer.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()
            optimizer.step()
            double_forward.refresh()

    return model, step
