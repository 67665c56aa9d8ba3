"""Bad input is refused before training, with the file, the id and the fix; COCO's quirks pass."""

from __future__ import annotations

import copy
import json
import re

import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny_set import tiny_set

from cbn_det.data import DataError, check_coco, image_check

tiny = tiny_set


def test_a_good_set_with_gaps_and_an_empty_image(tiny):
    report = tiny.check(masks=True)
    assert report.num_images == 3 and report.num_images_without_objects == 1
    assert report.num_annotations == 2 and report.num_crowd == 0
    assert report.num_objects == {"person": 1, "toothbrush": 1}
    assert report.class_names == ["person", "toothbrush"]
    assert report.num_images_decoded == 3
    assert report.warnings == () and not report.has_rle_masks


def test_missing_annotation_file(tmp_path):
    with pytest.raises(DataError, match="none.json' does not exist"):
        check_coco(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    "text", ['{"images": [{"id": 1, "fi', "", "not json", b"\xe4\xe4", "9" * 5000]
)
def test_not_json(tmp_path, text):
    path = tmp_path / "set.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match="set.json' is not valid JSON"):
        check_coco(path, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_whole_json_in_an_encoding_that_pycocotools_does_not_read(tiny, encoding):
    """It is not cut off, and to export it again would not help."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    tiny.path.write_bytes((mark + json.dumps(tiny.data)).encode(encoding))
    with pytest.raises(ValueError):  # UnicodeDecodeError or JSONDecodeError
        COCO(str(tiny.path))
    with pytest.raises(DataError, match="set.json' is not .*save it as UTF-8 without") as error:
        check_coco(tiny.path, tiny.images)
    assert "cut off" not in str(error.value) and "export" not in str(error.value)
    tiny.check()


@pytest.mark.parametrize("data", [[], {"images": []}, {"images": 3}, {"images": [1]}])
def test_not_coco(tiny, data):
    tiny.data = data
    tiny.refused("not in COCO format")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_list(tiny, key):
    del tiny.data[key]
    tiny.refused(f"'{key}' must be a list of objects; it is missing")


@pytest.mark.parametrize(
    "table, key",
    [("images", "file_name"), ("images", "height"), ("annotations", "bbox"), ("categories", "id")],
)
def test_missing_key_names_the_entry(tiny, table, key):
    entry = tiny.data[table][1]
    del entry[key]
    tiny.refused(
        f"entries of '{table}' without '{key}'",
        f"(1 in all, first: entry 1 (id {entry.get('id')}))",
    )


def test_entries_without_a_key_are_counted(tiny):
    tiny.data["annotations"] += [tiny.annotation(i, 3, 1, (i, 2, 9, 9)) for i in range(20, 25)]
    for a in tiny.data["annotations"][2:]:
        del a["bbox"]
    del tiny.data["annotations"][4]["category_id"]
    message = tiny.refused(
        "entries of 'annotations' without 'bbox', which",
        "(4 in all, first: entry 2 (id 20), entry 3",
        "entries of 'annotations' without 'category_id', which",
        "(1 in all, first: entry 4 (id 22))",
    )
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_repeated_id(tiny, table):
    tiny.data[table][1]["id"] = tiny.data[table][0]["id"]
    tiny.refused(f"ids repeated in '{table}'", f"(1 in all, first: {tiny.data[table][0]['id']})")


@pytest.mark.parametrize("table", ["images", "categories"])
def test_empty_list(tiny, table):
    tiny.data[table] = []
    tiny.refused(f"its list '{table}' is empty")


def test_annotation_of_an_unknown_image_or_category(tiny):
    tiny.data["annotations"] += [tiny.annotation(13, 77, 1), tiny.annotation(14, 1, 55)]
    tiny.refused(
        "'image_id' is not in 'images'",
        "annotation 13 has 77",
        "'category_id' is not in 'categories'",
        "annotation 14 has 55",
    )


def test_missing_image_files_are_counted(tiny):
    for name in ("1.jpg", "3.png"):
        (tiny.images / name).unlink()
    tiny.refused(
        "does not hold as they are listed", str(tiny.images), "2 in all", "image 1 '1.jpg'"
    )


def test_missing_image_folder(tiny):
    tiny.images = tiny.images.with_name("elsewhere")
    tiny.refused("elsewhere' does not exist")


@pytest.mark.parametrize("name", ["1.jpg", "3.png"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
def test_truncated_image(tiny, name, kept):
    path = tiny.images / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    tiny.refused("cut off or cannot be read", f"image {name[0]} '{name}'")


def test_not_an_image(tiny):
    (tiny.images / "2.jpg").write_text("<html>404</html>")
    tiny.refused("cut off or cannot be read", "image 2 '2.jpg'")


def test_only_a_sample_is_decoded_above_the_limit(tiny, monkeypatch):
    monkeypatch.setattr(image_check, "MOST_DECODED", 2)
    (tiny.images / "2.jpg").write_text("broken")
    report = tiny.check()  # evenly spaced: the first and the last
    assert report.num_images_decoded == 2
    (tiny.images / "2.jpg").unlink()
    tiny.refused("image 2 '2.jpg'")


def test_size_differs_from_the_json(tiny):
    tiny.data["images"][1]["width"] = 65
    tiny.refused("image 2 '2.jpg' is 64 x 48, listed as 65 x 48")


def test_exif_rotation_counts_as_detectron2_counts_it(tiny):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (64, 48)).save(tiny.images / "1.jpg", exif=exif)
    tiny.refused("image 1 '1.jpg' is 48 x 64")
    tiny.data["images"][0] |= {"width": 48, "height": 64}
    assert tiny.check().num_images == 3


@pytest.mark.parametrize(
    "box, text",
    [
        ([1, 2, 3], "not four finite numbers"),
        (["1", 2, 3, 4], "not four finite numbers"),
        (None, "not four finite numbers"),
        ([1, 2, float("nan"), 4], "not four finite numbers"),
        ([1, float("inf"), 3, 4], "not four finite numbers"),
        ([30, 30, -20, -20], "negative width or height"),
        ([64, 10, 5, 5], "wholly outside"),
        ([-6, 10, 5, 5], "wholly outside"),
        ([10, 48, 5, 5], "wholly outside"),
    ],
)
def test_bad_box_names_the_annotation(tiny, box, text):
    tiny.data["annotations"][1]["bbox"] = box
    line = next(line for line in tiny.refused(text).splitlines() if text in line)
    assert "(1 in all, first: 12)" in line


@pytest.mark.parametrize(
    "box, text",
    [
        ([50, 10, 20, 20], "partly outside"),
        ([-5, 10, 20, 20], "partly outside"),
        ([10, 10, 0, 20], "zero width or height"),
        ([64, 10, 0, 0], "zero width or height"),
    ],
)
def test_boxes_that_coco_handles_are_warned_about(tiny, box, text):
    tiny.place(1, *box)
    tiny.warned(text, "first: 12")


def test_rounding_at_the_border_is_not_worth_a_warning(tiny):
    tiny.place(0, 44.2, 28.5, 20, 20)
    assert tiny.check().warnings == ()


def test_boxes_in_fractions_of_the_image(tiny):
    for ann in tiny.data["annotations"]:
        ann["bbox"] = [0.1, 0.2, 0.3, 0.4]
    tiny.refused("fractions of the image")


def test_test_set_without_annotations(tiny):
    del tiny.data["annotations"]
    (warning,) = tiny.check(for_training=False).warnings
    assert "no AP" in warning


@pytest.mark.parametrize("value", [None, [], "absent"])
def test_missing_mask_matters_only_with_masks(tiny, value):
    if value == "absent":
        del tiny.data["annotations"][1]["segmentation"]
    else:
        tiny.data["annotations"][1]["segmentation"] = value
    tiny.refused("MODEL.MASK_ON", "first: 12", masks=True)
    tiny.check(masks=False)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_keys_that_evaluation_reads(tiny, key):
    del tiny.data["annotations"][1][key]
    tiny.refused(f"'{key}', which evaluation needs", "first: 12")
    tiny.check(for_evaluation=False)


@pytest.mark.parametrize("value", [None, "0", "1", [0], 2, -1, 0.5])
@pytest.mark.parametrize("for_evaluation", [True, False])
def test_crowd_that_is_neither_0_nor_1(tiny, value, for_evaluation):
    tiny.data["annotations"][1]["iscrowd"] = value
    message = tiny.refused("'iscrowd' is neither 0 nor 1", for_evaluation=for_evaluation)
    assert f"(1 in all, first: annotation 12: {value!r})" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", [0, 1, False, True, 0.0, 1.0])
def test_crowd_in_any_spelling_that_pycocotools_takes(tiny, value):
    tiny.data["annotations"].append(tiny.annotation(13, 3, 90, iscrowd=value))
    report = tiny.check(masks=True)
    assert report.num_crowd == value and report.warnings == ()


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value", ["64", None, 64.0, True, 0, -64, [64]])
def test_image_sizes_that_are_no_integers(tiny, side, value):
    tiny.data["images"][1][side] = value
    message = tiny.refused("is not a positive integer", "(1 in all, first: image 2: width ")
    assert f"{side} {value!r}" in message


@pytest.mark.parametrize("value", [None, 2, ["2.jpg"]])
def test_file_name_that_is_not_text(tiny, value):
    tiny.data["images"][1]["file_name"] = value
    tiny.refused("'file_name' is not text", "(1 in all, first: 2)")


@pytest.mark.parametrize("value", [None, [1], {"id": 1}])
def test_ids_that_nothing_can_be_looked_up_by(tiny, value):
    good = copy.deepcopy(tiny.data)
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        tiny.data = copy.deepcopy(good)
        tiny.data["annotations"][1][key] = value
        tiny.refused(f"is not in '{table}'", f"annotation 12 has {value}")
    for table in ("images", "annotations", "categories"):
        tiny.data = copy.deepcopy(good)
        tiny.data[table][1]["id"] = value
        tiny.refused(f"ids in '{table}' that are n", f"(1 in all, first: {value!r})")


def test_ids_of_images_may_be_text(tiny):
    for record in tiny.data["images"]:
        record["id"] = f"image {record['id']}"
    for ann in tiny.data["annotations"]:
        ann["image_id"] = f"image {ann['image_id']}"
    assert tiny.check(masks=True).num_images_without_objects == 1


def test_ignore_is_refused(tiny):
    tiny.data["annotations"][1]["ignore"] = 1
    tiny.refused("'ignore'", "first: 12")


def test_all_problems_are_told_at_once(tiny):
    tiny.data["annotations"][0]["bbox"] = [70, 1, 2, 2]
    (tiny.images / "2.jpg").unlink()
    message = tiny.refused("wholly outside", "does not hold as they are listed")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    "name, split, masks, images, objectless, crowd",
    [
        ("bccd", "train", False, 205, 0, 0),
        ("balloon", "val", True, 13, 0, 0),
        ("coco2017_subset", "train", True, 40, 1, 5),
        ("coco2017_subset", "val", True, 32, 2, 6),
    ],
)
def test_real_sets_pass(shared_data, name, split, masks, images, objectless, crowd):
    folder = shared_data / name
    report = check_coco(folder / f"{split}.json", folder / "images", masks=masks)
    assert report.num_images == report.num_images_decoded == images
    assert (report.num_images_without_objects, report.num_crowd) == (objectless, crowd)
    assert report.warnings == ()
    assert re.search(rf"{images} images .*{report.num_annotations} annotations", str(report))
