"""Data sets on the command line are used, or refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from both_engines import ENGINES
from tiny_run import REPOSITORY, write_boxes

from cbn_det.coco_sets import check_coco_sets
from cbn_det.launch import main
from cbn_det.study.plan import Plan, Split

CONFIG = REPOSITORY / "configs" / "quickstart" / "faster_rcnn_R_18_FPN_digits_cbn.yaml"


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "boxes"
    write_boxes(folder)
    return folder


def named(folder: Path, *names: str) -> list[str]:
    files = str(folder / "boxes.json"), str(folder / "images")
    return [word for name in names for word in ("--coco-dataset", name, *files)]


def refused(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize("engine", ENGINES)
def test_those_that_nothing_would_read(
    engine: str, boxes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = ["--engine", engine, "--config-file", str(CONFIG)]
    out = ["OUTPUT_DIR", str(tmp_path / "out")]
    assert main([*head, *named(boxes, "a", "b"), *out]) == 2
    error = refused(capfd)
    assert "--coco-dataset a, b: neither in DATASETS.TRAIN ('digits_train',)" in error
    assert """DATASETS.TRAIN "('a',)" DATASETS.TEST "('b',)\"""" in error
    # a test set that was forgotten: the digits would be the measure, "corrected" to ten classes
    words = ["DATASETS.TRAIN", "('a',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    assert main([*head, *named(boxes, "a", "b"), *out, *words]) == 2
    assert """b: neither in DATASETS.TRAIN ('a',) nor in DATASETS.TEST ('digits_val',)""" in (
        refused(capfd)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("missing", ["file", "folder"])
def test_those_that_are_not_there(
    engine: str, missing: str, boxes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = {"file": boxes / "boxes.json", "folder": boxes / "images"} | {missing: tmp_path / "no"}
    words = ["--coco-dataset", "a", str(paths["file"]), str(paths["folder"])]
    # in use or not, and also where the set is of a training that is over
    for more in ((), ("DATASETS.TRAIN", "('a',)")):
        for flags in ((), ("--eval-only", "--resume")):
            command = ["--engine", engine, "--config-file", str(CONFIG), *words, *flags]
            assert main([*command, "OUTPUT_DIR", str(tmp_path / "out"), *more]) == 2
            assert "--coco-dataset a: there is no " in (error := refused(capfd))
            assert f"'{tmp_path / 'no'}'" in error


def test_a_comparison_is_refused_before_it_starts(
    boxes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from cbn_det.commands import compare as tool

    head = ["--engine", "standalone", "--dry-run", "--norms", "BN", "--output", str(tmp_path)]
    absent = ["--coco-dataset", "a", str(tmp_path / "absent.json"), str(boxes / "images")]
    own = ["--opts", "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)"]
    for words, expected in (
        ([*absent, *own], "absent.json"),
        (named(boxes, "a", "b"), "DATASETS.TRAIN ('digits_train',)"),
        ([*named(boxes, "a", "b", "c"), *own], "--coco-dataset c: neither"),
    ):
        assert tool.main([*head, *words]) == 2
        said = capfd.readouterr()
        assert expected in said.err and len(said.err.splitlines()) == 1 and not said.out
    assert tool.main([*head, *named(boxes, "a", "b"), *own]) == 0
    assert "--coco-dataset a" in capfd.readouterr().out


def test_a_config_of_one_s_own_names_its_sets(boxes: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f'_BASE_: "{CONFIG}"\nDATASETS: {{TRAIN: ["a"], TEST: ["b"]}}\n')
    triples = [["a", str(boxes / "boxes.json"), str(boxes / "images")]]
    triples += [["b", *triples[0][1:]]]
    plan = {"output": tmp_path, "norms": ["BN"], "splits": [Split(1, 2)], "seeds": [1]}
    Plan(**plan, engine="standalone", config=config, datasets=triples)
    with pytest.raises(ValueError, match=r"b: neither in DATASETS.TRAIN \('a',\) nor .*\(\)"):
        Plan(
            **plan,
            engine="standalone",
            config=config,
            datasets=triples,
            overrides=["DATASETS.TEST", "()"],
        )


def test_nothing_named_nothing_refused() -> None:
    check_coco_sets([], ["digits_train"], [])
