"""The standalone engine's data: checks before a run, images with targets, batches."""

from __future__ import annotations

import json
import random
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from tiny_set import Files

from cbn_det.data import DIGITS_NAMES, CocoReport, DataError, digits_paths, write_digits
from cbn_det.data.coco_api import mask_of
from cbn_det.standalone import datasets
from cbn_det.standalone.config import get_cfg
from cbn_det.standalone.datasets import DetectionDataset, prepare_datasets
from cbn_det.standalone.loading import batches, in_order

NUM_IMAGES = 10
# category ids with gaps, not in order
CATEGORIES = {7: "dog", 3: "cat", 90: "cow"}


def config(*overrides) -> CfgNode:
    cfg = get_cfg()
    cfg.SEED = 1
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CATEGORIES)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.merge_from_list(list(overrides))
    return cfg


def rle(mask: np.ndarray) -> dict:
    encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def write_set(folder: Path, num_images: int = NUM_IMAGES, categories=CATEGORIES) -> Files:
    """Dark images of 64 x 48 and more, each with one white rectangle, which is annotated."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    images, annotations = [], []
    for i in range(1, num_images + 1):
        width, height = 64 + 2 * i, 48
        x, y, w, h = (int(rng.integers(*r)) for r in ((0, 20), (0, 12), (14, 40), (12, 30)))
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 100 * i, "file_name": f"{i}.png", "height": height, "width": width})
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(
            {
                "id": i,
                "image_id": 100 * i,
                "category_id": sorted(categories)[i % len(categories)],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": polygon if i % 2 else rle(pixels[:, :, 0] > 0),
            }
        )
    data = {
        "images": images[::-1],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in categories.items()],
    }
    (folder / "set.json").write_text(json.dumps(data))
    return Files(folder / "set.json", folder)


def files_of(report: CocoReport) -> Files:
    return Files(report.annotations, report.images)


def edit(files: Files, change) -> None:
    data = json.loads(files.annotations.read_text())
    change(data)
    files.annotations.write_text(json.dumps(data))


def triple(files: Files, name: str = "mine") -> tuple[str, str, str]:
    return name, str(files.annotations), str(files.images)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_set(tmp_path / "set")


@pytest.fixture
def small_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(
        datasets, "write_digits", lambda: write_digits(train_images=3, val_images=2)
    )


def test_digits_are_written_where_they_are_used(small_digits, files, tmp_path):
    assert list(prepare_datasets(config(), [triple(files)], eval_only=False)) == ["mine"]
    assert not (tmp_path / "digits").exists()
    cfg = config("DATASETS.TRAIN", (DIGITS_NAMES[0],), "DATASETS.TEST", (DIGITS_NAMES[1],))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    found = prepare_datasets(cfg, [], eval_only=False)
    absolute = {name: tuple(map(Path.absolute, digits_paths()[name])) for name in DIGITS_NAMES}
    assert {name: files_of(report) for name, report in found.items()} == absolute
    assert list(prepare_datasets(cfg, [], eval_only=True)) == ["digits_val"]
    assert len(DetectionDataset(*files_of(found["digits_train"]), cfg, training=True)) == 3


def test_files_are_found_by_name(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = prepare_datasets(config(), [("mine", "set/set.json", "set")], eval_only=False)
    assert files_of(found["mine"]) == files


def test_unknown_names(files):
    cfg = config("DATASETS.TRAIN", ("coco_2017_train",))
    with pytest.raises(DataError) as error:
        prepare_datasets(cfg, [triple(files)], eval_only=False)
    for part in ("'coco_2017_train'", "--coco-dataset coco_2017_train", "digits_val, mine"):
        assert part in str(error.value)
    assert list(prepare_datasets(cfg, [triple(files)], eval_only=True)) == ["mine"]
    with pytest.raises(DataError, match="DATASETS.TRAIN is empty"):
        prepare_datasets(config("DATASETS.TRAIN", ()), [triple(files)], eval_only=False)


def test_a_name_stands_for_one_set(files, tmp_path):
    prepare_datasets(config(), [triple(files), triple(files)], eval_only=False)
    for name in ("mine", "digits_val"):
        given = [triple(files, name), (name, "other.json", str(tmp_path))]
        with pytest.raises(DataError, match=f"'{name}' is known already.*choose another name"):
            prepare_datasets(config(), given, eval_only=False)


def test_the_config_must_fit_the_data(files, tmp_path):
    with pytest.raises(DataError, match="`MODEL.ROI_HEADS.NUM_CLASSES 3`"):
        cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", 4)
        prepare_datasets(cfg, [triple(files)], eval_only=False)
    other = write_set(tmp_path / "other", categories={3: "cat", 7: "cow", 90: "dog"})
    given = [triple(files), triple(other, "other")]
    cfg = config("DATASETS.TEST", ("other",))
    with pytest.raises(DataError, match="class 1 is 'dog' in one and 'cow' in the other"):
        prepare_datasets(cfg, given, eval_only=False)
    prepare_datasets(cfg, given, eval_only=True)
    cfg = config("MODEL.MASK_ON", True)
    with pytest.raises(DataError, match="'mine'.*`INPUT.MASK_FORMAT bitmask`"):
        prepare_datasets(cfg, [triple(files)], eval_only=False)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    prepare_datasets(cfg, [triple(files)], eval_only=False)
    edit(files, lambda data: data["annotations"][4].pop("segmentation"))
    with pytest.raises(DataError, match="without 'segmentation'.*MODEL.MASK_ON.*5"):
        prepare_datasets(cfg, [triple(files)], eval_only=False)


def test_masks_of_crowd_regions_are_needed_where_masks_are_evaluated(files):
    def crowd(data: dict) -> None:
        data["annotations"][4] |= {"iscrowd": 1, "segmentation": []}

    edit(files, crowd)
    cfg = config("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")
    with pytest.raises(DataError, match="without 'segmentation'"):
        prepare_datasets(cfg, [triple(files)], eval_only=False)
    cfg.DATASETS.TEST = ()
    prepare_datasets(cfg, [triple(files)], eval_only=False)


def test_a_set_without_objects_is_neither_trained_on_nor_evaluated(files):
    edit(files, lambda data: data["annotations"].clear())
    with pytest.raises(DataError, match="nothing to train on"):
        prepare_datasets(config(), [triple(files)], eval_only=False)
    with pytest.raises(DataError, match="nothing counts in its evaluation"):
        prepare_datasets(config(), [triple(files)], eval_only=True)
    # without the list, as COCO's own test sets are, its images are predicted and not scored
    edit(files, lambda data: data.pop("annotations"))
    assert list(prepare_datasets(config(), [triple(files)], eval_only=True)) == ["mine"]


def test_evaluation_gets_the_stored_image(files):
    dataset = DetectionDataset(*files, config(), training=False)
    assert dataset.image_ids == [100 * i for i in range(1, NUM_IMAGES + 1)]
    assert dataset.class_names == ["cat", "dog", "cow"] and dataset.category_ids == [3, 7, 90]
    image, target = dataset[2]
    assert target == {"image_id": 300}
    assert image.dtype == torch.float32
    expected = np.asarray(Image.open(files.images / "3.png")).transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)


def white_box(image: torch.Tensor) -> torch.Tensor:
    """Corners of the white rectangle, in pixels."""
    inside = image[0] > 127
    ys, xs = inside.any(1).nonzero(), inside.any(0).nonzero()
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_image_boxes_and_masks_are_augmented_alike(files, flip):
    cfg = config("MODEL.MASK_ON", True, "INPUT.RANDOM_FLIP", flip)
    cfg.INPUT.MIN_SIZE_TRAIN = (60, 72)
    plain = DetectionDataset(*files, config(), training=False)
    dataset = DetectionDataset(*files, cfg, training=True)
    sizes, mirrored = set(), set()
    for index in list(range(NUM_IMAGES)) * 3:
        image, target = dataset[index]
        assert {k: (type(v), v.dtype) for k, v in target.items()} == {
            "boxes": (torch.Tensor, torch.float32),
            "labels": (torch.Tensor, torch.int64),
            "masks": (torch.Tensor, torch.uint8),
        }
        assert type(image) is torch.Tensor and image.dtype == torch.float32
        assert target["masks"].shape == (1, *image.shape[1:])
        assert (target["boxes"][0] - white_box(image)).abs().max() <= 1
        assert (target["masks"][0] != (image[0] > 127)).float().mean() < 0.02
        assert target["labels"].tolist() == [(index + 1) % 3 + 1]
        sizes.add(min(image.shape[1:]))
        stored = white_box(plain[index][0]) * image.shape[1] / 48
        mirrored.add(bool((target["boxes"][0] - stored).abs().max() > 3))
    assert sizes == {60, 72}
    assert mirrored == ({False} if flip == "none" else {False, True})


def test_what_is_left_out_of_training(files):
    def change(data: dict) -> None:
        crowd, flat, outside, *_ = data["annotations"]
        crowd["iscrowd"] = 1  # the only annotation of image 100
        flat["bbox"] = [5, 5, 10, 0]
        outside["bbox"] = [-4, -6, 30, 100]

    edit(files, change)
    cfg = config("INPUT.RANDOM_FLIP", "none", "MODEL.MASK_ON", True)
    dataset = DetectionDataset(*files, cfg, training=True)
    assert dataset.image_ids == [100 * i for i in range(2, NUM_IMAGES + 1)]
    image, target = dataset[0]
    assert {k: tuple(v.shape) for k, v in target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, *image.shape[1:]),
    }
    assert dataset[1][1]["boxes"].tolist() == [[0, 0, 26, 48]]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    dataset = DetectionDataset(*files, cfg, training=True)
    assert len(dataset) == NUM_IMAGES and dataset[0][1]["masks"].shape == (0, 48, 66)


def test_the_longer_side_is_limited(files):
    dataset = DetectionDataset(*files, config("INPUT.MAX_SIZE_TRAIN", 70), training=True)
    assert all(max(dataset[i][0].shape) == 70 for i in range(2, NUM_IMAGES))


def test_unusable_polygons_beside_a_usable_one(files):
    def change(data: dict) -> None:
        segmentation = data["annotations"][0]["segmentation"]
        segmentation.insert(0, [0, 0, 60, 40])  # pycocotools would take four numbers for a box

    dataset = DetectionDataset(*files, config("MODEL.MASK_ON", True), training=True)
    before = mask_of(dataset.coco, dataset.coco.anns[1])
    edit(files, change)
    dataset = DetectionDataset(*files, config("MODEL.MASK_ON", True), training=True)
    assert np.array_equal(mask_of(dataset.coco, dataset.coco.anns[1]), before)


COLORS = {"L": (90, 90, 90), "P": (255, 0, 51), "CMYK": (55, 200, 250), "RGBA": (1, 2, 3)}


@pytest.mark.parametrize("mode", COLORS)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_images_of_other_modes_and_channel_order(files, mode, order):
    image = Image.new("RGB", (66, 48), COLORS[mode]).convert(mode)
    image.save(files.images / "1.png", format="TIFF" if mode == "CMYK" else "PNG")
    pixel = DetectionDataset(*files, config("INPUT.FORMAT", order), training=False)[0][0][:, 5, 9]
    expected = COLORS[mode] if order == "RGB" else COLORS[mode][::-1]
    assert np.abs(pixel.numpy() - expected).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tif"])  # Pillow turns a TIFF itself
def test_exif_rotation_is_applied(files, suffix):
    upright = np.zeros((48, 66, 3), dtype=np.uint8)
    upright[:10] = 200
    exif = Image.Exif()
    exif[274] = 6  # stored turned: a viewer turns it a quarter clockwise
    name = f"1.{suffix}"
    Image.fromarray(np.rot90(upright).copy()).save(files.images / name, exif=exif)
    edit(files, lambda data: data["images"][-1].update(file_name=name))
    prepare_datasets(config(), [triple(files)])
    image, _ = DetectionDataset(*files, config(), training=False)[0]
    assert np.array_equal(image.numpy(), upright.transpose(2, 0, 1))


def test_an_image_whose_values_would_be_cut_off_is_named(files):
    """The check before a run decodes a sample of a large set."""
    Image.fromarray(np.full((48, 72), 3000, dtype=np.uint16)).save(files.images / "4.png")
    with pytest.raises(DataError, match="image 400 .4.png.: .*mode I"):
        prepare_datasets(config(), [triple(files)])
    for training in (True, False):
        dataset = DetectionDataset(*files, config(), training)
        with pytest.raises(
            DataError, match=r"set.json: image 400 '.*4.png' cannot be read \(.*mode I"
        ):
            dataset[3]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named(files, workers):
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    path = files.images / "4.png"
    complete = path.read_bytes()
    cases = {
        "cannot be read .*No such file": path.unlink,
        "cannot be read": lambda: path.write_bytes(complete[:50]),
        "is 9 x 9, listed as 72 x 48": Image.new("RGB", (9, 9)).save,
    }
    for problem, damage in cases.items():
        damage(path) if problem.startswith("is 9") else damage()
        for training in (True, False):
            dataset = DetectionDataset(*files, cfg, training)
            read = islice(batches(dataset, cfg), 4) if training else in_order(dataset, cfg)
            with pytest.raises(DataError, match=rf"set.json: image 400 '.*4.png' {problem}"):
                list(read)


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(image_a, image_b)
        and target_a.keys() == target_b.keys()
        and all(torch.equal(target_a[k], target_b[k]) for k in target_a)
        for batch_a, batch_b in zip(a, b, strict=True)
        for (image_a, target_a), (image_b, target_b) in zip(batch_a, batch_b, strict=True)
    )


def test_a_batch_depends_on_the_seed_and_the_iteration_alone(files):
    cfg = config("INPUT.MIN_SIZE_TRAIN", (30, 40, 50), "MODEL.MASK_ON", True)
    dataset = DetectionDataset(*files, cfg, training=True)

    def some(start: int, count: int) -> list:
        return list(islice(batches(dataset, cfg, start), count))

    whole = some(0, 12)
    assert [len(batch) for batch in whole] == [3] * 12
    torch.manual_seed(99)
    assert equal(some(0, 12), whole)
    assert equal(some(7, 5), whole[7:])
    assert not equal(some(6, 5), whole[7:])
    cfg.DATALOADER.NUM_WORKERS = 2
    assert equal(some(0, 12), whole)
    assert equal(some(7, 5), whole[7:])
    cfg.SEED = 2
    assert not equal(some(0, 12), whole)


def test_each_epoch_has_each_image_once_in_an_order_of_its_own(files):
    cfg = config("INPUT.RANDOM_FLIP", "none", "SOLVER.IMS_PER_BATCH", 4)
    dataset = DetectionDataset(*files, cfg, training=True)
    widths = [im.shape[2] for batch in islice(batches(dataset, cfg), 5) for im, _ in batch]
    first, second = widths[:NUM_IMAGES], widths[NUM_IMAGES:]
    assert sorted(first) == sorted(second) == [64 + 2 * i for i in range(1, NUM_IMAGES + 1)]
    assert first != second and first != sorted(first)
    cfg.SEED = 2
    other = [im.shape[2] for batch in islice(batches(dataset, cfg), 3) for im, _ in batch]
    assert other[:NUM_IMAGES] != first


def test_the_same_image_is_augmented_differently_from_epoch_to_epoch(tmp_path):
    cfg = config("SOLVER.IMS_PER_BATCH", 1)
    dataset = DetectionDataset(*write_set(tmp_path / "one", 1), cfg, training=True)
    corners = [batch[0][1]["boxes"][0, 0].item() for batch in islice(batches(dataset, cfg), 20)]
    assert len(set(corners)) == 2  # as stored and mirrored


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_numbers_alone(files, workers):
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    for training in (True, False):
        dataset = DetectionDataset(*files, cfg, training)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        list(islice(batches(dataset, cfg), 3) if training else in_order(dataset, cfg))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]


class HandlesInterrupts(torch.utils.data.Dataset):
    """Tells whether Ctrl-C would end the process that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_an_interrupt_is_left_to_the_main_process():
    assert list(in_order(HandlesInterrupts(), config("DATALOADER.NUM_WORKERS", 1))) == [False]
    assert list(in_order(HandlesInterrupts(), config())) == [True]


def test_several_training_sets_are_mixed(files, tmp_path):
    other = write_set(tmp_path / "other", 2)
    cfg = config("SOLVER.IMS_PER_BATCH", NUM_IMAGES + 2)
    sets = [DetectionDataset(*f, cfg, training=True) for f in (files, other)]
    batch = next(batches(torch.utils.data.ConcatDataset(sets), cfg))
    widths = sorted(image.shape[2] for image, _ in batch)
    assert widths == sorted([66, 68] + [64 + 2 * i for i in range(1, NUM_IMAGES + 1)])


def test_a_detector_of_torchvisions_trains_on_the_batches(files):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    def without_area(data: dict) -> None:
        data["annotations"][3]["bbox"] = [5, 5, 0, 0]

    edit(files, without_area)
    cfg = config("MODEL.MASK_ON", True, "SOLVER.IMS_PER_BATCH", NUM_IMAGES)
    dataset = DetectionDataset(*files, cfg, training=True)
    images, targets = zip(*next(batches(dataset, cfg)), strict=True)
    assert sorted(len(target["labels"]) for target in targets) == [0] + [1] * (NUM_IMAGES - 1)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = MaskRCNN(backbone, 4, min_size=48, max_size=96)
    assert all(torch.isfinite(loss) for loss in model(images, targets).values())


@pytest.mark.detectron2
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_targets_are_those_of_detectron2(shared_data, mask_format):
    from detectron2.config import get_cfg as get_detectron2_cfg
    from detectron2.data import DatasetMapper
    from detectron2.data.build import filter_images_with_only_crowd_annotations
    from detectron2.data.datasets import load_coco_json

    folder = shared_data / "coco2017_subset"
    cfg = config("MODEL.MASK_ON", True, "INPUT.RANDOM_FLIP", "none")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.FORMAT = (400,), "BGR"
    theirs = get_detectron2_cfg()
    theirs.MODEL.MASK_ON = True
    theirs.INPUT.RANDOM_FLIP, theirs.INPUT.MASK_FORMAT = "none", mask_format
    theirs.INPUT.MIN_SIZE_TRAIN = (400,)
    mapper = DatasetMapper(theirs, is_train=True)
    files = Files(folder / "train.json", folder / "images")
    dataset = DetectionDataset(*files, cfg, training=True)
    records = filter_images_with_only_crowd_annotations(
        load_coco_json(str(files.annotations), str(files.images), "standalone_parity")
    )
    assert [record["image_id"] for record in records] == dataset.image_ids
    for index, record in enumerate(records):
        image, target = dataset[index]
        expected = mapper(record)
        instances = expected["instances"]
        assert target["labels"].tolist() == (instances.gt_classes + 1).tolist()
        # torchvision rounds the new size down, detectron2 to the nearest pixel
        difference = np.subtract(image.shape, expected["image"].shape)
        assert np.abs(difference).max() <= 1
        assert (target["boxes"] - instances.gt_boxes.tensor).abs().max() < 1.01
        if not difference.any():
            assert (image - expected["image"]).abs().mean() < 1
        if mask_format == "bitmask":
            areas = instances.gt_masks.tensor.flatten(1).sum(1)
            differences = (target["masks"].flatten(1).sum(1) - areas).abs()
            assert (differences <= 0.1 * areas + 30).all()
