"""A data set that somebody registered in Python, as detectron2's tutorial does, with no file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import result_of, run_loggers_removed, tiny_inputs

from cbn_det.launch import main as launch

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs
NAME, CLASSES = "set_of_python", ["first", "second"]


@pytest.fixture
def registered(inputs: Path) -> Iterator[None]:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    file = inputs / "boxes.json"
    records: list[Any] = load_coco_json(str(file), str(inputs / "images"))
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] -= 1
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=CLASSES, evaluator_type="coco")
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_its_classes_and_pictures_are_in_the_run(
    inputs: Path, registered: None, tmp_path: Path
) -> None:
    words = [w for split in ("TRAIN", "TEST") for w in (f"DATASETS.{split}", f"('{NAME}',)")]
    with run_loggers_removed():
        assert (
            launch(
                ["--engine", "detectron2", "--config-file", str(inputs / "tiny.yaml")]
                + [*words, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "run")]
            )
            == 0
        )
    found = result_of(tmp_path / "run")["test_set"]
    assert found["classes"] == CLASSES
    assert len(json.loads(Path(found["annotations"]).read_text())["images"]) == 6
    assert list((tmp_path / "run" / "pictures").iterdir())
