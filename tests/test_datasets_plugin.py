"""Data sets through detectron2: registration, checks against the config, loader and evaluator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cbn_det.data import DataError, digits, digits_paths, write_digits

pytestmark = pytest.mark.detectron2

TRAIN_IMAGES, VAL_IMAGES = 12, 40


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_digits(root, train_images=TRAIN_IMAGES, val_images=VAL_IMAGES)
    return root


@pytest.fixture
def catalog():
    """Forgets, after the test, what it registered and what was found out about built-in sets."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    data, meta = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield DatasetCatalog
    DatasetCatalog.data, MetadataCatalog.data = data, meta


@pytest.fixture
def small_digits(digits_root, monkeypatch, catalog):
    """``digits_train`` and ``digits_val`` stand for a small set that is already written."""
    from cbn_det.plugin import datasets

    monkeypatch.setenv("DETECTRON2_DATASETS", str(digits_root))
    monkeypatch.setattr(
        datasets,
        "write_digits",
        lambda: write_digits(train_images=TRAIN_IMAGES, val_images=VAL_IMAGES),
    )


def config(*overrides):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TRAIN = ("digits_train",)
    cfg.DATASETS.TEST = ("digits_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.merge_from_list(list(overrides))
    return cfg


def write_tiny(root: Path, class_names: list[str]) -> tuple[str, str]:
    """One image with one object of the first class."""
    from PIL import Image

    (root / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(root / "images" / "1.png")
    data = {
        "images": [{"id": 1, "file_name": "1.png", "height": 32, "width": 32}],
        "categories": [{"id": 3 * i + 2, "name": n} for i, n in enumerate(class_names)],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 2,
                "bbox": [4, 4, 9, 9],
                "area": 81,
                "iscrowd": 0,
            }
        ],
    }
    (root / "set.json").write_text(json.dumps(data))
    return str(root / "set.json"), str(root / "images")


def test_register_twice_and_otherwise(catalog, tmp_path):
    from cbn_det.plugin.datasets import register_coco

    paths = write_tiny(tmp_path, ["a"])
    register_coco("tiny", *paths)
    register_coco("tiny", *map(Path, paths))
    assert catalog.get("tiny")[0]["annotations"][0]["category_id"] == 0
    with pytest.raises(DataError, match="'tiny' is already registered.*choose another name"):
        register_coco("tiny", paths[0], str(tmp_path))
    with pytest.raises(DataError, match="'voc_2007_train' is already registered"):
        register_coco("voc_2007_train", *paths)


def test_digits_are_prepared_from_their_names(small_digits):
    from cbn_det.plugin.datasets import prepare_datasets

    reports = prepare_datasets(config())
    assert reports["digits_train"].num_images == TRAIN_IMAGES
    assert reports["digits_val"].num_images == VAL_IMAGES
    prepare_datasets(config())  # a second run in the same process


def test_ensure_digits_writes(tmp_path, monkeypatch, catalog):
    from cbn_det.plugin import datasets

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(
        datasets, "write_digits", lambda: write_digits(train_images=2, val_images=1)
    )
    datasets.ensure_digits()
    assert len(catalog.get("digits_train")) == 2
    assert len(catalog.get("digits_val")) == 1


def test_unknown_name(catalog):
    from cbn_det.plugin.datasets import prepare_datasets

    with pytest.raises(DataError) as error:
        prepare_datasets(config("DATASETS.TRAIN", "('mine',)"))
    for part in ("'mine'", "--coco-dataset mine", "digits_train", "coco_2017_val"):
        assert part in str(error.value)


def test_coco_datasets_of_the_command_line(catalog, tmp_path):
    from cbn_det.plugin.datasets import prepare_datasets

    cfg = config("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)")
    given = [("mine", *write_tiny(tmp_path, ["a", "b"]))]
    with pytest.raises(DataError) as error:
        prepare_datasets(cfg, given)
    for part in (
        "MODEL.ROI_HEADS.NUM_CLASSES is 10",
        "'mine' has 2",
        "`MODEL.ROI_HEADS.NUM_CLASSES 2`",
    ):
        assert part in str(error.value)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    assert prepare_datasets(cfg, given)["mine"].class_names == ["a", "b"]


@pytest.mark.parametrize("meta_architecture", ["RetinaNet", "GeneralizedRCNN", "PanopticFPN"])
def test_num_classes_of_the_architecture_in_use(catalog, tmp_path, meta_architecture):
    from cbn_det.plugin.datasets import check_num_classes, register_coco

    register_coco("mine", *write_tiny(tmp_path, ["a", "b"]))
    cfg = config("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    node = cfg.MODEL.RETINANET if meta_architecture == "RetinaNet" else cfg.MODEL.ROI_HEADS
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    node.NUM_CLASSES = 2
    check_num_classes(cfg)
    node.NUM_CLASSES = 3
    with pytest.raises(DataError, match=r"MODEL\.\w+\.NUM_CLASSES is 3, .*'mine' has 2 classes"):
        check_num_classes(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    check_num_classes(cfg)


def test_train_and_test_must_have_the_same_classes(catalog, tmp_path):
    from cbn_det.plugin.datasets import prepare_datasets

    given = [
        ("one", *write_tiny(tmp_path / "1", ["cat", "dog"])),
        ("two", *write_tiny(tmp_path / "2", ["cat", "cow"])),
    ]
    cfg = config("DATASETS.TRAIN", "('one',)", "DATASETS.TEST", "('two',)")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(DataError, match="'one' and 'two'.*class 1 is 'dog' in one and 'cow'"):
        prepare_datasets(cfg, given)
    prepare_datasets(cfg, given, eval_only=True)


def test_evaluation_alone_does_not_need_the_training_set(catalog, tmp_path):
    from cbn_det.plugin.datasets import prepare_datasets

    cfg = config("DATASETS.TRAIN", "('gone',)", "DATASETS.TEST", "('mine',)")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    given = [("mine", *write_tiny(tmp_path, ["a"])), ("gone", "none.json", "none")]
    with pytest.raises(DataError, match="'gone': annotation file '.*none.json' does not exist"):
        prepare_datasets(cfg, given)
    assert list(prepare_datasets(cfg, given, eval_only=True)) == ["mine"]


def test_no_training_set(catalog):
    from cbn_det.plugin.datasets import prepare_datasets

    with pytest.raises(DataError, match="DATASETS.TRAIN is empty"):
        prepare_datasets(config("DATASETS.TRAIN", "()", "DATASETS.TEST", "()"))


def test_missing_files_of_a_built_in_set_name_the_layout(catalog, tmp_path, monkeypatch):
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets.builtin import register_all_coco

    from cbn_det.plugin.datasets import prepare_datasets

    # detectron2 reads the variable at import: register its sets again as if it were set then.
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    catalog.data, MetadataCatalog.data = {}, {}
    register_all_coco(str(tmp_path))
    with pytest.raises(DataError) as error:
        prepare_datasets(config("DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "()"))
    for part in ("DETECTRON2_DATASETS", "coco/annotations/instances_train2017.json", "train2017"):
        assert part in str(error.value)


def test_rle_masks_need_the_bitmask_format(small_digits):
    from cbn_det.plugin.datasets import prepare_datasets

    with pytest.raises(DataError, match="`INPUT.MASK_FORMAT bitmask`"):
        prepare_datasets(config("MODEL.MASK_ON", True))
    prepare_datasets(config("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"))
    prepare_datasets(config("MODEL.MASK_ON", True), eval_only=True)


def test_masks_missing(catalog, tmp_path):
    from cbn_det.plugin.datasets import prepare_datasets

    cfg = config("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "MODEL.MASK_ON", True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    with pytest.raises(DataError, match="'mine'.*MODEL.MASK_ON"):
        prepare_datasets(cfg, [("mine", *write_tiny(tmp_path, ["a"]))])


def test_a_broken_image_stops_the_run_before_training(digits_root, tmp_path, catalog):
    from cbn_det.plugin.datasets import prepare_datasets

    shutil.copytree(digits_root / "digits", tmp_path / "digits")
    image = tmp_path / "digits" / "train" / "000003.png"
    image.write_bytes(image.read_bytes()[:2000])
    given = [("copy", *digits_paths(tmp_path)["digits_train"])]
    cfg = config("DATASETS.TRAIN", "('copy',)", "DATASETS.TEST", "()")
    with pytest.raises(DataError, match="'copy'.*cut off.*image 3 '000003.png'"):
        prepare_datasets(cfg, given)


def test_a_tiff_that_detectron2_turns_twice_is_refused(catalog, tmp_path):
    from PIL import Image

    from cbn_det.plugin.datasets import prepare_datasets

    paths = write_tiny(tmp_path, ["a"])
    exif = Image.Exif()
    exif[274] = 3
    # Pillow tells the kind of a file by its content
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "1.png", format="TIFF", exif=exif)
    cfg = config("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    with pytest.raises(DataError, match="'mine'.*TIFF images with an orientation tag"):
        prepare_datasets(cfg, [("mine", *paths)])


def test_a_class_without_a_training_object_is_told(catalog, tmp_path, caplog):
    from cbn_det.plugin.datasets import prepare_datasets

    cfg = config("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    given = [("mine", *write_tiny(tmp_path, ["a", "b"]))]
    with caplog.at_level("WARNING"):
        prepare_datasets(cfg, given)
        assert [r.message for r in caplog.records if "'b' (1 in all)" in r.message]
        caplog.clear()
        prepare_datasets(cfg, given, eval_only=True)
        assert not caplog.records


def ground_truth_as_predictions(name: str, masks: bool) -> dict[str, dict[str, float]]:
    """AP of a detector that answers with the annotations themselves, through detectron2."""
    import pycocotools.mask as mask_util
    import torch
    from detectron2.data import DatasetCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, BoxMode, Instances

    tasks = ("bbox", "segm") if masks else ("bbox",)
    evaluator = COCOEvaluator(name, tasks=tasks, distributed=False, max_dets_per_image=300)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        size = record["height"], record["width"]
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        instances = Instances(size)
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(
            torch.from_numpy(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        )
        instances.scores = torch.ones(len(objects))
        instances.pred_classes = torch.tensor([a["category_id"] for a in objects])
        if masks:
            encoded = []
            for a in objects:
                segm = a["segmentation"]
                if isinstance(segm, list):
                    segm = mask_util.merge(mask_util.frPyObjects(segm, *size))
                encoded.append(mask_util.decode(segm).astype(bool))
            instances.pred_masks = torch.from_numpy(
                np.stack(encoded) if encoded else np.zeros((0, *size), dtype=bool)
            )
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("split", ["train", "val"])
def test_ground_truth_of_digits_scores_100(small_digits, split):
    from cbn_det.plugin.datasets import prepare_datasets

    prepare_datasets(config())
    results = ground_truth_as_predictions(f"digits_{split}", masks=True)
    assert results["bbox"]["AP"] > 99.9
    assert results["segm"]["AP"] > 99.9


def test_ground_truth_of_coco_with_its_quirks_scores_100(shared_data, catalog):
    from cbn_det.plugin.datasets import prepare_datasets

    folder = shared_data / "coco2017_subset"
    cfg = config("DATASETS.TRAIN", "('subset_train',)", "DATASETS.TEST", "('subset_val',)")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.MASK_ON = True
    given = [(f"subset_{s}", folder / f"{s}.json", folder / "images") for s in ("train", "val")]
    prepare_datasets(cfg, given)
    results = ground_truth_as_predictions("subset_val", masks=True)
    assert results["bbox"]["AP"] > 99
    assert results["segm"]["AP"] > 99


def load_batches(cfg, count: int) -> list[dict]:
    from detectron2.data import build_detection_train_loader

    iterator = iter(build_detection_train_loader(cfg))
    return [sample for _ in range(count) for sample in next(iterator)]


def test_training_batches_of_coco_with_its_quirks(shared_data, catalog):
    from cbn_det.plugin.datasets import prepare_datasets

    folder = shared_data / "coco2017_subset"
    cfg = config("DATASETS.TRAIN", "('subset',)", "DATASETS.TEST", "()", "MODEL.MASK_ON", True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    prepare_datasets(cfg, [("subset", folder / "train.json", folder / "images")])
    samples = load_batches(cfg, 20)
    assert len({s["image_id"] for s in samples}) > 30
    for sample in samples:
        instances = sample["instances"]
        assert len(instances) and len(instances.gt_masks) == len(instances)
        assert 0 <= instances.gt_classes.min() and instances.gt_classes.max() < 80
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height


@pytest.mark.parametrize("masks", [False, True])
def test_training_batches_of_digits(small_digits, masks):
    from cbn_det.plugin.datasets import prepare_datasets

    cfg = config("MODEL.MASK_ON", masks, "INPUT.MASK_FORMAT", "bitmask")
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (digits.IMAGE_SIZE,)
    cfg.INPUT.RANDOM_FLIP = "none"
    prepare_datasets(cfg)
    for sample in load_batches(cfg, 5):
        assert sample["image"].shape == (3, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        instances = sample["instances"]
        assert 1 <= len(instances) <= 6
        assert instances.has("gt_masks") == masks
        if masks:
            boxes = instances.gt_masks.get_bounding_boxes().tensor
            assert (boxes - instances.gt_boxes.tensor).abs().max() < 1e-4


def _prepare_in_a_process(rank: int, root: str) -> None:
    """Runs in each of two processes; writes what each call came to into a file of its own."""
    import os

    import torch.distributed as dist
    from detectron2.utils import comm

    from cbn_det.plugin import datasets

    os.environ["DETECTRON2_DATASETS"] = root
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    writers = []

    def write() -> None:
        writers.append(rank)
        write_digits(train_images=3, val_images=2)

    def outcome() -> str:
        try:
            return f"{len(datasets.prepare_datasets(config()))} reports"
        except DataError as e:
            return str(e)

    datasets.write_digits = write
    outcomes = [outcome()]
    if rank == 0:
        Path(root, "digits", "val", "000001.png").write_bytes(b"")
    outcomes.append(outcome())
    Path(root, f"rank{rank}.json").write_text(json.dumps([writers, outcomes]))
    dist.barrier()
    dist.destroy_process_group()


def test_of_two_processes_one_writes_and_both_raise_the_same_error(tmp_path):
    import torch.multiprocessing as mp

    mp.start_processes(_prepare_in_a_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    (writers_0, outcomes_0), (writers_1, outcomes_1) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    assert (writers_0, writers_1) == ([0, 0], [])
    assert (outcomes_0[0], outcomes_1[0]) == ("2 reports", "0 reports")
    assert "image 1 '000001.png'" in outcomes_0[1]
    assert outcomes_1[1] == outcomes_0[1]
