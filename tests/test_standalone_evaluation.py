"""The standalone engine's evaluation and pictures, with models that replay given predictions."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_set import Files
from torch import nn
from torchvision.ops import box_convert

from cbn_det.data import digits_paths, write_digits
from cbn_det.data.coco_api import mask_of
from cbn_det.standalone.config import get_cfg
from cbn_det.standalone.datasets import DetectionDataset
from cbn_det.standalone.evaluation import evaluate

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
Output = dict[str, torch.Tensor]


def config(masks: bool = True) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = masks
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("digits_for_evaluation")
    write_digits(root, train_images=1, val_images=15)
    return Files(*digits_paths(root)["digits_val"])


@pytest.fixture(params=["digits", "coco2017_subset"])
def files(request: pytest.FixtureRequest) -> Files:
    if request.param == "digits":
        return request.getfixturevalue("digits")
    folder = request.getfixturevalue("shared_data") / request.param
    return Files(folder / "val.json", folder / "images")


class Replay(nn.Module):
    """Answers the calls with given predictions, in order."""

    def __init__(self, outputs: list[Output]) -> None:
        super().__init__()
        self.outputs = iter(outputs)
        self.images: list[torch.Tensor] = []

    def forward(self, images: list[torch.Tensor]) -> list[Output]:
        assert not self.training and not torch.is_grad_enabled()
        self.images += images
        return [next(self.outputs) for _ in images]


def annotations_as_predictions(dataset: DetectionDataset, noise: float) -> list[Output]:
    """Annotations without crowd, as a model gives them. With noise, in pixels: boxes and masks are
    moved, some labels changed, some objects found twice, scores drawn (a few are equal)."""
    random = np.random.default_rng(3)
    outputs = []
    for image_id in dataset.image_ids:
        found = [a for a in dataset.coco.imgToAnns[image_id] if not a["iscrowd"]]
        if noise:
            found += [a for a in found if random.random() < 0.3]
        record = dataset.coco.imgs[image_id]
        n = len(found)
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(n, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        masks = torch.zeros(n, 1, record["height"], record["width"])
        labels = torch.tensor([dataset.category_ids.index(a["category_id"]) + 1 for a in found])
        for i, annotation in enumerate(found):
            shift = random.normal(0, noise, 2).round().astype(int)
            boxes[i] += torch.tensor(np.tile(shift, 2)) + torch.tensor(random.normal(0, noise, 4))
            boxes[i, 2:] = torch.maximum(boxes[i, 2:], boxes[i, :2] + 1)
            mask = torch.from_numpy(mask_of(dataset.coco, annotation)).float()
            masks[i, 0] = 0.9 * mask.roll(tuple(shift[::-1].tolist()), (0, 1))
            if noise and random.random() < 0.2:
                labels[i] = random.integers(len(dataset.category_ids)) + 1
        scores = random.random(n).round(2) if noise else np.ones(n)
        outputs.append(
            {
                "boxes": boxes,
                "labels": labels.long(),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "masks": masks,
            }
        )
    return outputs


def nothing(dataset: DetectionDataset) -> list[Output]:
    outputs = annotations_as_predictions(dataset, noise=0)
    return [{key: value[:0] for key, value in output.items()} for output in outputs]


def test_annotations_as_predictions_score_100(files, tmp_path):
    dataset = DetectionDataset(*files, config(), training=False)
    model = Replay(annotations_as_predictions(dataset, noise=0)).train()
    results = evaluate(model, dataset, config(), tmp_path / "new" / "folder")
    assert model.training
    assert len(model.images) == len(dataset)
    assert list(results) == ["bbox", "segm"]
    present = {dataset.coco.cats[a["category_id"]]["name"] for a in dataset.coco.anns.values()}
    for task in results.values():
        assert list(task) == METRICS + [f"AP-{name}" for name in dataset.class_names]
        assert task["AP"] > 99.99
        for name in dataset.class_names:
            defined = name in present
            assert task[f"AP-{name}"] > 99.99 if defined else math.isnan(task[f"AP-{name}"])


def score_file(files: Files, predictions: list[dict], task: str) -> float:
    """AP by pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(files.annotations))
        if task == "segm":
            predictions = [{k: v for k, v in p.items() if k != "bbox"} for p in predictions]
        scores = COCOeval(coco, coco.loadRes(predictions), task)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores.stats[0] * 100


def test_the_written_predictions_have_the_returned_scores(files, tmp_path, capsys):
    dataset = DetectionDataset(*files, config(), training=False)
    outputs = annotations_as_predictions(dataset, noise=3)
    results = evaluate(Replay(outputs), dataset, config(), tmp_path)
    assert not capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert file.name == "coco_instances_results.json"
    written = json.loads(file.read_text())
    assert len(written) == sum(len(output["scores"]) for output in outputs)
    assert all(set(p) >= {"image_id", "category_id", "bbox", "score"} for p in written)
    assert 1 < results["bbox"]["AP"] < 90 and 1 < results["segm"]["AP"] < 90
    for task in ("bbox", "segm"):
        again = score_file(files, json.loads(file.read_text()), task)
        assert results[task]["AP"] == pytest.approx(again, abs=1e-9)


def test_a_second_evaluation_gives_the_same(files, tmp_path):
    dataset = DetectionDataset(*files, config(), training=False)
    outputs = annotations_as_predictions(dataset, noise=3)
    first, second = (evaluate(Replay(outputs), dataset, config(), tmp_path) for _ in range(2))
    np.testing.assert_equal(first, second)


def test_boxes_alone(digits, tmp_path):
    dataset = DetectionDataset(*digits, config(), training=False)
    outputs = annotations_as_predictions(dataset, noise=0)
    for output in outputs:
        del output["masks"]
    results = evaluate(Replay(outputs), dataset, config(masks=False), tmp_path)
    assert list(results) == ["bbox"] and results["bbox"]["AP"] > 99.99


def test_without_any_prediction_everything_is_nan(digits, tmp_path, caplog):
    dataset = DetectionDataset(*digits, config(), training=False)
    results = evaluate(Replay(nothing(dataset)), dataset, config(), tmp_path)
    assert list(results) == ["bbox", "segm"]
    for task in results.values():
        assert list(task) == METRICS and all(map(math.isnan, task.values()))
    assert "predicted nothing" in caplog.text
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def with_changed_file(files: Files, folder: Path, change) -> DetectionDataset:
    data = json.loads(files.annotations.read_text())
    change(data)
    (folder / "changed.json").write_text(json.dumps(data))
    changed = Files(folder / "changed.json", files.images)
    return DetectionDataset(*changed, config(), training=False)


def test_a_set_without_annotations_gets_predictions_only(digits, tmp_path, caplog):
    outputs = annotations_as_predictions(
        DetectionDataset(*digits, config(), training=False), noise=0
    )
    dataset = with_changed_file(digits, tmp_path, lambda data: data.pop("annotations"))
    assert evaluate(Replay(outputs), dataset, config(), tmp_path / "out") == {}
    assert "no annotations" in caplog.text
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())


def test_one_class_has_no_ap_of_its_own(digits, tmp_path):
    def change(data: dict) -> None:
        data["categories"] = [{"id": 4, "name": "digit"}]
        for annotation in data["annotations"]:
            annotation["category_id"] = 4

    dataset = with_changed_file(digits, tmp_path, change)
    outputs = annotations_as_predictions(dataset, noise=0)
    results = evaluate(Replay(outputs), dataset, config(), tmp_path / "out")
    assert list(results["bbox"]) == METRICS and results["bbox"]["AP"] > 99.99
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {p["category_id"] for p in written} == {4}


def test_tables_are_logged(digits, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dataset = DetectionDataset(*digits, config(), training=False)
    results = evaluate(
        Replay(annotations_as_predictions(dataset, noise=3)), dataset, config(), tmp_path
    )
    for task in ("bbox", "segm"):
        (table,) = (m for m in caplog.messages if m.startswith(f"Evaluation results for {task}"))
        assert f"{results[task]['AP50']:.3f}" in table


def test_the_mode_is_put_back_when_the_model_fails(digits, tmp_path):
    dataset = DetectionDataset(*digits, config(), training=False)
    model = Replay([]).train()
    with pytest.raises(StopIteration):
        evaluate(model, dataset, config(), tmp_path)
    assert model.training


@pytest.mark.detectron2
@pytest.mark.parametrize("predicted", ["much", "nothing"])
def test_scores_are_those_of_detectron2(files, tmp_path, predicted):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    dataset = DetectionDataset(*files, config(), training=False)
    much = predicted == "much"
    outputs = annotations_as_predictions(dataset, noise=3) if much else nothing(dataset)
    results = evaluate(Replay(outputs), dataset, config(), tmp_path / "ours")

    name = "standalone_evaluation"
    register_coco_instances(name, {}, str(files.annotations), str(files.images))
    try:
        records = DatasetCatalog.get(name)  # also makes the class names known
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), distributed=False)
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes = Boxes(output["boxes"])
            instances.scores = output["scores"]
            instances.pred_classes = output["labels"] - 1
            instances.pred_masks = output["masks"][:, 0] >= 0.5
            evaluator.process([record], [{"instances": instances}])
        expected = evaluator.evaluate()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if not much:  # it takes the tasks from the predictions
        assert list(expected) == ["bbox"]
        expected["segm"] = expected["bbox"]
    assert list(expected) == list(results)
    for task, scores in expected.items():
        assert list(results[task]) == list(scores)
        np.testing.assert_allclose(
            list(results[task].values()), list(scores.values()), rtol=0, atol=1e-9
        )
    ours, theirs = (
        json.loads((tmp_path / who / "coco_instances_results.json").read_text())
        for who in ("ours", "theirs")
    )
    assert ours == theirs
