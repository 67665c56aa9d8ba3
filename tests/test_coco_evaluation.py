"""Right predictions score 100 on both engines: more than 100 objects in an image, any ids."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from both_engines import ENGINES
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

SIDE, CELL = 130, 10
PER_IMAGE = (SIDE // CELL) ** 2  # 169, most of them of one category


def write_set(folder: Path, images: int, first_id: Any = 1, step: int = 1) -> list[list[float]]:
    """Writes a set of 169 boxes of two categories, each alone in its cell, shared out evenly among
    the images. Returns ``[image, category, x, y, w, h]`` of each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(1, images + 1):
        Image.new("RGB", (SIDE, SIDE)).save(folder / "images" / f"{index}.png")
        sizes = {"width": SIDE, "height": SIDE}
        records.append({"id": index, "file_name": f"{index}.png", **sizes})
    rows, annotations = [], []
    for k in range(PER_IMAGE):
        x, y = CELL * (k % (SIDE // CELL)) + 1, CELL * (k // (SIDE // CELL)) + 1
        w, h = (int(v) for v in rng.integers(4, CELL - 2, 2))
        rows.append([k % images + 1, 1 + (rng.random() < 0.15), x, y, w, h])
        annotations.append(
            {
                "id": first_id + step * k,
                "image_id": rows[-1][0],
                "category_id": rows[-1][1],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
        )
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return rows


def predictions(rows: list[list[float]], noise: float) -> list[dict[str, Any]]:
    """The rows as COCO results; with noise, boxes are moved and some categories wrong."""
    rng = np.random.default_rng(1)
    found = []
    for row in rows:
        box = np.array(row[2:]) + rng.normal(0, noise, 4) * [1, 1, 0, 0]
        category = row[1] if rng.random() > noise / 5 else 3 - row[1]
        score = float(np.float32(rng.random()))
        found.append(
            {"image_id": row[0], "category_id": category, "bbox": box.tolist(), "score": score}
        )
    return found


class Replay(nn.Module):
    def __init__(self, outputs: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.outputs) for _ in images]


def score(
    engine: str, folder: Path, images: int, found: list[dict[str, Any]], most: int
) -> dict[str, float]:
    """What an engine's evaluation gives for predictions, with TEST.DETECTIONS_PER_IMAGE ``most``.

    Args:
        images: of the set; their ids begin with 1.
    """
    boxes, classes, scores = {}, {}, {}
    for image in range(1, images + 1):
        own = [p for p in found if p["image_id"] == image]
        boxes[image] = torch.tensor([p["bbox"] for p in own], dtype=torch.float64)
        boxes[image][:, 2:] += boxes[image][:, :2]
        classes[image] = torch.tensor([p["category_id"] for p in own])
        scores[image] = torch.tensor([p["score"] for p in own])
    if engine == "standalone":
        from cbn_det.standalone.config import get_cfg
        from cbn_det.standalone.datasets import DetectionDataset
        from cbn_det.standalone.evaluation import evaluate

        cfg = get_cfg()
        cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
        cfg.TEST.DETECTIONS_PER_IMAGE = most
        files = (folder / "set.json", folder / "images")
        outputs = [
            {"boxes": boxes[i], "labels": classes[i], "scores": scores[i]} for i in sorted(boxes)
        ]
        data = DetectionDataset(*files, cfg, training=False)
        return evaluate(Replay(outputs), data, cfg, folder / "out")["bbox"]
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog
    from detectron2.structures import Boxes, Instances

    from cbn_det.plugin.datasets import register_coco
    from cbn_det.plugin.trainer import Trainer

    cfg = get_cfg()
    name = f"many {folder}"  # a name stands for one set of files as long as the process lives
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(folder / "out"), (name,)
    cfg.TEST.DETECTIONS_PER_IMAGE = most
    register_coco(name, folder / "set.json", folder / "images")
    DatasetCatalog.get(name)
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.reset()
    for i in boxes:
        fields = {
            "pred_boxes": Boxes(boxes[i]),
            "scores": scores[i],
            "pred_classes": classes[i] - 1,
        }
        evaluator.process([{"image_id": i}], [{"instances": Instances((SIDE, SIDE), **fields)}])
    return evaluator.evaluate()["bbox"]


def pycocotools_stats(folder: Path, found: list[dict[str, Any]]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "set.json"))
        scores = COCOeval(coco, coco.loadRes([dict(p) for p in found]), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * scores.stats[:6]


METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_an_image_of_many_objects_scores_as_its_parts(
    engine: str, noise: float, tmp_path: Path
) -> None:
    """Boxes that do not touch are matched alike in one image and shared out among four, where
    COCO's limit of 100 leaves nothing out."""
    rows = write_set(tmp_path / "one", images=1)
    shared_out = write_set(tmp_path / "four", images=4)
    found = predictions(rows, noise)
    expected = pycocotools_stats(
        tmp_path / "four",
        [{**p, "image_id": row[0]} for p, row in zip(found, shared_out, strict=True)],
    )
    results = score(engine, tmp_path / "one", 1, found, most=300)
    assert (results["AP"] > 99.99) == (noise == 0) and results["AP"] > 5
    defined = expected > -1
    np.testing.assert_allclose(np.array([results[m] for m in METRICS])[defined], expected[defined])
    assert pycocotools_stats(tmp_path / "one", found)[0] < expected[0] - 1
    classes = [results["AP-one"], results["AP-two"]]
    assert results["AP"] == pytest.approx(np.mean(classes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("most", [20, 100])
def test_within_coco_s_limit_the_numbers_are_pycocotools_own(
    engine: str, most: int, tmp_path: Path
) -> None:
    found = predictions(write_set(tmp_path, images=4), noise=0.8)
    results = score(engine, tmp_path, 4, found, most)
    expected = pycocotools_stats(tmp_path, found)[:4]
    assert np.abs(np.array([results[m] for m in METRICS[:4]]) - expected).max() < 1e-12


@pytest.mark.detectron2
def test_detectron2_s_sign_for_no_limit(tmp_path: Path) -> None:
    found = predictions(write_set(tmp_path, images=1), noise=0.0)
    assert score("detectron2", tmp_path, 1, found, most=-1)["AP"] > 99.99


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first_id, step", [(0, 1), (-1, -1), (2**70, 1), (2**63 - 5, 1)])
def test_annotation_ids_do_not_matter(
    engine: str, first_id: int, step: int, tmp_path: Path
) -> None:
    rows = write_set(tmp_path / "odd", 4, first_id, step)
    right = score(engine, tmp_path / "odd", 4, predictions(rows, 0.0), most=100)
    assert right["AP"] > 99.99 and right["AP50"] > 99.99
    found = predictions(rows, 0.8)
    assert write_set(tmp_path / "plain", 4) == rows
    expected = pycocotools_stats(tmp_path / "plain", found)
    assert score(engine, tmp_path / "odd", 4, found, most=100)["AP"] == pytest.approx(expected[0])
