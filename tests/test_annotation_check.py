"""What annotations refer to, which of them count, and what silently does not."""

from __future__ import annotations

import contextlib
import io

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_set import TinySet, tiny_set

tiny = tiny_set


def ap_of_right_answers(tiny: TinySet) -> float:
    """pycocotools' AP, APs, APm and APl of a detector that answers with the annotations."""
    tiny.write()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tiny.path))
        answers = [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": a["bbox"],
                "score": 1,
            }
            for a in coco.anns.values()
        ]
        scores = COCOeval(coco, coco.loadRes(answers) if answers else COCO(), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores.stats[[0, 3, 4, 5]].tolist()


@pytest.mark.parametrize(
    "change, why",
    [
        ({"area": -1.0}, "no object has an 'area' from 0 to 1e10"),
        ({"area": 2e10}, "no object has an 'area' from 0 to 1e10"),
        ({"iscrowd": 1}, "2 of 2 annotations have iscrowd 1: set iscrowd 0 for single objects"),
        (None, "there are no annotations"),
    ],
)
def test_a_test_set_in_which_nothing_counts(tiny, change, why):
    """Oracle: pycocotools has no AP for it."""
    if change is None:
        tiny.data["annotations"] = []
    for a in tiny.data["annotations"]:
        a |= change
    assert ap_of_right_answers(tiny)[0] == -1
    tiny.refused_once("nothing counts in its evaluation", why, for_training=False)
    if "area" in (change or {}):
        tiny.check(for_evaluation=False)
    else:
        tiny.refused_once("nothing to train on", for_evaluation=False)
        tiny.refused_once("nothing to train on")


@pytest.mark.parametrize("change", [{"area": 0}, {"area": 0.5}, {"area": 1e10}])
def test_a_test_set_in_which_one_object_counts(tiny, change):
    tiny.data["annotations"] = tiny.data["annotations"][:1]
    tiny.data["annotations"][0] |= change
    assert ap_of_right_answers(tiny)[0] == pytest.approx(1)
    tiny.check(for_training=False)


@pytest.mark.parametrize(
    "area, warned",
    [(64 * 48, True), (600, True), (0, True), (-3, True), (400, False), (1, False), (441, False)],
)
def test_an_area_that_is_not_of_an_object_in_the_box(tiny, area, warned):
    """441 = 21 x 21 is what tools write whose box ends at the last pixel."""
    tiny.data["annotations"][1]["area"] = area
    if warned:
        tiny.warned("'area' is larger than their box or not positive", "(1 in all, first: 12)")
    else:
        assert tiny.check().warnings == ()
    assert tiny.check(for_evaluation=False).warnings == ()


def test_the_area_of_the_image_takes_the_ap_of_small_objects(tiny):
    """Why it is a warning."""
    tiny.data["annotations"] = [tiny.annotation(i, 1, 1, (15 * i, 5, 9, 9)) for i in (1, 2, 3)]
    small = ap_of_right_answers(tiny)[1]
    for a in tiny.data["annotations"]:
        a["area"] = 4000 * 3000
    assert small > 0.9 and ap_of_right_answers(tiny)[1] == -1
    tiny.warned("APs, APm and APl", "(3 in all")


def crowds(tiny: TinySet, *, people: tuple[int, int], brushes: tuple[int, int]) -> None:
    """Objects and crowd regions of each category."""
    tiny.data["annotations"] = []
    for category, numbers in ((1, people), (90, brushes)):
        for crowd, number in enumerate(numbers):
            for _ in range(number):
                i = len(tiny.data["annotations"])
                place = (2 * i, i, 9, 9)
                tiny.data["annotations"].append(
                    tiny.annotation(i + 1, 1, category, place, iscrowd=crowd)
                )


def test_mostly_crowd_regions(tiny):
    crowds(tiny, people=(2, 5), brushes=(2, 0))
    tiny.warned("most annotations (5 of 9) have iscrowd 1", "set iscrowd 0", "first: 3, 4, 5")
    crowds(tiny, people=(2, 4), brushes=(2, 0))
    assert tiny.check().warnings == ()


def test_a_category_of_crowd_regions(tiny):
    crowds(tiny, people=(5, 1), brushes=(0, 2))
    tiny.warned("categories all of whose", "(1 in all, first: 'toothbrush')", "set iscrowd 0")


@pytest.mark.parametrize("number", [-1, 0, 2**63, 2**70 + 1, -(2**64)])
def test_annotation_ids_may_be_any_integers(tiny, number):
    """The evaluation of both engines numbers them anew."""
    tiny.data["annotations"][0]["id"] = number
    assert tiny.check(masks=True).warnings == ()
    tiny.data["annotations"][0]["bbox"] = [1, 2, 3]
    tiny.refused_once(f"(1 in all, first: {number})")


def test_annotation_ids_are_told_as_they_are_written(tiny):
    """An array of numpy's would make floats of these two."""
    for a, number in zip(tiny.data["annotations"], (2**63 + 1, -5), strict=True):
        a |= {"id": number, "bbox": [70, 1, 2, 2]}
    for line in tiny.refused("wholly outside", "contradict their masks").splitlines():
        assert line.endswith(f"(2 in all, first: {2**63 + 1}, -5)")


@pytest.mark.parametrize("number", [1.0, "1", None, True])
def test_annotation_ids_that_are_no_integers(tiny, number):
    tiny.data["annotations"][0]["id"] = number
    tiny.refused_once("that are not integers: number them", f"(1 in all, first: {number!r})")


@pytest.mark.parametrize("name", [None, 7, ["a"]])
def test_category_names_that_are_no_text(tiny, name):
    tiny.data["categories"][1]["name"] = name
    tiny.refused_once("category names that are not text", f"(1 in all, first: id 1: {name!r})")


def test_category_names_repeated(tiny):
    """Results are by name: one class would take the other's place."""
    tiny.data["categories"][1]["name"] = "toothbrush"
    message = tiny.refused_once("category names repeated", "first: 'toothbrush' is ids 1, 90)")
    assert "give each class a name of its own" in message


def test_via_exports_are_told_all_their_faults_at_once(tiny):
    """Categories once for each region, image ids as text, polygons that are flat lists."""
    person = {"id": 1, "name": "person"}
    tiny.data["categories"] += [person] * 3
    for a in tiny.data["annotations"]:
        a["image_id"] = str(a["image_id"])
        a["segmentation"] = a["segmentation"][0]
    message = tiny.refused(
        "ids repeated in 'categories': keep one of equal entries",
        "'image_id' is not in 'images'",
        "(2 in all, first: annotation 11 has '1', listed is 1: write both alike,",
    )
    assert len(message.splitlines()) == 2
    for a in tiny.data["annotations"]:
        a["image_id"] = int(a["image_id"])
    tiny.refused("keep one of equal entries", "flat list of numbers", "(2 in all, first: 11, 12)")


def test_text_that_is_no_number_of_an_image(tiny):
    for a, text in zip(tiny.data["annotations"], ("1.jpg", "9" * 5000), strict=True):
        a["image_id"] = text
    message = tiny.refused_once("not in 'images'", "annotation 11 has '1.jpg'")
    assert "write both alike" not in message


def test_numbers_where_images_have_text(tiny):
    for record in tiny.data["images"]:
        record["id"] = str(record["id"])
    tiny.data["annotations"].append(tiny.annotation(13, 77, 1))
    message = tiny.refused("annotation 11 has 1, listed is '1'", "annotation 13 has 77)")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("others", ["first", "1"])
def test_image_ids_that_mix_text_and_numbers(tiny, others):
    for a in tiny.data["annotations"]:
        a["image_id"] = others if a["image_id"] == 1 else a["image_id"]
    tiny.data["images"][0]["id"] = others
    with pytest.raises(TypeError):
        sorted(record["id"] for record in tiny.data["images"])
    tiny.refused_once(f"ids in 'images' mix text and numbers ({others!r} and 2)")


def test_the_same_annotation_twice(tiny):
    first = tiny.data["annotations"][0]
    tiny.data["annotations"] += [{**first, "id": 20}, {**first, "id": 21}]
    tiny.warned("annotations repeated", "(2 in all, first: 11 = 20, 11 = 21)")
    tiny.data["annotations"][2:] = [
        {**first, "id": 20, "category_id": 90},
        {**first, "id": 21, "image_id": 3},
        tiny.annotation(22, 1, 1, (10, 10, 20, 21)),
    ]
    assert tiny.check().warnings == ()


def test_classes_without_an_object_are_named(tiny):
    tiny.data["categories"] += [{"id": i, "name": f"c{i}"} for i in (2, 3)]
    crowds(tiny, people=(3, 0), brushes=(2, 1))
    report = tiny.check()
    assert report.num_objects == {"person": 3, "c2": 0, "c3": 0, "toothbrush": 2}
    assert str(report).endswith("4 classes; without an object: 'c2', 'c3' (2 in all)")
    tiny.data["categories"] = tiny.data["categories"][:2]
    assert str(tiny.check()).endswith("2 classes")


def test_what_is_found_of_one_image_does_not_hide_another(tiny):
    """Entries that cannot be used are left out of further checks, the others are not."""
    tiny.data["images"][0]["width"] = "64"
    tiny.data["annotations"][1]["bbox"] = [70, 1, 2, 2]
    message = tiny.refused("width '64'", "wholly outside their image", "first: 12)")
    assert "not in 'images'" not in message
