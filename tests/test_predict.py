"""A trained run as a function of an image, and cbn-det predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from tiny_run import arguments, run_loggers_removed, write_inputs

import cbn_det
from cbn_det import predict
from cbn_det.data.pictures import color_of
from cbn_det.launch import main as train
from cbn_det.run.errors import ConfigError

MASKS = (
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "4"),
)
CBN = ("MODEL.FPN.NORM", "CBN(window=2, burn_in=1)", "INPUT.MIN_SIZE_TEST", "80")


@pytest.fixture(
    scope="module",
    params=["standalone", pytest.param("detectron2", marks=pytest.mark.detectron2)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training with masks, in inputs/run."""
    inputs = tmp_path_factory.mktemp(f"predict_{request.param}")
    write_inputs(inputs)
    config = "standalone.yaml" if request.param == "standalone" else "tiny.yaml"
    words = ("--engine", request.param, *CBN, *MASKS)
    with run_loggers_removed():
        assert train(arguments(inputs, inputs / "run", *words, config=config)) == 0
    return inputs / "run"


def evaluated(run: Path, image_id: int) -> list[dict]:
    made = json.loads((run / "coco_instances_results.json").read_text())
    return sorted((p for p in made if p["image_id"] == image_id), key=lambda p: -p["score"])


@pytest.mark.parametrize("given", ["path", "pillow", "array"])
def test_it_finds_what_the_evaluation_found(run: Path, given: str) -> None:
    predictor = cbn_det.load_run(str(run))
    for image_id in (1, 2):
        path = run.parent / "images" / f"{image_id}.png"
        image: Any = path
        if given != "path":
            image = Image.open(path).convert("RGB")
        if given == "array":
            image = np.array(image)
        found, expected = predictor(image), evaluated(run, image_id)
        assert len(found) == len(expected) >= 8
        np.testing.assert_allclose(found.scores, [p["score"] for p in expected], atol=1e-6)
        boxes = np.array([p["bbox"] for p in expected])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(found.boxes, boxes, atol=1e-3)
        assert [label + 1 for label in found.labels] == [p["category_id"] for p in expected]
        assert set(found.names) <= {"orange", "blue"}
        assert [("orange", "blue")[i] for i in found.labels] == found.names
        masks = np.stack([mask_util.decode(p["segmentation"]) for p in expected])
        assert (found.masks != masks).mean() < 1e-3


def test_what_is_found_is_drawn(run: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other" / "1.png"
    other.parent.mkdir()
    shutil.copy(run.parent / "images" / "2.png", other)
    images = [str(run.parent / "images" / "1.png"), str(other)]
    words = [str(run), *images, "--output", str(tmp_path / "out"), "--score"]
    assert predict.main([*words, "0.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ")[0] for line in lines] == [
        str(tmp_path / "out" / name) for name in ("1.png", "1-2.png")
    ]
    best = evaluated(run, 1)[0]
    picture = np.asarray(Image.open(tmp_path / "out" / "1.png"))
    assert picture.shape == (400, 400, 3)
    assert (picture == color_of(best["category_id"] - 1)).all(axis=2).sum() > 50
    assert predict.main([*words, "1.0"]) == 0
    assert "0 found" in capsys.readouterr().out
    plain = Image.open(images[0]).convert("RGB").resize((400, 400), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "1.png")), np.asarray(plain))


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    image = str(run.parent / "images" / "1.png")
    for words, said in (
        ([str(tmp_path), image], "has no config.yaml"),
        ([str(run), str(tmp_path / "nowhere.png")], "not an image that can be read"),
        ([str(run), image, "--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
        ([str(run), image, "--output", image], "File exists"),
    ):
        assert predict.main(words) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1
    lazy = tmp_path / "lazy"
    lazy.mkdir()
    (lazy / "config.yaml").write_text("model: {_target_: some.Model}\n")
    assert predict.main([str(lazy), image]) == 2
    assert "a LazyConfig; build its model with" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"RGB values as uint8 \[H, W, 3\]"):
        cbn_det.load_run(str(run))(np.zeros((8, 8)))


def test_values_that_would_be_cut_off_are_refused(run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match="convert it to 8 bits"):
        cbn_det.load_run(str(run))(tmp_path / "deep.png")


def test_a_run_without_a_result_has_numbers_for_names(run: Path, tmp_path: Path) -> None:
    """One that was killed, or that was never evaluated."""
    for name in ("config.yaml", "model_final.pth", "last_checkpoint"):
        shutil.copy(run / name, tmp_path)
    found = cbn_det.load_run(str(tmp_path))(run.parent / "images" / "1.png")
    assert set(found.names) <= {"class 0", "class 1"} and len(found)
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(ConfigError, match="no checkpoint in it"):
        cbn_det.load_run(str(tmp_path))


def test_tensorboard_shows_the_pictures(run: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    tags: set[str] = set()
    for path in run.glob("events.out.tfevents.*"):
        events = accumulator(str(path))
        events.Reload()
        tags |= set(events.Tags()["images"])
    assert tags == {f"predictions/{path.stem}" for path in (run / "pictures").iterdir()}
    assert len(tags) == 4
