"""The projects that are run, and how each is made small enough for a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from inputs import images, labelled_maps
from smoke import Case
from torch import nn

import cbn_det
from cbn_det.plugin.registry import norm_keys

Batch = Callable[[], Any]
DATASET = "cbn_det_client"
STRIDES = ["stride4", "stride8", "stride16", "stride32"]

#: for every yacs config: nothing is frozen or loaded, few proposals
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "DATASETS.TRAIN": (DATASET,),
    "DATASETS.TEST": (DATASET,),
}
#: a ResNet-50 whose widest stage has 256 channels, where blocks must be bottlenecks
NARROW = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 8}
NO_FREEZING = {"MODEL.BACKBONE.FREEZE_AT": -1}
WIDE = {"MODEL.FPN.OUT_CHANNELS": 256}  # a number that a head has in its code
R18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
POLYGONS = partial(images, masks="polygon")
BITMASKS = partial(images, masks="bitmask")
MAPS_OF_TENSORS = partial(labelled_maps, masks="tensor")


def images_of_people() -> list[dict[str, Any]]:
    """With three points of the body's surface an object (DensePose)."""
    from densepose.structures import DensePoseDataRelative, DensePoseList

    batch = images(classes=1)
    thirds = [64.0, 128.0, 192.0]
    surface = {"dp_x": thirds, "dp_y": thirds, "dp_I": [1, 2, 3], "dp_masks": []}
    surface |= {"dp_U": [0.2, 0.5, 0.8], "dp_V": [0.8, 0.5, 0.2]}
    for one in batch:
        boxes = one["instances"].gt_boxes
        people = [DensePoseDataRelative(surface) for _ in range(len(boxes))]
        one["instances"].gt_densepose = DensePoseList(people, boxes, one["image"].shape[1:])
    return batch


@dataclass(frozen=True)
class Project:
    """How a project's models are built.

    Attributes:
        imports: modules whose import registers its parts.
        config: functions "module:name" that add the project's config nodes, in order.
        cases: (config file, overrides, batch) below the checkout; a ``.py`` file is a LazyConfig,
            its overrides are by dotted names, too.
        path: what is put on the import path, below the checkout.
        get_cfg: the function that makes its config.
        convert: the part of the model whose BatchNorms are converted, where the project has no key
            for them.
        prepare: called with the checkout before anything is imported.
    """

    cases: tuple[tuple[str, dict[str, Any], Batch], ...]
    imports: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    path: tuple[str, ...] = (".",)
    get_cfg: str = "detectron2.config:get_cfg"
    convert: str = ""
    prepare: Callable[[Path], None] | None = None


def named(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def cases_of(project: Project, checkout: Path) -> Iterator[Case]:
    """Every configuration of a project whose checkout is given."""
    sys.path[:0] = [str(checkout / part) for part in project.path]
    os.chdir(checkout)  # configs name files below it
    if project.prepare:
        project.prepare(checkout)
    for module in project.imports:
        importlib.import_module(module)
    metadata = MetadataCatalog.get(DATASET)
    metadata.set(
        thing_classes=["a", "b"],
        stuff_classes=["x", "y", "z"],
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        ignore_label=255,
        label_divisor=1000,
    )
    for file, overrides, batch in project.cases:
        build = _lazy if file.endswith(".py") else partial(_yacs, project)
        path = checkout / file
        if file.startswith("zoo:"):  # one of detectron2's own, with a part of the project's
            path = Path(get_config_file(file.removeprefix("zoo:")))
            file = overrides["MODEL.BACKBONE.NAME"]
        yield Case(file, partial(build, path, overrides), batch)


def _yacs(project: Project, file: Path, overrides: dict[str, Any], norm: str) -> nn.Module:
    cfg = named(project.get_cfg)()
    for adder in project.config:
        named(adder)(cfg)
    cfg.set_new_allowed(True)  # keys of the project's solver that no model reads
    cfg.merge_from_file(str(file))
    for key, value in (SMALL | overrides).items():
        _set(cfg, key, value)
    for key, _ in list(norm_keys(cfg)):
        _set(cfg, key, "BN" if project.convert else norm)
    model = build_model(cfg).train()
    if project.convert and norm != "BN":
        cbn_det.convert_norm(model.get_submodule(project.convert), norm)
    return model


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, last = key.split(".")
    for node in nodes:
        cfg = cfg[node]
    cfg[last] = value


def _lazy(file: Path, overrides: dict[str, Any], norm: str) -> nn.Module:
    model = LazyConfig.load(str(file)).model
    for key, value in overrides.items():
        *nodes, last = key.split(".")
        node = model
        for name in nodes:
            node = node[int(name) if name.isdigit() else name]
        node[last] = value
    _norms(model, norm)
    return instantiate(model).train()


def _norms(node: Any, norm: str) -> None:
    """Every ``norm`` and ``conv_norm`` of a lazy config that is set, FrozenBN too."""
    if hasattr(node, "keys"):
        for key in list(node.keys()):
            value = node[key]
            if key in ("norm", "conv_norm") and value is not None and value != "":
                node[key] = norm
            else:
                _norms(value, norm)
    elif isinstance(node, (list, tuple)) or type(node).__name__ == "ListConfig":
        for value in node:
            _norms(value, norm)


def _empty_module(*names: str) -> None:
    """Stands for a CUDA extension that a project imports and, on a CPU, does not call."""
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))


def _tools_of_panoptic_data(_: Path) -> None:
    """panopticapi, which only the reading and evaluation of panoptic data sets needs."""
    _empty_module("panopticapi", "panopticapi.utils", "panopticapi.evaluation")
    for name in ("rgb2id", "id2rgb"):
        setattr(sys.modules["panopticapi.utils"], name, None)


def _old_numpy(_: Path) -> None:
    """PointSup sums generators, which numpy 2 refuses."""
    with_arrays = np.sum
    np.sum = lambda a, *args, **options: with_arrays(
        list(a) if inspect.isgenerator(a) else a, *args, **options
    )


def _centernet(_: Path) -> None:
    """The DLA backbones fetch their weights where they are built."""
    from centernet.modeling.backbone import dla, dlafpn

    for module in (dla, dlafpn):
        module.DLA.load_pretrained_model = lambda *args, **options: None


def _old_torchvision(_: Path) -> None:
    """Sparse R-CNN takes torchvision 0.29 for 0.2, by its first three letters."""
    import torchvision

    torchvision.ops._new_empty_tensor = torchvision.ops.misc._output_size = None


def _old_detectron2(_: Path) -> None:
    """The teachers' focal loss needs a class that detectron2 dropped; their cross entropy is
    run."""
    from detectron2.modeling.roi_heads import fast_rcnn

    fast_rcnn.FastRCNNOutputs = object


def _name_that_torch_never_had(_: Path) -> None:
    """Two configs of Rethinking-BatchNorm name ``nn.SyncBatchNorm2d``."""
    nn.SyncBatchNorm2d = nn.SyncBatchNorm


def _into_detectron2(name: str, file: Path) -> types.ModuleType:
    """Loads one file of a fork of detectron2 as a module of the detectron2 that is installed."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _resnest(checkout: Path) -> None:
    """ResNeSt is a fork of detectron2 that changed its ResNet and added one file."""
    from detectron2.modeling import BACKBONE_REGISTRY
    from detectron2.modeling.backbone import fpn

    folder = checkout / "detectron2" / "modeling" / "backbone"
    BACKBONE_REGISTRY._obj_map.pop("build_resnet_backbone")
    _into_detectron2("detectron2.modeling.backbone.splat", folder / "splat.py")
    resnet = _into_detectron2("detectron2.modeling.backbone.resnest", folder / "resnet.py")
    fpn.build_resnet_backbone = resnet.build_resnet_backbone


def _detic(checkout: Path) -> None:
    """CLIP's tokenizer is for captions; timm's weights are fetched where the backbone is built."""
    _empty_module("clip", "clip.simple_tokenizer")
    sys.modules["clip.simple_tokenizer"].SimpleTokenizer = None
    from detic.modeling.backbone import timm

    create = timm.create_model
    timm.create_model = lambda *args, **options: create(*args, **options | {"pretrained": False})


def _detrex(checkout: Path) -> None:
    """Its setup.py links the common configs into the package; here they are read where they are."""
    _empty_module("detrex._C", "wandb", "fairscale", "fairscale.nn", "fairscale.nn.checkpoint")
    sys.modules["fairscale.nn.checkpoint"].checkpoint_wrapper = None
    import detrex.config

    detrex.config.get_config = lambda name: LazyConfig.load(str(checkout / "configs" / name))


_SOLO = {
    "MODEL.SOLOV2.NUM_GRIDS": [8, 6, 5, 4, 3],
    "MODEL.SOLOV2.NUM_INSTANCE_CONVS": 1,
    "MODEL.SOLOV2.INSTANCE_CHANNELS": 64,
    "MODEL.SOLOV2.MASK_CHANNELS": 32,
    "MODEL.SOLOV2.NUM_KERNELS": 64,
    "MODEL.SOLOV2.NUM_MASKS": 64,
}
_VITDET = {
    "backbone.net.img_size": 128,
    "backbone.net.embed_dim": 32,
    "backbone.net.depth": 2,
    "backbone.net.num_heads": 2,
    "backbone.net.window_size": 4,
    "backbone.net.window_block_indexes": [0],
    "backbone.net.residual_block_indexes": [1],
    "backbone.square_pad": 128,
    "proposal_generator.post_nms_topk": [40, 20],
    "roi_heads.batch_size_per_image": 16,
}
_RETHINKING = {
    "backbone.bottom_up.freeze_at": 0,
    "roi_heads.batch_size_per_image": 16,
    "proposal_generator.post_nms_topk": [40, 20],
}

PROJECTS = {
    "PointRend": Project(
        imports=("point_rend",),
        config=("point_rend:add_pointrend_config",),
        cases=(
            ("configs/InstanceSegmentation/pointrend_rcnn_R_50_FPN_1x_coco.yaml", R18, BITMASKS),
            (
                "configs/InstanceSegmentation/implicit_pointrend_R_50_FPN_1x_coco.yaml",
                R18,
                BITMASKS,
            ),
            (
                "configs/SemanticSegmentation/pointrend_semantic_R_101_FPN_1x_cityscapes.yaml",
                R18,
                labelled_maps,
            ),
        ),
    ),
    "TridentNet": Project(
        imports=("tridentnet",),
        config=("tridentnet:add_tridentnet_config",),
        cases=(("configs/tridentnet_fast_R_50_C4_1x.yaml", NARROW, images),),
    ),
    "DensePose": Project(
        imports=("densepose",),
        config=("densepose:add_densepose_config",),
        cases=(
            ("configs/densepose_rcnn_R_50_FPN_s1x.yaml", R18 | WIDE, images_of_people),
            ("configs/densepose_rcnn_R_50_FPN_DL_s1x.yaml", R18 | WIDE, images_of_people),
            ("configs/HRNet/densepose_rcnn_HRFPN_HRNet_w32_s1x.yaml", {}, images_of_people),
        ),
    ),
    "PointSup": Project(
        imports=("point_sup",),
        config=(
            "detectron2.projects.point_rend:add_pointrend_config",
            "point_sup:add_point_sup_config",
        ),
        prepare=_old_numpy,
        cases=(
            (
                "configs/mask_rcnn_R_50_FPN_3x_point_sup_coco.yaml",
                R18,
                partial(images, points=True),
            ),
        ),
    ),
    "Panoptic-DeepLab": Project(
        imports=("panoptic_deeplab",),
        prepare=_tools_of_panoptic_data,
        config=("panoptic_deeplab:add_panoptic_deeplab_config",),
        cases=(
            (
                "configs/Cityscapes-PanopticSegmentation/"
                "panoptic_deeplab_R_52_os16_mg124_poly_90k_bs32_crop_512_1024_dsconv.yaml",
                NARROW | {"INPUT.CROP.SIZE": (96, 96)},
                labelled_maps,
            ),
        ),
    ),
    "DeepLab": Project(
        imports=("deeplab",),
        config=("deeplab:add_deeplab_config",),
        cases=tuple(
            (
                f"configs/Cityscapes-SemanticSegmentation/{name}_R_103_os16_mg124_poly_90k_bs16.yaml",
                NARROW
                | {
                    "MODEL.RESNETS.DEPTH": 50,
                    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 64,  # of v3, as many as CONVS_DIM
                    "INPUT.CROP.SIZE": (96, 96),
                },
                labelled_maps,
            )
            for name in ("deeplab_v3", "deeplab_v3_plus")
        ),
    ),
    "TensorMask": Project(
        imports=("tensormask",),
        config=("tensormask:add_tensormask_config",),
        cases=(("configs/tensormask_R_50_FPN_1x.yaml", R18, BITMASKS),),
    ),
    "ViTDet": Project(
        path=(),
        cases=(("configs/COCO/mask_rcnn_vitdet_b_100ep.py", _VITDET, BITMASKS),),
    ),
    "MViTv2": Project(
        path=(),
        cases=(
            (
                "configs/mask_rcnn_mvitv2_t_3x.py",
                {
                    "backbone.norm": "BN",
                    "roi_heads.mask_head.conv_norm": "BN",
                    "backbone.bottom_up.embed_dim": 32,
                    "backbone.bottom_up.depth": 4,
                    "backbone.bottom_up.last_block_indexes": [0, 1, 2, 3],
                    "roi_heads.batch_size_per_image": 16,
                    "proposal_generator.post_nms_topk": [40, 20],
                },
                POLYGONS,
            ),
        ),
    ),
    "Rethinking-BatchNorm": Project(
        path=(),
        prepare=_name_that_torch_never_had,
        cases=(
            ("configs/mask_rcnn_BNhead.py", _RETHINKING, POLYGONS),
            ("configs/mask_rcnn_BNhead_batch_stats.py", _RETHINKING, POLYGONS),
            ("configs/mask_rcnn_BNhead_shuffle.py", _RETHINKING, POLYGONS),
            ("configs/mask_rcnn_SyncBNhead.py", _RETHINKING, POLYGONS),
            ("configs/retinanet_SyncBNhead.py", {"backbone.bottom_up.freeze_at": 0}, images),
            (
                "configs/retinanet_SyncBNhead_SharedTraining.py",
                {"backbone.bottom_up.freeze_at": 0},
                images,
            ),
        ),
    ),
    "AdelaiDet": Project(
        imports=("adet.modeling",),
        get_cfg="adet.config:get_cfg",
        prepare=lambda checkout: _empty_module("adet._C"),
        cases=(
            ("configs/FCOS-Detection/R_50_1x.yaml", R18, images),
            ("configs/FCOS-Detection/FCOS_RT/MS_DLA_34_4x_syncbn.yaml", NO_FREEZING, images),
            (
                "configs/FCOS-Detection/FCOS_RT/MS_DLA_34_4x_syncbn_bn_head.yaml",
                NO_FREEZING,
                images,
            ),
            ("configs/FCOS-Detection/vovnet/MS_V_39_3x.yaml", NO_FREEZING, images),
            (
                "configs/BlendMask/R_50_1x.yaml",
                R18 | {"MODEL.BASIS_MODULE.LOSS_ON": False},
                BITMASKS,
            ),
            ("configs/CondInst/MS_R_50_1x.yaml", R18, BITMASKS),
            ("configs/CondInst/MS_R_50_BiFPN_1x.yaml", R18, BITMASKS),
            ("configs/SOLOv2/R50_3x.yaml", R18 | WIDE | _SOLO, BITMASKS),
        ),
    ),
    "vovnet-detectron2": Project(
        imports=("vovnet",),
        config=("vovnet:add_vovnet_config",),
        cases=(
            ("configs/mask_rcnn_V_39_FPN_3x.yaml", {}, POLYGONS),
            ("configs/faster_rcnn_V_19_slim_dw_FPNLite_3x.yaml", {}, images),
            ("configs/faster_rcnn_Mv2_FPNLite_3x.yaml", {}, images),
        ),
    ),
    "centermask2": Project(
        imports=("centermask",),
        get_cfg="centermask.config:get_cfg",
        cases=(
            ("configs/centermask/centermask_V_39_eSE_FPN_ms_3x.yaml", NO_FREEZING, POLYGONS),
            (
                "configs/centermask/centermask_lite_V_19_slim_dw_eSE_FPN_ms_4x.yaml",
                NO_FREEZING,
                POLYGONS,
            ),
            ("configs/centermask/centermask_lite_Mv2_FPN_ms_4x.yaml", {}, POLYGONS),
        ),
    ),
    "CenterNet2": Project(
        imports=("centernet",),
        config=("centernet.config:add_centernet_config",),
        prepare=_centernet,
        cases=(
            ("configs/CenterNet2_R50_1x.yaml", R18, images),
            ("configs/CenterNet-FPN_R50_1x.yaml", R18, images),
            ("configs/CenterNet2_DLA-BiFPN-P3_4x.yaml", {}, images),
            ("configs/CenterNet2_DLA-fcosBiFPN-P5_640_16x_ST.yaml", {}, images),
            (
                "configs/CenterNet2_R2-101-DCN-BiFPN_1280_4x.yaml",
                {
                    "MODEL.RESNETS.DEPTH": 50,
                    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False] * 4,
                    "MODEL.CENTERNET.USE_DEFORMABLE": False,
                },
                images,
            ),
        ),
    ),
    "detectron2-ResNeSt": Project(
        path=(),
        prepare=_resnest,
        cases=(
            (
                "configs/COCO-Detection/faster_rcnn_ResNeSt_50_FPN_1x.yaml",
                {"MODEL.RESNETS.BOTTLENECK_WIDTH": 64},
                images,
            ),
        ),
    ),
    "MaskFormer": Project(
        imports=("mask_former",),
        config=(
            "detectron2.projects.deeplab:add_deeplab_config",
            "mask_former:add_mask_former_config",
        ),
        cases=(
            ("configs/ade20k-150/maskformer_R50_bs16_160k.yaml", R18, MAPS_OF_TENSORS),
            ("configs/ade20k-150/per_pixel_baseline_plus_R50_bs16_160k.yaml", R18, labelled_maps),
        ),
    ),
    "Mask2Former": Project(
        imports=("mask2former",),
        config=(
            "detectron2.projects.deeplab:add_deeplab_config",
            "mask2former:add_maskformer2_config",
        ),
        prepare=lambda checkout: _empty_module("MultiScaleDeformableAttention"),
        cases=(
            (
                "configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
                R18,
                partial(images, masks="tensor"),
            ),
        ),
    ),
    "Detic": Project(
        path=(".", "third_party/CenterNet2", "../CenterNet2"),
        prepare=_detic,
        imports=("centernet", "detic"),
        config=("centernet.config:add_centernet_config", "detic.config:add_detic_config"),
        cases=(
            (
                "configs/BoxSup-C2_LCOCO_CLIP_R18_640b32_4x.yaml",
                {"MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False, "FP16": False},
                BITMASKS,
            ),
        ),
    ),
    "detrex": Project(
        prepare=_detrex,
        cases=(
            (
                "projects/dab_detr/configs/dab_detr_r50_50ep.py",
                {
                    "device": "cpu",
                    "backbone.freeze_at": 0,
                    "transformer.encoder.num_layers": 1,
                    "transformer.decoder.num_layers": 1,
                },
                images,
            ),
        ),
    ),
    "SparseR-CNN": Project(
        path=("projects/SparseRCNN",),
        prepare=_old_torchvision,
        imports=("sparsercnn",),
        config=("sparsercnn:add_sparsercnn_config",),
        cases=(
            (
                "projects/SparseRCNN/configs/sparsercnn.res50.100pro.3x.yaml",
                R18 | WIDE,
                images,
            ),
        ),
    ),
    "unbiased-teacher": Project(
        prepare=_old_detectron2,
        imports=(
            "ubteacher.modeling.meta_arch.rcnn",
            "ubteacher.modeling.roi_heads.roi_heads",
            "ubteacher.modeling.proposal_generator.rpn",
        ),
        config=("ubteacher:add_ubteacher_config",),
        cases=(
            (
                "configs/coco_supervision/faster_rcnn_R_50_FPN_sup1_run1.yaml",
                R18 | {"MODEL.ROI_HEADS.LOSS": "CrossEntropy"},
                images,
            ),
        ),
    ),
    "adaptive_teacher": Project(
        prepare=_old_detectron2,
        convert="backbone",
        imports=(
            "adapteacher.modeling.meta_arch.rcnn",
            "adapteacher.modeling.meta_arch.vgg",
            "adapteacher.modeling.roi_heads.roi_heads",
            "adapteacher.modeling.proposal_generator.rpn",
        ),
        config=("adapteacher:add_ateacher_config",),
        cases=(("configs/faster_rcnn_VGG_cross_city.yaml", {}, images),),
    ),
    "detectron2_backbone": Project(
        imports=("detectron2_backbone.backbone",),
        config=("detectron2_backbone.config:add_backbone_config",),
        convert="backbone",
        cases=tuple(
            (
                "zoo:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
                {"MODEL.BACKBONE.NAME": f"build_{name}_backbone"} | more,
                images,
            )
            for name, more in (
                ("efficientnet_fpn", {"MODEL.FPN.IN_FEATURES": STRIDES}),
                (
                    "efficientnet_bifpn",
                    {
                        "MODEL.FPN.IN_FEATURES": STRIDES[1:],
                        "MODEL.FPN.REPEAT": 1,
                        "MODEL.FPN.FUSE_TYPE": "fast",
                        "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
                        "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
                    },
                ),
                ("mnv2_fpn", {}),
            )
        ),
    ),
}
