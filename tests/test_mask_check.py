"""Masks that are unusable, or contradict the boxes beside them, are told before training."""

from __future__ import annotations

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from tiny_set import HEIGHT, WIDTH, TinySet, tiny_set

from cbn_det.data import mask_check as rle

tiny = tiny_set


def encoded(mask: np.ndarray, compressed: bool = True) -> dict:
    found = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    if compressed:
        return {"size": found["size"], "counts": found["counts"].decode("ascii")}
    changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0, append=2))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


@pytest.mark.parametrize("seed", range(30))
def test_a_whole_mask_is_pycocotools(seed):
    """Oracle: the mask that pycocotools encoded."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2)
    mask = rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 1])
    if seed % 3 == 0:  # long runs too
        mask = mask.repeat(40, axis=0).repeat(9, axis=1)
        height, width = mask.shape
    text, numbers = encoded(mask), encoded(mask, compressed=False)
    found = rle.checked_rle(text)
    assert found == rle.checked_rle(numbers)
    assert np.array_equal(mask_util.decode(found), mask)
    assert rle.checked_rle(text | {"size": [int(height), int(width) + 1]}) is None
    x1, x2 = np.sort(rng.integers(0, width + 1, 2))
    y1, y2 = np.sort(rng.integers(0, height + 1, 2))
    inside = rle.num_pixels_within(found, (x1, y1, x2 - x1, y2 - y1))
    assert inside == mask[y1:y2, x1:x2].sum()


@pytest.mark.parametrize("compressed", [True, False])
def test_rle(tiny, compressed):
    crowd = encoded(rectangle(1, 2, 30, 40), compressed)
    tiny.data["annotations"].append(tiny.annotation(13, 1, 1, iscrowd=1, segmentation=crowd))
    report = tiny.check(masks=True)
    assert report.num_crowd == 1 and not report.has_rle_masks and report.warnings == ()
    mask = encoded(rectangle(10, 10, 20, 20), compressed)
    tiny.data["annotations"][0]["segmentation"] = mask
    report = tiny.check(masks=True)
    assert report.has_rle_masks and report.warnings == ()


SHORT = encoded(rectangle(10, 10, 20, 20)[:40])["counts"]  # an image of 40 rows


@pytest.mark.parametrize(
    "segmentation, text",
    [
        (encoded(rectangle(1, 1, 9, 9).T), "another size than their image"),
        ({"size": [HEIGHT, WIDTH], "counts": [100, 300]}, "do not fill their image"),
        ({"size": [HEIGHT, WIDTH], "counts": [3000, 72.0]}, "do not fill their image"),
        ({"size": [HEIGHT, WIDTH], "counts": ["3000", "72"]}, "do not fill their image"),
        ({"size": [HEIGHT, WIDTH], "counts": 3072}, "do not fill their image"),
        ({"size": [HEIGHT, WIDTH], "counts": SHORT}, "do not fill their image"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "do not fill their image"),
        ({"counts": [100, 300]}, "must be a list of polygons"),
        ([10, 10, 30, 10, 30, 30], "flat list of numbers"),
        ([[10, 10, 30, float("nan"), 30, 30]], "must be a list of polygons"),
        ([[10, 10, 30, 10**400, 30, 30]], "must be a list of polygons"),
        ([[10, 10, "30", 10, 30, 30]], "must be a list of polygons"),
        ("polygon", "must be a list of polygons"),
        ([[10, 10, 30, 10]], "fewer than 3 points"),
        ([[10, 10, 30, 10, 30, 30, 5]], "odd number of coordinates"),
    ],
)
def test_bad_mask_names_the_annotation(tiny, segmentation, text):
    tiny.data["annotations"][1]["segmentation"] = segmentation
    tiny.refused_once(text, "(1 in all, first: 12)", masks=True)


@pytest.mark.parametrize("size", [5, None, "48 64", {"height": 48}, [48.0, 64.0], ["48", "64"]])
@pytest.mark.parametrize("masks", [True, False])
def test_size_of_a_mask_that_is_no_two_integers(tiny, size, masks):
    tiny.data["annotations"][1]["segmentation"] = {"size": size, "counts": [HEIGHT * WIDTH]}
    tiny.refused_once("'size' must be [height, width]", "(1 in all, first: 12)", masks=masks)


def test_a_degenerate_part_beside_a_valid_polygon_is_warned_about(tiny):
    tiny.data["annotations"][1]["segmentation"].append([1, 1, 2, 2])
    tiny.warned("left out beside valid ones", "first: 12", masks=True)
    # pycocotools decides by the first polygon, and four numbers mean a box to it.
    tiny.data["annotations"][1]["segmentation"].reverse()
    tiny.refused("fewer than 3 points", masks=True)


BOXES = ((3, 2, 18, 9), (30, 20, 22, 25), (5, 30, 12, 14), (40, 1, 20, 12), (22, 8, 9, 30))


def fill(tiny: TinySet, masks: str = "polygon") -> list[dict]:
    """One object for each of ``BOXES``, its mask right; returns the annotations."""
    tiny.data["annotations"] = [
        tiny.annotation(i, 1 + i % 3, 1 if i % 2 else 90, box) for i, box in enumerate(BOXES, 1)
    ]
    if masks == "rle":
        for a in tiny.data["annotations"]:
            a["segmentation"] = encoded(rectangle(*a["bbox"]))
            a["area"] = a["bbox"][2] * a["bbox"][3]
    return tiny.data["annotations"]


def swapped(polygon: list) -> list:
    return [value for x, y in zip(polygon[::2], polygon[1::2], strict=True) for value in (y, x)]


def row_by_row(segmentation: dict) -> dict:
    """What a tool writes that counts pixels along rows."""
    mask = mask_util.decode(segmentation)
    return encoded(mask.reshape(WIDTH, HEIGHT).T)


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_masks_that_fit_their_boxes_pass(tiny, kind):
    fill(tiny, kind)
    assert tiny.check(masks=True).warnings == tiny.check(masks=False).warnings == ()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    "wrong, advice",
    [
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "hold the centre"),
        (lambda x, y, w, h: [x, y, x + w, y + h], "hold corners"),
        (lambda x, y, w, h: [y, x, h, w], "x and y seem to be swapped"),
        (lambda x, y, w, h: [x + 14, y + 13, w, h], "correct 'bbox' or 'segmentation'"),
    ],
)
def test_boxes_most_of_which_contradict_their_masks(tiny, wrong, advice, masks):
    for a in fill(tiny):
        a["bbox"] = wrong(*a["bbox"])
        a["area"] = 1
    message = tiny.refused(advice, "contradict their masks", "first: ", masks=masks)
    assert sum("contradict their masks" in line for line in message.splitlines()) == 1


def test_masks_with_x_and_y_swapped(tiny):
    for a in fill(tiny):
        a["segmentation"] = [swapped(p) for p in a["segmentation"]]
    tiny.refused_once("(5 of 5) contradict", "x and y seem to be swapped", masks=False)


def test_masks_counted_along_rows(tiny):
    anns = fill(tiny, "rle")
    right = [a["segmentation"] for a in anns]
    for a in anns:
        a["segmentation"] = row_by_row(a["segmentation"])
    for masks in (True, False):
        tiny.refused_once("contradict their masks", masks=masks)
    for i in (0, 1, 3, 4):
        anns[i]["segmentation"] = right[i]
    tiny.refused_once("hardly overlap their box", "(1 in all, first: 3)", masks=True)


def test_a_mask_with_a_stray_pixel_in_its_box(tiny):
    """Its extent holds the box, its pixels are elsewhere."""
    anns = fill(tiny, "rle")
    anns[0]["segmentation"] = encoded(rectangle(40, 30, 20, 15) | rectangle(4, 4, 1, 1))
    tiny.refused_once("hardly overlap their box", "(1 in all, first: 1)", masks=True)
    anns[0]["segmentation"] = encoded(rectangle(3, 2, 18, 9) | rectangle(50, 40, 1, 1))
    tiny.warned("not those of their masks", "(1 in all, first: 1)", masks=True)


def test_some_masks_of_another_object(tiny):
    anns = fill(tiny)
    anns[0]["segmentation"], anns[3]["segmentation"] = (
        anns[3]["segmentation"],
        anns[0]["segmentation"],
    )
    tiny.refused_once("hardly overlap their box", "(2 in all, first: 1, 4)", masks=True)
    tiny.warned("not those of their masks", "(2 in all, first: 1, 4)", masks=False)


@pytest.mark.parametrize("masks", [True, False])
def test_a_box_somewhat_off_is_a_warning_with_its_id(tiny, masks):
    anns = fill(tiny)
    anns[1]["bbox"] = [26, 16, 26, 29]  # IoU 0.73
    tiny.warned("not those of their masks", "(1 in all, first: 2)", masks=masks)
    anns[1]["bbox"] = [28, 18, 24, 27]  # two pixels are rounding
    assert tiny.check(masks=masks).warnings == ()
    for a in anns:  # boxes of whole objects around masks of what is visible
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, min(1.5 * w, WIDTH - x), h]
    assert all("not those of their masks" in w for w in tiny.check(masks=masks).warnings)


@pytest.mark.parametrize("shift", [(60, 0), (0, 20), (-18, 0), (0, -45), (500, 0), (0, -500)])
def test_a_mask_outside_its_image(tiny, shift):
    """Oracle: pycocotools finds no pixel of it in the image."""
    anns = fill(tiny)
    x, y, w, h = anns[2]["bbox"]
    right, down = shift
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    anns[2]["segmentation"] = [[v + (down if i % 2 else right) for i, v in enumerate(corners)]]
    if max(map(abs, shift)) < 100:
        tiny.write()
        coco = COCO(str(tiny.path))
        assert not coco.annToMask(coco.anns[3]).any()
    tiny.refused_once("masks outside their image", "(1 in all, first: 3)", masks=True)
    tiny.warned("not those of their masks", "(1 in all, first: 3)", masks=False)


def test_a_mask_with_a_point_far_outside_its_image(tiny):
    """To rasterise it would take the memory of many images."""
    fill(tiny)[4]["segmentation"][0][0] = -1000.0
    tiny.refused_once("with points far outside", "(1 in all, first: 5)", masks=True)
    tiny.warned("not those of their masks", "(1 in all, first: 5)", masks=False)


LINES = {
    "line": [[3, 2, 21, 2, 3, 2]],
    "diagonal": [[3, 2, 21, 11, 12, 6.5]],
    "sliver": [[3, 2.1, 21, 2.1, 21, 2.2, 3, 2.2]],
    "point": [[7.4, 3.4, 7.5, 3.4, 7.5, 3.5]],
    "two": [[3, 2, 21, 2, 3, 2], [3, 11, 21, 11, 3, 11]],
}
THIN = {
    "row": [[3, 2, 21, 2, 21, 3, 3, 3]],
    "bow tie": [[3, 2, 21, 11, 21, 2, 3, 11]],  # its two halves cancel in a signed area
    "one of two": [[3, 2, 21, 2, 3, 2], [3, 2, 21, 2, 21, 11]],
}


@pytest.mark.parametrize("segmentation", [*LINES.values(), *THIN.values()], ids=[*LINES, *THIN])
def test_masks_that_cover_no_pixel(tiny, segmentation):
    """Oracle: pycocotools, which rasterises for both engines and the evaluation."""
    anns = fill(tiny)
    anns[0]["segmentation"] = segmentation
    tiny.write()
    coco = COCO(str(tiny.path))
    empty = not coco.annToMask(coco.anns[1]).any()
    warnings = [w for w in tiny.check(masks=True).warnings if "cover no pixel" in w]
    assert empty == (segmentation in LINES.values()) == bool(warnings)
    assert all("(1 in all, first: 1)" in w for w in warnings)
    assert not [w for w in tiny.check(masks=False).warnings if "no pixel" in w]


def test_rle_without_a_pixel(tiny):
    anns = fill(tiny, "rle")
    anns[3]["segmentation"] = encoded(np.zeros((HEIGHT, WIDTH)))
    tiny.warned("cover no pixel", "(1 in all, first: 4)", masks=True)
    for a in anns:
        a["segmentation"] = anns[3]["segmentation"]
    tiny.refused_once("no mask covers a pixel", masks=True)
    assert tiny.check(masks=False).warnings == ()


def test_polygons_in_fractions_of_the_image(tiny):
    for a in fill(tiny):
        a["segmentation"] = [
            [v / (HEIGHT if i % 2 else WIDTH) for i, v in enumerate(p)] for p in a["segmentation"]
        ]
    tiny.refused_once("fractions of the image", masks=True)
    tiny.warned("fractions of the image", masks=False)


def test_a_mask_beside_a_box_that_is_refused_for_itself_is_not_compared(tiny):
    anns = fill(tiny)
    anns[0]["bbox"], anns[1]["bbox"] = [3, 2, -18, 9], [3, "2", 18, 9]
    message = tiny.refused("negative width or height", "not four finite numbers", masks=True)
    assert len(message.splitlines()) == 2


def test_crowd_regions_are_not_compared(tiny):
    """Their boxes are of no use to training, and evaluation takes their masks."""
    anns = fill(tiny)
    anns.append(tiny.annotation(9, 1, 1, (40, 30, 9, 9), iscrowd=1))
    anns[-1]["segmentation"] = encoded(rectangle(0, 0, 20, 20))
    assert tiny.check(masks=True).warnings == ()


def test_ids_of_any_size_are_named(tiny):
    anns = fill(tiny)
    anns[0] |= {"id": 2**70 + 1, "bbox": [40, 30, 18, 9]}
    assert str(2**70 + 1) in tiny.refused("hardly overlap", masks=True)
    assert json.loads(tiny.path.read_text())["annotations"][0]["id"] == 2**70 + 1
