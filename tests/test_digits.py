"""The built-in digits set: deterministic, COCO-valid, written once."""

from __future__ import annotations

import builtins
import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

from cbn_det.data import DataError, digits, digits_paths, write_digits

SMALL = {"train_images": 30, "val_images": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("datasets"), **SMALL)


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_layout_and_counts(folder):
    for split, n in (("train", 30), ("val", 12)):
        coco = COCO(folder / "annotations" / f"{split}.json")
        assert len(coco.imgs) == n
        assert sorted(p.name for p in (folder / split).iterdir()) == sorted(
            record["file_name"] for record in coco.imgs.values()
        )
        assert [c["name"] for c in coco.cats.values()] == list("0123456789")
        for image_id, record in coco.imgs.items():
            pixels = np.asarray(Image.open(folder / split / record["file_name"]))
            assert pixels.shape == (160, 160, 3)
            assert 2 <= len(coco.getAnnIds(image_id)) <= 6


def test_box_and_area_are_those_of_the_mask_and_masks_are_disjoint(folder):
    coco = COCO(folder / "annotations" / "train.json")
    for image_id in coco.imgs:
        covered = np.zeros((160, 160), dtype=int)
        for ann in coco.imgToAnns[image_id]:
            mask = mask_util.decode(ann["segmentation"])
            ys, xs = np.nonzero(mask)
            x, y, w, h = ann["bbox"]
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert ann["area"] == mask.sum() >= digits.MIN_VISIBLE_PIXELS
            assert ann["iscrowd"] == 0
            covered += mask
        assert covered.max() <= 1


def test_mask_pixels_show_a_digit(folder):
    # Inside a mask is one colour plus noise; just around it is the background.
    coco = COCO(folder / "annotations" / "train.json")
    contrasts = []
    for ann in coco.anns.values():
        record = coco.imgs[ann["image_id"]]
        pixels = np.asarray(Image.open(folder / "train" / record["file_name"])).astype(float)
        mask = mask_util.decode(ann["segmentation"])
        near, far = (Image.fromarray(mask).filter(ImageFilter.MaxFilter(n)) for n in (7, 15))
        ring = np.asarray(far) - np.asarray(near)
        contrasts.append(np.abs(pixels[mask == 1].mean(0) - pixels[ring == 1].mean(0)).mean())
    assert np.median(contrasts) > 30


def test_same_bytes_each_time_and_images_do_not_depend_on_the_count(folder, tmp_path):
    again = write_digits(tmp_path / "a", **SMALL)
    assert file_hashes(again) == file_hashes(folder)
    fewer = write_digits(tmp_path / "b", train_images=5, val_images=2)
    for image in (fewer / "train").iterdir():
        assert image.read_bytes() == (folder / "train" / image.name).read_bytes()


def test_images_differ(folder):
    images = [h for name, h in file_hashes(folder).items() if name.endswith(".png")]
    assert len(set(images)) == 42


def test_no_digit_is_in_both_splits():
    parts = digits._load_digits()
    assert len(parts["train"][0]) + len(parts["val"][0]) == 1797
    for _, labels in parts.values():
        assert set(labels) == set(range(10))
        share = np.bincount(labels) / len(labels)
        assert 0.09 < share.min() and share.max() < 0.11
    train = {image.tobytes() for image in parts["train"][0]}
    assert train.isdisjoint(image.tobytes() for image in parts["val"][0])


def test_covered_digits_keep_most_of_their_pixels():
    images, labels = digits._load_digits()["train"]
    drawn = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        placed = []
        original = digits._place

        def remember(rng, digit, placed=placed, original=original):
            placed.append(original(rng, digit) >= 0.5)
            return placed[-1].astype(np.float32)

        digits._place = remember
        try:
            _, instances = digits._compose(rng, images, labels)
        finally:
            digits._place = original
        for _, mask in instances:
            whole = [p for p in placed if not (mask & ~p).any()]
            assert max(mask.sum() / p.sum() for p in whole) >= digits.MIN_VISIBLE_FRACTION
            drawn += 1
    assert drawn > 120


def test_written_once(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert write_digits(folder.parent, **SMALL) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_rewritten_when_the_generator_changes(tmp_path, monkeypatch):
    folder = write_digits(tmp_path, train_images=2, val_images=1)
    monkeypatch.setattr(digits, "GENERATOR_VERSION", digits.GENERATOR_VERSION + 1)
    write_digits(tmp_path, train_images=2, val_images=1)
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["version"] == digits.GENERATOR_VERSION
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "digits.lock"]


def test_rewritten_when_an_image_is_gone(tmp_path):
    folder = write_digits(tmp_path, train_images=2, val_images=1)
    before = file_hashes(folder)
    (folder / "train" / "000001.png").unlink()
    write_digits(tmp_path, train_images=2, val_images=1)
    assert file_hashes(folder) == before


def test_broken_off_writing_leaves_nothing_under_the_name_and_is_redone(tmp_path, monkeypatch):
    calls = []
    original = digits._compose

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(digits, "_compose", killed)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path, train_images=4, val_images=1)
    assert not (tmp_path / "digits").exists()
    monkeypatch.setattr(digits, "_compose", original)
    folder = write_digits(tmp_path, train_images=4, val_images=1)
    assert file_hashes(folder) == file_hashes(
        write_digits(tmp_path / "clean", train_images=4, val_images=1)
    )
    assert not list(tmp_path.glob(".digits*"))


def _write(root: Path) -> None:
    write_digits(root, train_images=20, val_images=5)


def test_processes_that_start_at_once_do_no_harm(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path / "race",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    _write(tmp_path / "alone")
    assert file_hashes(tmp_path / "race" / "digits") == file_hashes(tmp_path / "alone" / "digits")


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not the digits set of cbn_det.*DETECTRON2_DATASETS"):
        write_digits(tmp_path, train_images=1, val_images=1)
    assert (tmp_path / "digits" / "mine.txt").read_text() == "keep"


def test_without_scikit_learn_the_error_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(DataError, match=r'pip install "cbn-det\[standalone\]"'):
        write_digits(tmp_path, train_images=1, val_images=1)
    assert not (tmp_path / "digits").exists()


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file.*DETECTRON2_DATASETS"):
        write_digits(tmp_path / "file", train_images=1, val_images=1)


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert digits_paths()["digits_val"] == (
        tmp_path / "digits" / "annotations" / "val.json",
        tmp_path / "digits" / "val",
    )
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert digits_paths()["digits_train"][1] == Path("datasets/digits/train")


@pytest.mark.parametrize(("n", "size"), [(8, 24), (8, 33), (8, 56), (3, 160), (15, 160)])
def test_digits_are_enlarged_cubically(n: int, size: int) -> None:
    """Oracle: torch's bicubic interpolation."""
    values = np.random.default_rng(n).random((n, n, 3), dtype=np.float32)
    batch = torch.from_numpy(values).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(batch, (size, size), mode="bicubic")
    np.testing.assert_allclose(
        digits._enlarge(values, size), expected[0].permute(1, 2, 0).numpy(), atol=2e-6
    )
    np.testing.assert_array_equal(
        digits._enlarge(values[:, :, 0], size), digits._enlarge(values, size)[:, :, 0]
    )
