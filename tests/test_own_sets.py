"""tools/check_coco.py --train --test: one's own files, checked without starting a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_set import TinySet

from cbn_det.data.sets import check_own_sets

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_coco.py"


@pytest.fixture
def sets(tmp_path: Path) -> tuple[TinySet, TinySet]:
    return TinySet(tmp_path / "train", seed=1), TinySet(tmp_path / "val", seed=2)


def found(train: list[TinySet], test: list[TinySet], masks: bool = False) -> dict:
    """Texts by level."""
    for one in (*train, *test):
        one.write()
    lines = check_own_sets(
        [(one.path, one.images) for one in train],
        [(one.path, one.images) for one in test],
        masks=masks,
    )
    texts = {"ok": [], "note": [], "problem": []}
    for line in lines:
        texts[line.level].append(line.text)
    return texts


def test_good_sets_and_what_the_config_needs(sets):
    train, val = sets
    texts = found([train], [val])
    assert not texts["problem"] and not texts["note"]
    assert all(text.startswith(str(one.path)) for text, one in zip(texts["ok"], sets, strict=False))
    assert texts["ok"][2:] == [
        "the config needs: MODEL.ROI_HEADS.NUM_CLASSES 2",
        "no image is in both train and test",
    ]
    needs = "MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.MASK_ON True INPUT.MASK_FORMAT polygon"
    assert f"the config needs: {needs}" in found([train], [val], masks=True)["ok"]
    mask = {"size": [48, 64], "counts": [490, 20, 28, 20, 2514]}
    train.data["annotations"][0] |= {"segmentation": mask, "bbox": [10, 10, 2, 20]}
    needs = needs.replace("polygon", "bitmask")
    assert f"the config needs: {needs}" in found([train], [val], masks=True)["ok"]


def test_each_set_is_checked_for_its_use(sets):
    train, val = sets
    for a in train.data["annotations"]:
        del a["area"]
    val.data["annotations"].pop()
    val.data["annotations"][0]["iscrowd"] = 1
    texts = found([train], [val])
    (problem,) = texts["problem"]
    assert "nothing counts in its evaluation" in problem and str(val.path) in problem
    train.data["annotations"], val.data["annotations"] = [], [val.annotation(1, 1, 1)]
    (problem,) = found([train], [val])["problem"]
    assert "nothing to train on" in problem


def test_all_problems_of_all_sets(sets):
    train, val = sets
    train.data["annotations"][0]["bbox"] = [70, 1, 2, 2]
    (train.images / "2.jpg").unlink()
    val.data["categories"][1]["name"] = "toothbrush"
    texts = found([train], [val])
    assert [text.split(":")[0] for text in texts["problem"]] == [str(train.path)] * 2 + [
        str(val.path)
    ]
    assert not texts["ok"], "nothing is said of sets that cannot be compared"


def test_a_class_that_one_of_the_files_lacks(sets):
    train, val = sets
    val.data["categories"].pop()
    val.data["annotations"].pop(0)
    (problem,) = found([train], [val])["problem"]
    assert f"'{val.path}' lacks 'person'" in problem
    assert "NUM_CLASSES" not in problem


def test_classes_without_a_training_object(sets, tmp_path):
    train, val = sets
    second = TinySet(tmp_path / "second", seed=3)
    for one in (train, val, second):
        one.data["categories"].append({"id": 2, "name": "cat"})
    train.data["annotations"].pop(0)
    (note,) = found([train], [val])["note"]
    assert note.endswith("whose AP will be 0 or nan: 'person', 'cat' (2 in all)")
    (note,) = found([train, second], [val])["note"]
    assert note.endswith(": 'cat' (1 in all)")
    assert not found([], [val])["note"]


def test_images_in_both(sets):
    train, val = sets
    (val.images / "2.jpg").write_bytes((train.images / "1.jpg").read_bytes())
    (problem,) = found([train], [val])["problem"]
    assert problem.startswith("1 images are in both train and test (1.jpg = 2.jpg)")
    texts = found([train], [train])
    assert "3 images are in both" in texts["problem"][0] and len(texts["ok"]) == 2


def test_the_tool(sets, source_env, tmp_path):
    """Without torch: it says in a second or two what a training would say."""
    train, val = sets
    train.write()
    val.write()
    words = ["--train", train.path, train.images, "--test", val.path, val.images, "--masks"]

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(TOOL), *map(str, words), *more]
        return subprocess.run(command, env=source_env, capture_output=True, text=True)

    before = sorted(tmp_path.rglob("*"))
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[-1] == "ready for training"
    assert not done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    data = json.loads(val.path.read_text())
    for a in data["annotations"]:
        a["bbox"] = [a["bbox"][0] + 40, *a["bbox"][1:]]
    val.path.write_text(json.dumps(data))
    done = run()
    assert done.returncode == 1 and "contradict their masks" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 problem found"
    assert run("--train", "only.json").returncode == 2


def test_the_tool_needs_neither_torch_nor_an_engine(source_env):
    code = f"""
import runpy, sys
runpy.run_path({str(TOOL)!r}, run_name="tool")
assert not {{"torch", "detectron2", "torchvision"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=source_env, capture_output=True)
    assert done.returncode == 0, done.stderr
