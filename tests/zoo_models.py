"""detectron2's zoo, narrow: the zoo's own configs and depths, with few channels, and random inputs.

Imports detectron2; tests import it inside their functions.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from cbn_det.norms import DoubleForward, GKN2d, SmallBatchNorm2d

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pkg_resources
    from detectron2 import model_zoo

HEIGHT, WIDTH = 96, 128
CBN = "CBN(burn_in=0, window=4)"
#: every method, with options that make it what it is from the first steps on
NORMS = {
    "CBN": CBN,
    "KN": "KN(gain=0.5)",
    "GKN": "GKN(groups=4, gain=0.5)",
    "MBN": "MBN(burn_in=0, window=4)",
    "BGN": "BGN(groups=4)",
    "BRN": "BRN(burn_in=0, ramp=0)",
}

NARROW = [
    ("MODEL.DEVICE", "cpu"),
    ("MODEL.WEIGHTS", ""),
    ("MODEL.BACKBONE.FREEZE_AT", 0),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    ("MODEL.FPN.OUT_CHANNELS", 16),
    ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
    ("MODEL.RPN.PRE_NMS_TOPK_TEST", 50),
    ("MODEL.RPN.POST_NMS_TOPK_TEST", 8),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 5),
    ("MODEL.ROI_BOX_HEAD.CONV_DIM", 16),
    ("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    ("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16, 16)),
    ("MODEL.RETINANET.NUM_CLASSES", 5),
    ("MODEL.RETINANET.NUM_CONVS", 2),
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16),
    ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6),
    ("INPUT.CROP.ENABLED", False),
]
CONV_BOX_HEAD = [
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    ("MODEL.ROI_BOX_HEAD.NUM_CONV", 2),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", 1),
]
DEEPLAB = [
    ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    ("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
    ("MODEL.RESNETS.STRIDE_IN_1X1", False),
    ("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 16),
]
DEEPLAB_V3 = DEEPLAB + [
    ("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head"),
    ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]),
    ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16),
]
DEEPLAB_V3_PLUS = DEEPLAB + [
    ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]),
    ("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead"),
    ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res5"]),
    ("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [8]),
]
PANOPTIC_DEEPLAB = DEEPLAB + [
    ("MODEL.META_ARCHITECTURE", "PanopticDeepLab"),
    ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res5"]),
    ("MODEL.SEM_SEG_HEAD.NAME", "PanopticDeepLabSemSegHead"),
    ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res5"]),
    ("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2", "res3"]),
    ("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [8, 8]),
    ("MODEL.SEM_SEG_HEAD.HEAD_CHANNELS", 16),
    ("MODEL.INS_EMBED_HEAD.PROJECT_CHANNELS", [8, 8]),
    ("MODEL.INS_EMBED_HEAD.ASPP_CHANNELS", 16),
    ("MODEL.INS_EMBED_HEAD.HEAD_CHANNELS", 8),
    ("MODEL.INS_EMBED_HEAD.CONVS_DIM", 16),
    ("DATASETS.TRAIN", ("cityscapes_fine_panoptic_train",)),
]
DEPTHWISE = [
    ("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", True),
    ("MODEL.PANOPTIC_DEEPLAB.USE_DEPTHWISE_SEPARABLE_CONV", True),
]

#: name -> (config of the zoo, changes)
YAML = {
    "faster_rcnn_fpn": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", CONV_BOX_HEAD),
    "faster_rcnn_c4": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", []),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", CONV_BOX_HEAD),
    "cascade_mask_rcnn": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", CONV_BOX_HEAD),
    "keypoint_rcnn": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        CONV_BOX_HEAD + [("MODEL.ROI_HEADS.NUM_CLASSES", 1)],
    ),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", []),
    "panoptic_fpn": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", CONV_BOX_HEAD),
    "semantic_fpn": ("Misc/semantic_R_50_FPN_1x.yaml", []),
    "mask_rcnn_deformable": (
        "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
        CONV_BOX_HEAD,
    ),
    "deeplab_v3": ("Base-RCNN-DilatedC5.yaml", DEEPLAB_V3),
    "deeplab_v3_plus": ("Base-RCNN-DilatedC5.yaml", DEEPLAB_V3_PLUS),
    "panoptic_deeplab": ("Base-RCNN-DilatedC5.yaml", PANOPTIC_DEEPLAB),
    "panoptic_deeplab_depthwise": ("Base-RCNN-DilatedC5.yaml", PANOPTIC_DEEPLAB + DEPTHWISE),
}


def yaml_config(name: str, changes: list[tuple[str, Any]] = ()) -> CfgNode:
    """The zoo's config, narrow, on CPU, from scratch."""
    file, own = YAML[name]
    cfg = get_cfg()
    if "panoptic_deeplab" in name:
        with stub_panopticapi():
            from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config
        add_panoptic_deeplab_config(cfg)
    elif "deeplab" in name:
        from detectron2.projects.deeplab import add_deeplab_config

        add_deeplab_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(file))
    for key, value in [*NARROW, *own, *changes]:
        cfg.merge_from_list([key, value])
    return cfg


@contextmanager
def stub_panopticapi() -> Iterator[None]:
    """Panoptic-DeepLab's package imports one function of panopticapi, for its data loading only."""
    names = ("panopticapi", "panopticapi.utils")
    if any(name in sys.modules for name in names):
        yield
        return
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["panopticapi.utils"].rgb2id = None
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def set_norms(cfg: CfgNode, norm: str) -> None:
    """Names ``norm`` at every norm key of a config."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            set_norms(value, norm)
        elif key == "NORM":
            cfg[key] = norm


def _set_lazy_norms(node: Any, norm: str) -> None:
    items = node.items() if hasattr(node, "items") else ()
    for key, value in list(items):
        if key in ("norm", "conv_norm"):
            node[key] = norm
        elif hasattr(value, "items"):
            _set_lazy_norms(value, norm)


def _fcos(norm: str) -> nn.Module:
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    bottom_up = model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stages.depth = 18  # LazyConfig's R-50 has no width to set
    bottom_up.stages.pop("stride_in_1x1")
    model.backbone.norm = ""
    model.backbone.out_channels = 16
    model.backbone.top_block.in_channels = 16
    model.head.input_shape = [ShapeSpec(channels=16)] * 5
    model.head.conv_dims = [16, 16]
    model.num_classes = 5
    _set_lazy_norms(model, norm)
    return instantiate(model)


def _regnet(norm: str) -> nn.Module:
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead

    model = model_zoo.get_config(
        "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py"
    ).model
    model.backbone.bottom_up.update(
        stem_width=8, depth=8, w_a=9.0, w_0=8, w_m=2.0, group_width=4, freeze_at=0
    )
    model.backbone.out_channels = 16
    model.backbone.norm = ""
    model.proposal_generator.head.in_channels = 16
    model.proposal_generator.post_nms_topk = (50, 8)
    heads = model.roi_heads
    heads.num_classes, heads.batch_size_per_image = 5, 8
    heads.box_head = L(FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=16, height=7, width=7),
        conv_dims=[16],
        fc_dims=[32],
        conv_norm="",
    )
    heads.box_predictor.input_shape = ShapeSpec(channels=32)
    heads.mask_head.update(
        input_shape=ShapeSpec(channels=16, width=14, height=14), conv_dims=[16, 16], conv_norm=""
    )
    _set_lazy_norms(model, norm)
    return instantiate(model)


#: name -> builder from a norm; the models that detectron2 has as a LazyConfig only
LAZY: dict[str, Callable[[str], nn.Module]] = {"fcos": _fcos, "mask_rcnn_regnet": _regnet}


def build(
    name: str,
    norm: str,
    changes: list[tuple[str, Any]] = (),
    seed: int = 0,
    sections: Mapping[str, str] = {},
) -> nn.Module:
    """The model in training mode, with ``norm`` at every norm site but those of ``sections``
    (``{"FPN": "BN"}`` is MODEL.FPN.NORM). The same seed gives the same convolutions whatever the
    norm."""
    torch.manual_seed(seed)
    if name in LAZY:
        return LAZY[name](norm).train()
    cfg = yaml_config(name, changes)
    set_norms(cfg.MODEL, norm)
    for section, other in sections.items():
        cfg.MODEL[section].NORM = other
    return build_model(cfg).train()


def random_inputs(seed: int = 0, images: int = 2, objects: int = 2) -> list[dict[str, Any]]:
    """What a training loader yields, with every kind of annotation, on random images."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_input(generator, objects) for _ in range(images)]


def _random_input(generator: torch.Generator, objects: int) -> dict[str, Any]:
    corner = torch.randint(0, 40, (objects, 2), generator=generator).float()
    size = torch.randint(20, 50, (objects, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + size], 1)
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)[None, :]
    masks = torch.stack(
        [
            (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
            for x0, y0, x1, y1 in boxes.tolist()
        ]
        or [torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)]
    ).reshape(objects, HEIGHT, WIDTH)
    points = boxes[:, None, :2] + torch.rand(objects, 17, 2, generator=generator) * size[:, None]
    visible = torch.full((objects, 17, 1), 2.0)
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.zeros(objects, dtype=torch.long)
    instances.gt_masks = BitMasks(masks)
    instances.gt_keypoints = Keypoints(torch.cat([points, visible], 2))
    plane = (HEIGHT, WIDTH)
    return {
        "image": torch.randint(0, 256, (3, *plane), dtype=torch.uint8, generator=generator),
        "height": HEIGHT,
        "width": WIDTH,
        "instances": instances,
        "sem_seg": torch.randint(0, 6, plane, generator=generator),
        "center": torch.rand(plane, generator=generator),
        "offset": torch.rand(2, *plane, generator=generator),
        "center_weights": torch.ones(plane),
        "offset_weights": torch.ones(plane),
    }


def losses(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    with EventStorage():  # the heads log to one
        return model(inputs)


def train(model: nn.Module, steps: int = 2, lr: float = 0.1) -> list[dict[str, float]]:
    """SGD steps on random inputs, each with the second pass that MBN wants; the losses of each.
    The last step's gradients stay."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    double_forward = DoubleForward(model)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        terms = losses(model, random_inputs(step))
        sum(terms.values()).backward()
        optimizer.step()
        with EventStorage():
            double_forward.refresh()
        found.append({key: float(value) for key, value in terms.items()})
    double_forward.remove()
    return found


@torch.no_grad()
def evaluate(model: nn.Module, seed: int = 9) -> list[Any]:
    """One evaluation forward of one image, as a list of everything that came out."""
    training = model.training
    model.eval()
    out = model([{k: v for k, v in random_inputs(seed, 1)[0].items() if k in INPUT_KEYS}])
    model.train(training)
    return out


INPUT_KEYS = ("image", "height", "width")


def our_layers(model: nn.Module) -> dict[str, SmallBatchNorm2d | GKN2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (SmallBatchNorm2d, GKN2d))}


def cbn_layers(model: nn.Module) -> dict[str, SmallBatchNorm2d]:
    """Those that keep BatchNorm's contract: all but GKN."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SmallBatchNorm2d)}


def batchnorm_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@contextmanager
def convolutions_seen(model: nn.Module, monkeypatch: Any) -> Iterator[dict[str, nn.Parameter]]:
    """Notes which weight made the input of each of our layers in its first training forward, by the
    identity of the tensors that ``F.conv2d`` returns: nothing of the layers' own bookkeeping is
    used."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    fed: dict[str, torch.Tensor] = {}
    original = F.conv2d

    def conv2d(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(input, weight, *args, **kwargs)
        made[id(out)] = (out, weight)
        return out

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            fed.setdefault(name, made[id(args[0])][1] if id(args[0]) in made else None)

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in our_layers(model).items()]
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", conv2d)
        try:
            yield fed
        finally:
            for hook in hooks:
                hook.remove()
