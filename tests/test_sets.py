"""What is checked of all the data sets of a run, the same for both engines."""

from __future__ import annotations

import logging

import pytest
from fvcore.common.config import CfgNode
from PIL import Image
from tiny_set import TinySet, tiny_set

from cbn_det.data import DataError, check_classes, check_set, log_reports

tiny = tiny_set
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"


def test_the_number_of_classes():
    check_classes(KEY, 2, {"t": ["a", "b"], "v": ["a", "b"]})
    check_classes(KEY, 5, {})
    with pytest.raises(DataError, match=f"{KEY} is 3, but data set 't' has 2.*`{KEY} 2`"):
        check_classes(KEY, 3, {"t": ["a", "b"], "v": ["a", "b"]})


@pytest.mark.parametrize("num_classes", [1, 2, 3])
@pytest.mark.parametrize("fewer", ["t", "v"])
def test_a_class_that_one_file_lacks_is_named_whatever_the_number(num_classes, fewer):
    """No number fits both files: to name one sends the user in a circle."""
    classes = {"t": ["a", "b", "c"], "v": ["a", "b", "c"]} | {fewer: ["a", "c"]}
    more = "v" if fewer == "t" else "t"
    with pytest.raises(DataError) as error:
        check_classes(KEY, num_classes, classes)
    message = str(error.value)
    assert f"'{fewer}' has 2 classes, data set '{more}' 3; '{fewer}' lacks 'b'" in message
    assert "NUM_CLASSES" not in message and "\n" not in message


def reports(tmp_path, **objects: list[int]) -> dict:
    """Of sets of the classes toothbrush, person and cat, with objects of the given categories."""
    found = {}
    for seed, (name, categories) in enumerate(objects.items()):
        one = TinySet(tmp_path / name, seed)
        one.data["categories"].append({"id": 2, "name": "cat"})
        one.data["annotations"] = [
            one.annotation(i, 1, category, (5 * i, 5, 9, 9))
            for i, category in enumerate(categories)
        ]
        found[name] = one.check(masks=True)
    return found


@pytest.mark.parametrize(
    "train, unused",
    [
        (["t"], "'cat', 'toothbrush' (2 in all)"),
        (["t", "u"], "'toothbrush' (1 in all)"),
        ([], None),
    ],
)
def test_classes_without_a_training_object_are_a_warning(tmp_path, caplog, train, unused):
    found = reports(tmp_path, t=[1, 1], u=[2], v=[1, 2, 90])
    with caplog.at_level(logging.INFO):
        log_reports(found, train)
    infos = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert infos == [str(report) for report in found.values()]
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    if unused is None:
        assert not warnings
    else:
        assert warnings == [
            f"classes without a training object, whose AP will be 0 or nan: {unused}"
        ]


def test_a_file_under_two_names_is_warned_about_once(tiny, caplog):
    tiny.data["annotations"][1]["area"] = 64 * 48
    report = tiny.check()
    log_reports({"t": report, "v": report}, ["t"])
    assert [record.message for record in caplog.records] == list(report.warnings)


def test_sets_of_an_unknown_kind_say_nothing_about_classes(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        log_reports(reports(tmp_path, t=[1]), ["t", "registered by the user's own code"])
    assert not caplog.records


def check_of(tiny: TinySet) -> None:
    cfg = CfgNode({"DATASETS": {"TRAIN": ("mine",), "TEST": ("mine",)}})
    cfg.MODEL = CfgNode({"MASK_ON": False})
    tiny.write()
    check_set(cfg, "mine", tiny.path, tiny.images, eval_only=False, reader=None)


def test_a_long_check_is_not_silent(tiny, capsys, monkeypatch):
    """61 seconds for 136 large images would look like a run that hangs; a short one has nothing to
    say but what it found."""
    check_of(tiny)
    assert capsys.readouterr().err == ""
    clock = (100.0 * look for look in range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    check_of(tiny)
    told = capsys.readouterr().err
    assert f"decoding images of {tiny.images}" in told and "/3 [" in told


def test_what_is_wrong_names_the_set(tiny):
    Image.new("I;16", (64, 48)).save(tiny.images / "3.png")
    with pytest.raises(DataError, match="^data set 'mine': .*set.json: image files below"):
        check_of(tiny)
