"""The configs: what their rows have in common, what differs, and that each of them trains."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import REPOSITORY, run_loggers_removed

from cbn_det.norms import parse_spec

pytestmark = pytest.mark.detectron2

CONFIGS = REPOSITORY / "configs"
COCO = CONFIGS / "coco"
SUBSET = REPOSITORY.parent / "shared" / "data" / "coco2017_subset"

# a file's name begins with one of these; what detectron2 and the norms call it
NORMS = {
    "none": "",
    "bn": "BN",
    "syncbn": "SyncBN",
    "gn": "GN",
    "brn": "BRN",
    "cbn": "CBN",
    "kn": "KN",
    "gkn": "GKN",
    "mbn": "MBN",
    "bgn": "BGN",
}
TRAINABLE = set(NORMS) - {"none"}
AUTHORS = {  # 8 of 12 epochs
    "cbn": "CBN(window=4, ema='batch', burn_in=0.66666667)",
    "cbn_naive": "CBN(window=4, ema='batch', burn_in=0.66666667, compensation='none')",
    "cbn_as_released": "CBN(window=4, ema='batch', burn_in=8)",
}
IN_THE_HEADS = {"none", "bn", "syncbn", "gn", "brn", *AUTHORS}

# table -> (rows, images per GPU, value of MODEL.RESNETS.NORM where it is not the row's)
TABLES = {
    "faster_rcnn_R_50_FPN_1x": (set(NORMS), (1, 2), "FrozenBN"),
    "mask_rcnn_R_50_FPN_1x": (set(NORMS), (1, 2), "FrozenBN"),
    "faster_rcnn_R_50_FPN_1x_everywhere": (TRAINABLE | {"gn+ws"}, (1, 2), None),
    "mask_rcnn_R_50_FPN_1x_everywhere": (TRAINABLE | {"gn+ws"}, (1, 2), None),
    "faster_rcnn_R_101_FPN_1x_everywhere": ({"cbn", "gn+ws"}, (1,), None),
    "mask_rcnn_R_101_FPN_2x_everywhere": ({"cbn", "gn+ws"}, (1,), None),
    "mask_rcnn_R_50_FPN_3x_everywhere": (TRAINABLE, (2,), None),
    "mask_rcnn_R_50_FPN_1x_scratch": ({"syncbn"}, (2,), None),
    "mask_rcnn_R_50_FPN_2x_scratch": ({"syncbn"}, (2,), None),
    "mask_rcnn_R_50_FPN_3x_scratch": (TRAINABLE, (2,), None),
    "mask_rcnn_R_50_FPN_6x_scratch": ({"syncbn"}, (2,), None),
    "mask_rcnn_R_50_FPN_9x_scratch": ({"gn", "syncbn"}, (2,), None),
    "faster_rcnn_R_50_FPN_1x_cbn_authors": (IN_THE_HEADS, (4,), "FrozenBN"),
    "mask_rcnn_R_50_FPN_1x_cbn_authors": (IN_THE_HEADS, (4,), "FrozenBN"),
    "faster_rcnn_R_101_FPN_1x_cbn_authors": ({"syncbn", "gn", "cbn"}, (4,), "FrozenBN"),
    "mask_rcnn_R_101_FPN_1x_cbn_authors": ({"syncbn", "gn", "cbn"}, (4,), "FrozenBN"),
    "faster_rcnn_R_50_FPN_1x_cbn_authors_everywhere": ({"bn", "syncbn", "gn", "cbn"}, (4,), None),
}
# what a pretrained backbone wants: its file, its strides, and the images that it was trained with
BACKBONE = ("WEIGHTS", "RESNETS.STRIDE_IN_1X1", "PIXEL_MEAN", "PIXEL_STD")
BGR, RGB = [103.53, 116.28, 123.675], [123.675, 116.28, 103.53]
WANTS = {
    "MSRA": ["detectron2://ImageNetPretrained/MSRA/R-{}.pkl", True, BGR, [1.0] * 3],
    "GN": ["catalog://ImageNetPretrained/FAIR/R-{}-GN", False, BGR, [1.0] * 3],
    "GN+WS": ["weights/R-{}-GN-WS.pkl", False, RGB, [58.395, 57.12, 57.375]],
    "torchvision": [
        "detectron2://ImageNetPretrained/torchvision/R-{}.pkl",
        False,
        RGB,
        [58.395, 57.12, 57.375],
    ],
}
SPECS = NORMS | {"gn+ws": "GN+WS"}
HEADS = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
ROWS = [path for table in TABLES for path in sorted((COCO / table).glob("*.yaml"))]
EXAMPLES = sorted((CONFIGS / "examples").glob("*.yaml"))
QUICKSTART = sorted((CONFIGS / "quickstart").glob("*.yaml"))


def short(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def norm_of(row: Path) -> str:
    """The row's norm as a config names it."""
    name, _, images = row.stem.rpartition("_")
    if name == "cbn" and "authors" not in row.parent.name:  # the paper's rule
        window = min(math.ceil(16 / int(images.removesuffix("img"))), 8)
        return f"CBN(window={window})"
    return AUTHORS[name] if "authors" in row.parent.name and name in AUTHORS else SPECS[name]


def load(path: Path) -> dict[str, Any]:
    """All of detectron2's keys with the values that a file gives them."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return flat(cfg)


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return values


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in {*one, *other} if one.get(key) != other.get(key)}


# ---- the tables ----------------------------------------------------------------------------------


def test_a_table_has_all_its_rows_and_no_others() -> None:
    folders = {path.name for path in COCO.iterdir() if path.name != "base"}
    assert folders == set(TABLES)
    for table, (rows, images, _) in TABLES.items():
        expected = {f"{row}_{n}img.yaml" for row in rows for n in images}
        assert {path.name for path in (COCO / table).iterdir()} == expected, table


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_differ_in_the_norm_alone(table: str) -> None:
    frozen = TABLES[table][2]
    norm_keys = {*HEADS} if frozen else {*HEADS, "MODEL.RESNETS.NORM"}
    configs = {path: load(path) for path in ROWS if path.parent.name == table}
    first = next(iter(configs.values()))
    for path, cfg in configs.items():
        spec = norm_of(path)
        assert {cfg[key] for key in norm_keys} == {spec}, path
        if frozen:
            assert cfg["MODEL.RESNETS.NORM"] == frozen
        free = norm_keys | {"OUTPUT_DIR"}
        if len(TABLES[table][1]) > 1:
            free.add("SOLVER.REFERENCE_WORLD_SIZE")
        if frozen is None and "scratch" not in table:
            free |= {f"MODEL.{key}" for key in BACKBONE} | {"INPUT.FORMAT"}
        assert not differences(cfg, first) - free, path


@pytest.mark.parametrize("path", ROWS, ids=short)
def test_a_pretrained_backbone_gets_its_own_images_and_strides(path: Path) -> None:
    cfg = load(path)
    found = [cfg[f"MODEL.{key}"] for key in BACKBONE]
    if "scratch" in path.parent.name:
        assert found[:2] == ["", False]
        return
    norm = cfg["MODEL.RESNETS.NORM"].replace("GKN", "GN")
    of_batchnorm = "torchvision" if "authors" in path.parent.name else "MSRA"
    spec, *expected = WANTS.get(norm, WANTS[of_batchnorm])
    spec = spec.format(cfg["MODEL.RESNETS.DEPTH"])
    if "torchvision/R-101" in spec:  # which is nowhere to be downloaded
        spec = "weights/R-101-torchvision.pkl"
    assert found == [spec, *expected]
    assert cfg["INPUT.FORMAT"] == ("BGR" if found[2] == BGR else "RGB")


@pytest.mark.parametrize("path", ROWS, ids=short)
def test_a_row_is_read_in_three_files_and_says_norm_and_gpus_itself(path: Path) -> None:
    assert len(list(_bases(path))) <= 3
    own = yaml.safe_load(path.read_text())
    assert own["MODEL"]["FPN"]["NORM"] == norm_of(path)
    assert own["SOLVER"]["REFERENCE_WORLD_SIZE"]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_the_4conv1fc_head_and_a_folder_of_its_own(table: str) -> None:
    for path in ROWS:
        if path.parent.name != table:
            continue
        cfg = load(path)
        head = [cfg[f"MODEL.ROI_BOX_HEAD.{key}"] for key in ("NAME", "NUM_CONV", "NUM_FC")]
        assert head == ["FastRCNNConvFCHead", 4, 1], path
        sizes = [cfg[f"MODEL.ROI_BOX_HEAD.{key}"] for key in ("CONV_DIM", "FC_DIM")]
        assert sizes == [256, 1024], path
        assert cfg["OUTPUT_DIR"] == f"output/coco/{table}/{path.stem}"
        assert cfg["MODEL.MASK_ON"] == table.startswith("mask")


@pytest.mark.parametrize("path", ROWS, ids=short)
def test_images_per_gpu_are_those_of_the_name(path: Path) -> None:
    cfg = load(path)
    images, rest = divmod(cfg["SOLVER.IMS_PER_BATCH"], cfg["SOLVER.REFERENCE_WORLD_SIZE"])
    assert rest == 0
    assert path.stem.endswith(f"_{images}img")


@pytest.mark.parametrize(
    ("ours", "theirs", "changed"),
    [
        (
            "faster_rcnn_R_50_FPN_1x/none_2img",
            "COCO-Detection/faster_rcnn_R_50_FPN_1x",
            {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"},
        ),
        (
            "mask_rcnn_R_50_FPN_1x/none_2img",
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
            {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"},
        ),
        (
            "mask_rcnn_R_50_FPN_3x_everywhere/gn_2img",
            "Misc/mask_rcnn_R_50_FPN_3x_gn",
            {"TEST.PRECISE_BN.ENABLED"},
        ),
        ("mask_rcnn_R_50_FPN_3x_everywhere/syncbn_2img", "Misc/mask_rcnn_R_50_FPN_3x_syncbn", {}),
        (
            "mask_rcnn_R_50_FPN_3x_scratch/gn_2img",
            "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn",
            {"TEST.PRECISE_BN.ENABLED"},
        ),
        (
            "mask_rcnn_R_50_FPN_9x_scratch/gn_2img",
            "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn",
            {"TEST.PRECISE_BN.ENABLED"},
        ),
        (
            "mask_rcnn_R_50_FPN_9x_scratch/syncbn_2img",
            "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn",
            {},
        ),
    ],
)
def test_rows_that_detectron2_has_are_detectron2s(
    ours: str, theirs: str, changed: set[str]
) -> None:
    from detectron2 import model_zoo

    zoo = flat(model_zoo.get_config(f"{theirs}.yaml"))
    found = differences(load(COCO / f"{ours}.yaml"), zoo)
    about_the_run = {"OUTPUT_DIR", "SOLVER.REFERENCE_WORLD_SIZE", "TEST.EVAL_PERIOD"}
    about_the_run |= {"SOLVER.CHECKPOINT_PERIOD"}
    assert found - about_the_run == set(changed)


@pytest.mark.parametrize("table", TABLES)
def test_a_checkpoint_goes_before_each_evaluation(table: str) -> None:
    cfg = load(next(path for path in ROWS if path.parent.name == table))
    assert cfg["TEST.EVAL_PERIOD"] % cfg["SOLVER.CHECKPOINT_PERIOD"] == 0


def test_the_retinanet_example_is_detectron2s_with_a_norm() -> None:
    from detectron2 import model_zoo

    cfg = load(CONFIGS / "examples" / "retinanet_R_50_FPN_1x_cbn.yaml")
    zoo = flat(model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert differences(cfg, zoo) == {
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "MODEL.FPN.NORM",
        "MODEL.RETINANET.NORM",
        "OUTPUT_DIR",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "TEST.EVAL_PERIOD",
    }
    sizes = [key["MODEL.ANCHOR_GENERATOR.SIZES"] for key in (cfg, zoo)]
    for rounded, exact in zip(*sizes, strict=True):
        assert rounded == pytest.approx(exact, rel=1e-5)


def test_the_first_choice_is_the_row_of_batchnorm_with_a_freeze() -> None:
    cfg = load(CONFIGS / "examples" / "faster_rcnn_R_50_FPN_1x_bn_freeze.yaml")
    row = load(COCO / "faster_rcnn_R_50_FPN_1x" / "bn_2img.yaml")
    assert differences(cfg, row) == {*HEADS, "OUTPUT_DIR"}
    assert {cfg[key] for key in HEADS} == {"BN(freeze=0.8)"}


def test_the_authors_setting_is_what_their_configs_say() -> None:
    epoch = 117266 / 16  # images with objects, and 4 GPUs with 4
    for path in ROWS:
        if "authors" not in path.parent.name:
            continue
        cfg = load(path)
        solver = {key.removeprefix("SOLVER."): value for key, value in cfg.items()}
        assert (solver["IMS_PER_BATCH"], solver["REFERENCE_WORLD_SIZE"]) == (16, 4)
        schedule = [*solver["STEPS"], solver["MAX_ITER"]]
        assert schedule == [math.ceil(epoch) * epochs for epochs in (8, 11, 12)]
        if path.stem in ("cbn_4img", "cbn_naive_4img"):
            burn_in = parse_spec(cfg["MODEL.FPN.NORM"])[1]["burn_in"]
            assert round(burn_in * solver["MAX_ITER"]) == math.ceil(epoch) * 8
        assert (solver["BASE_LR"], solver["MOMENTUM"], solver["GAMMA"]) == (0.02, 0.9, 0.1)
        assert solver["WEIGHT_DECAY"] == solver["WEIGHT_DECAY_NORM"] == 1e-4
        assert solver["WARMUP_ITERS"] == 500
        assert solver["WARMUP_FACTOR"] == pytest.approx(1 / 3)
        clip = [solver[f"CLIP_GRADIENTS.{key}"] for key in ("CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE")]
        assert solver["CLIP_GRADIENTS.ENABLED"] and clip == ["full_model", 35.0, 2.0]
        assert cfg["MODEL.RPN.SMOOTH_L1_BETA"] == pytest.approx(1 / 9)
        assert cfg["INPUT.MIN_SIZE_TRAIN"] == [800] and cfg["INPUT.MAX_SIZE_TRAIN"] == 1333


def test_one_image_per_gpu_as_gn_ws_was_published() -> None:
    """4 GPUs x 1 image, IMS_PER_BATCH 4, LR 0.005, 360k, which is 16 images, 0.02 and 90k."""
    for table, epochs in (("faster_rcnn_R_101_FPN_1x", 1), ("mask_rcnn_R_101_FPN_2x", 2)):
        cfg = load(COCO / f"{table}_everywhere" / "gn+ws_1img.yaml")
        keys = ("IMS_PER_BATCH", "REFERENCE_WORLD_SIZE", "BASE_LR", "MAX_ITER", "STEPS")
        found = [cfg[f"SOLVER.{key}"] for key in keys]
        assert found == [4, 4, 0.005, 360000 * epochs, [240000 * epochs, 320000 * epochs]]


# ---- every file is reached, and trains -----------------------------------------------------------


def _bases(path: Path) -> Iterator[Path]:
    yield path
    named = yaml.safe_load(path.read_text(encoding="utf-8")).get("_BASE_", [])
    for base in [named] if isinstance(named, str) else named:
        yield from _bases((path.parent / base).resolve())


def test_every_config_file_is_reached_by_a_test() -> None:
    reached = {file for path in (*ROWS, *EXAMPLES, *QUICKSTART) for file in _bases(path)}
    every = {
        path for path in CONFIGS.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    lazy = {CONFIGS / "examples" / "mask_rcnn_R_50_FPN_1x_cbn.py"}  # tests/test_lazy_config.py
    assert every == reached | lazy


# The network of the file at a quarter of its width (GN and GKN want channels in 32s), and few RoIs
SMALL = """
    MODEL.DEVICE cpu  MODEL.FPN.OUT_CHANNELS 32
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 64  MODEL.RPN.POST_NMS_TOPK_TRAIN 32
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 16  MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
    MODEL.ROI_BOX_HEAD.CONV_DIM 32  MODEL.ROI_BOX_HEAD.FC_DIM 32  MODEL.ROI_MASK_HEAD.CONV_DIM 32
    INPUT.MIN_SIZE_TRAIN (96,)  INPUT.MAX_SIZE_TRAIN 128  DATALOADER.NUM_WORKERS 0
    TEST.PRECISE_BN.NUM_ITER 1  SEED 1  DATASETS.TEST ()
""".split()
SMALL_RESNET_50 = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 32  MODEL.RESNETS.WIDTH_PER_GROUP 32
    MODEL.RESNETS.RES2_OUT_CHANNELS 64
""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Options and overrides for training on real images: those of COCO, or digits without them."""
    if SUBSET.is_dir():
        name, files, classes = "coco2017_subset", (SUBSET / "train.json", SUBSET / "images"), 80
    else:
        from cbn_det.data import digits_paths, write_digits

        folder = tmp_path_factory.mktemp("digits")
        write_digits(folder, train_images=8, val_images=2)
        name, files, classes = "a_few_digits", digits_paths(folder)["digits_train"], 10
    words = ["DATASETS.TRAIN", f"('{name}',)"]
    for key in ("ROI_HEADS", "RETINANET"):
        words += [f"MODEL.{key}.NUM_CLASSES", str(classes)]
    if classes == 10:
        words += ["INPUT.MASK_FORMAT", "bitmask"]
    return ["--coco-dataset", name, *map(str, files)], words


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # a checkpoint each, of a hundred


LAYERS = {"BN": "BatchNorm2d", "SyncBN": "SyncBatchNorm", "GN": "GroupNorm"}


@pytest.mark.parametrize("path", [*ROWS, *EXAMPLES, *QUICKSTART], ids=short)
def test_it_trains_two_steps(
    path: Path, data: tuple[list[str], list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.registry import unused_norms
    from cbn_det.plugin.trainer import Trainer
    from cbn_det.run.arguments import argument_parser

    monkeypatch.chdir(REPOSITORY)
    options, overrides = data
    overrides = [*overrides, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder), *SMALL]
    if load(path)["MODEL.RESNETS.DEPTH"] > 18:
        overrides += SMALL_RESNET_50
    words = ["--config-file", str(path), *options, *overrides]
    args = argument_parser().parse_args(words)
    os.makedirs(folder)
    cfg, _ = build_config(args, 1)
    with run_loggers_removed():
        prepare_datasets(cfg, args.coco_dataset)
        trainer = Trainer(cfg)
        trainer.max_iter = 2  # of the file's own schedule
        trainer.train()
        found = trainer.storage.latest()
    assert math.isfinite(found["total_loss"][0]) and found["total_loss"][1] == 1
    model = trainer.bare_model
    assert not unused_norms(cfg, model)
    for layer in model.modules():
        if isinstance(getattr(layer, "burn_in", None), float):
            assert layer.burn_in_steps == round(layer.burn_in * cfg.SOLVER.MAX_ITER)
    if path in ROWS:
        check_layers(path, model)


def check_layers(row: Path, model: Any) -> None:
    """The convolutions that the papers put a norm behind, and what stands there."""
    heads = [getattr(model.roi_heads.box_head, f"conv{index}") for index in (1, 2, 3, 4)]
    heads += [
        getattr(model.backbone, f"fpn_{kind}{n}")
        for kind in ("lateral", "output")
        for n in (2, 3, 4, 5)
    ]
    if row.parent.name.startswith("mask"):
        heads += [getattr(model.roi_heads.mask_head, f"mask_fcn{index}") for index in (1, 2, 3, 4)]
    name = norm_of(row).partition("(")[0]
    layer = LAYERS.get(name, f"{name.replace('+', '')}2d") if name else "NoneType"
    assert {type(conv.norm).__name__ for conv in heads} == {layer}
    backbone = model.backbone.bottom_up
    expected = layer if TABLES[row.parent.name][2] is None else "FrozenBatchNorm2d"
    assert type(backbone.res5[2].conv3.norm).__name__ == expected
    group_norm = name in ("GN", "GKN", "GN+WS") and expected == layer
    frozen = expected if group_norm or "scratch" in row.parent.name else "FrozenBatchNorm2d"
    assert type(backbone.stem.conv1.norm).__name__ == frozen
    trained = any(parameter.requires_grad for parameter in backbone.stem.parameters())
    assert trained == ("scratch" in row.parent.name)
