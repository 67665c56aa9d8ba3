"""tools/check_coco.py: what goes wrong with a COCO folder is one line that names the fix."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbn_det.commands.check_coco import coco_2017
from cbn_det.data import image_check
from cbn_det.data.pretrained import check_weights_file, weights_file
from cbn_det.data.sets import check_own_sets, same_files

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTS = {"train2017": 4, "val2017": 2}
FIRST_ID = {"train2017": 100, "val2017": 200}


def check_folder(root: Path) -> list:
    return list(check_own_sets(*coco_2017(root), masks=True))


class TinyCoco:
    """COCO's layout with 4 + 2 images: crowd regions, an image without an object, id gaps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "coco"
        (self.folder / "annotations").mkdir(parents=True)
        for split, number in COUNTS.items():
            (self.folder / split).mkdir()
            self.write(split, self.make(split, number))

    def make(self, split: str, number: int) -> dict:
        first, images, annotations = FIRST_ID[split], [], []
        rng = np.random.default_rng(first)
        for i in range(first, first + number):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image(split, i))
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 48, "width": 64})
        for i in range(first + 1, first + number):  # the first one has no object
            box = {"id": i, "image_id": i, "category_id": 90, "bbox": [10, 10, 20, 20]}
            polygon = {"segmentation": [[10, 10, 30, 10, 30, 30]], "area": 200, "iscrowd": 0}
            annotations.append({**box, **polygon})
        crowd = {"segmentation": {"size": [48, 64], "counts": [0, 48 * 64]}, "iscrowd": 1}
        annotations.append({**annotations[-1], **crowd, "id": first + 50})
        categories = [{"id": i, "name": f"c{i}"} for i in [*range(1, 80), 90]]
        return {"images": images, "annotations": annotations, "categories": categories}

    def image(self, split: str, image_id: int) -> Path:
        return self.folder / split / f"{image_id:012d}.jpg"

    def annotations(self, split: str) -> Path:
        return self.folder / "annotations" / f"instances_{split}.json"

    def read(self, split: str) -> dict:
        return json.loads(self.annotations(split).read_text())

    def write(self, split: str, data: dict) -> None:
        self.annotations(split).write_text(json.dumps(data))

    def problems(self) -> list[str]:
        found = check_folder(self.root)
        return [finding.text for finding in found if finding.level == "problem"]


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> TinyCoco:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return TinyCoco(tmp_path)


def test_a_good_folder(tiny) -> None:
    found = check_folder(tiny.root)
    (note,) = (finding.text for finding in found if finding.level != "ok")
    assert note.startswith("classes without a training object")
    text = "\n".join(finding.text for finding in found)
    assert "train2017.json: 4 images (1 without an object), 4 annotations (1 crowd)" in text
    assert "without an object: 'c1', 'c2', " in text and "(79 in all)" in text
    assert "val2017.json: 2 images (1 without an object), 2 annotations" in text
    assert "4 images decoded" in text and "no image is in both train and test" in text


def test_the_real_subset(shared_data, tmp_path) -> None:
    source, folder = shared_data / "coco2017_subset", tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    counts = {}
    for split, name in (("train2017", "train.json"), ("val2017", "val.json")):
        shutil.copy(source / name, folder / "annotations" / f"instances_{split}.json")
        (folder / split).mkdir()
        images = json.loads((source / name).read_text())["images"]
        counts[split] = len(images)
        for image in images:
            os.symlink(source / "images" / image["file_name"], folder / split / image["file_name"])
    found = check_folder(tmp_path)
    assert not [finding for finding in found if finding.level == "problem"]
    assert counts == {"train2017": 40, "val2017": 32}


@pytest.mark.parametrize("name", ["nothing-here", "empty"])
def test_no_coco_at_all(tmp_path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    found = list(check_folder(tmp_path / name))
    folder = tmp_path / name / "coco"
    problems = [finding.text for finding in found if finding.level == "problem"]
    for text, split in zip(problems, COUNTS, strict=True):
        assert f"'{folder}/annotations/instances_{split}.json' does not exist" in text


def test_a_missing_annotation_file(tiny) -> None:
    tiny.annotations("val2017").unlink()
    (problem,) = tiny.problems()
    assert "instances_val2017.json' does not exist" in problem


def test_a_missing_image_folder(tiny) -> None:
    shutil.rmtree(tiny.folder / "train2017")
    (problem,) = tiny.problems()
    assert f"image folder '{tiny.folder / 'train2017'}' does not exist" in problem


def test_images_one_folder_too_deep(tiny) -> None:
    (tiny.folder / "val2017").rename(tiny.folder / "deeper")
    (tiny.folder / "val2017").mkdir()
    (tiny.folder / "deeper").rename(tiny.folder / "val2017" / "val2017")
    (problem,) = tiny.problems()
    name = tiny.image("val2017", 200).name
    assert f"image 200 '{name}' is 'val2017/{name}'" in problem
    assert "or give the folder it is relative to" in problem


def test_bad_json(tiny) -> None:
    path = tiny.annotations("train2017")
    path.write_text(path.read_text()[:-40])
    (problem,) = tiny.problems()
    assert str(path) in problem and "cut off" in problem


def test_a_missing_image(tiny) -> None:
    tiny.image("train2017", 102).unlink()
    (missing,) = tiny.problems()
    assert "jpg' is" not in missing and "image 102 '000000000102.jpg'" in missing


@pytest.mark.parametrize("sample", [1000, 0])
def test_a_truncated_image_is_found_by_decoding(tiny, sample: int, monkeypatch) -> None:
    monkeypatch.setattr(image_check, "MOST_DECODED", sample)
    path = tiny.image("val2017", 201)
    path.write_bytes(path.read_bytes()[:-300])
    problems = tiny.problems()
    assert len(problems) == (1 if sample else 0)
    assert not problems or "cannot be read as RGB of 8 bits: copy them again" in problems[0]


@pytest.mark.parametrize("what", ["annotations", "images"])
def test_swapped_train_and_val(tiny, what: str) -> None:
    if what == "annotations":
        pair = [tiny.annotations(split) for split in COUNTS]
    else:
        pair = [tiny.folder / split for split in COUNTS]
    pair[0].rename(tiny.root / "aside")
    pair[1].rename(pair[0])
    (tiny.root / "aside").rename(pair[1])
    problems = tiny.problems()
    for text, here, there in zip(problems, COUNTS, reversed(COUNTS), strict=True):
        assert f"image files that '{tiny.folder / here}' does not hold" in text
        assert f".jpg' is '../{there}/" in text


def test_an_image_in_both_splits(tiny) -> None:
    """AP would be too high, and nothing else would look wrong. Neither id nor name tells it."""
    shutil.copy(tiny.image("train2017", 101), tiny.image("val2017", 250))
    val = tiny.read("val2017")
    record = {**val["images"][1], "id": 250, "file_name": tiny.image("val2017", 250).name}
    tiny.write("val2017", {**val, "images": [*val["images"], record]})
    (problem,) = tiny.problems()
    assert problem.startswith(
        "1 images are in both train and test (000000000101.jpg = 000000000250.jpg)"
    )


def test_different_images_of_equal_names_and_ids(tiny) -> None:
    """Sets of two exports are both numbered from 1."""
    val, train = tiny.read("val2017"), tiny.read("train2017")
    for new, record in zip(train["images"], val["images"], strict=False):
        for a in val["annotations"]:
            a["image_id"] = new["id"] if a["image_id"] == record["id"] else a["image_id"]
        old = tiny.folder / "val2017" / record["file_name"]
        old.rename(tiny.folder / "val2017" / new["file_name"])
        record |= {"id": new["id"], "file_name": new["file_name"]}
    tiny.write("val2017", val)
    assert not tiny.problems()


def test_same_files_are_those_of_equal_content(tmp_path) -> None:
    """Oracle: each pair compared byte by byte; sizes, beginnings and ends agree all over."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(24):
        content = bytearray(20000 + 9 * (i % 2))
        content[9000 + 4000 * (i % 3)] = int(rng.integers(1, 4))  # in the middle or beyond
        files.append(tmp_path / str(i))
        files[-1].write_bytes(content)
    first, second = files[:14], files[10:]  # four are one path in both
    expected = {b for b in second for a in first if a.read_bytes() == b.read_bytes()}
    assert 6 < len(expected) < len(second)
    found = same_files(first, second)
    assert [b for _, b in found] == [b for b in second if b in expected]
    assert all(a in first and a.read_bytes() == b.read_bytes() for a, b in found)


def test_few_files_are_read_to_find_the_same(tmp_path, monkeypatch) -> None:
    """COCO has 18 GB; sizes alone tell most of its files apart."""
    files = [tmp_path / str(i) for i in range(60)]
    for i, path in enumerate(files):
        path.write_bytes(bytes([i]) * (9000 + i))
    files[50].write_bytes(files[3].read_bytes())
    read = []
    compare = filecmp.cmp
    monkeypatch.setattr(
        filecmp, "cmp", lambda *two, **how: read.append(two) or compare(*two, **how)
    )
    assert same_files(files[:40], files[40:]) == [(files[3], files[50])]
    assert read == [(files[3], files[50])]


def test_another_number_of_categories(tiny) -> None:
    data = tiny.read("train2017")
    data["categories"].pop(0)
    tiny.write("train2017", data)
    (problem,) = tiny.problems()
    assert "lacks 'c1'" in problem


MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
GN = "catalog://ImageNetPretrained/FAIR/R-50-GN"


def test_weights_that_are_missing_there_or_cut_off(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    for spec in (MSRA, GN):
        assert check_weights_file(spec).level == "note"
    for spec, content in ((MSRA, b"\x80\x02}q\x00."), (GN, b"\x80\x02}q\x00")):
        path, remote = weights_file(spec)
        assert remote and path.is_relative_to(tmp_path)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    there, cut = map(check_weights_file, (MSRA, GN))
    assert there.level == "ok" and str(weights_file(MSRA)[0]) in there.text
    assert cut.level == "problem" and "is cut off" in cut.text


def test_a_weights_file_that_nobody_can_download() -> None:
    finding = check_weights_file("output/pretrain/backbone.pth")
    assert finding.level == "problem" and "MODEL.WEIGHTS names it" in finding.text


@pytest.mark.detectron2
@pytest.mark.parametrize("spec", [MSRA, GN])
def test_weights_lie_where_detectron2_looks_for_them(tmp_path, monkeypatch, spec) -> None:
    """Oracle: detectron2 opens the file from there and has no reason to download."""
    from detectron2.checkpoint import catalog  # noqa: F401 (registers catalog://)
    from detectron2.utils.file_io import PathManager

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    path, _ = weights_file(spec)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert Path(PathManager.get_local_path(spec)) == path


@pytest.mark.detectron2
def test_the_catalogue_is_detectron2s() -> None:
    from detectron2.checkpoint.catalog import ModelCatalog

    from cbn_det.data.pretrained import _CATALOG

    for name, path in _CATALOG.items():
        assert ModelCatalog.get(name).endswith("/detectron/" + path)


def run_tool(*arguments: str, env: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools" / "check_coco.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_tool_says_ready_or_lists_problems(tiny, tmp_path, source_env) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run_tool(env=source_env | {"DETECTRON2_DATASETS": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ready for training"
    assert sorted(tmp_path.rglob("*")) == before, "a check leaves nothing behind"
    tiny.image("train2017", 103).unlink()
    done = run_tool(str(tiny.folder), env=source_env)
    assert (done.returncode, done.stderr) == (1, "")
    assert "PROBLEM " in done.stdout and done.stdout.splitlines()[-1] == "1 problem found"
    done = run_tool(str(tmp_path / "nowhere"), env=source_env)
    assert done.returncode == 1 and "does not exist: check the path" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped: nothing was changed"),
        (
            PermissionError(13, "Permission denied", "train2017"),
            1,
            "Permission denied: 'train2017'",
        ),
    ],
)
def test_ctrl_c_and_a_folder_without_permission_are_one_line(
    tiny, monkeypatch, capsys, error: BaseException, code: int, said: str
) -> None:
    def fail(folder: Path) -> list[str]:
        raise error

    from cbn_det.commands import check_coco as tool

    monkeypatch.setattr(os, "listdir", fail)
    assert tool.main([str(tiny.root)]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert "Traceback" not in line
