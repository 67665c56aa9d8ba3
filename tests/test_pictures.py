"""The maker of pictures: letters for class names, boxes and masks where they belong."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cbn_det.data import pictures
from cbn_det.data.pictures import PALETTE, Lettering, Mark, color_of, draw
from cbn_det.data.scenes import Scenes, write_pictures

LATIN, GERMAN, CHINESE = ["cat", "dog"], ["Katze", "Läufer"], ["cat", "细胞", "核"]


def drawn(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    image = Image.new("L", (60, 40))
    ImageDraw.Draw(image).text((5, 5), text, fill=255, font=font)
    return image.tobytes()


@pytest.fixture
def fonts(monkeypatch):
    """Which of the fonts are installed."""

    def only(*names: str | None) -> None:
        monkeypatch.setattr(pictures, "_FONTS", names)

    return only


def test_plain_names_stay_in_pillows_font():
    written = Lettering(LATIN)
    assert written.names == LATIN
    assert written.font(14).getname() == ImageFont.load_default(14).getname()
    assert written.font(14).size == 14


def test_names_without_glyphs_are_numbers(fonts, caplog):
    fonts(None)
    with caplog.at_level("INFO"):
        written = Lettering(CHINESE)
    assert written.names == ["cat", "class 1", "class 2"]
    (line,) = [record.message for record in caplog.records]
    assert line.endswith("class 1 is '细胞', class 2 is '核'")


def test_a_font_with_the_glyphs_is_taken(fonts):
    """Oracle: the letters drawn, which differ from each other where the font has them."""
    pytest.importorskip("matplotlib")  # brings DejaVu
    fonts(None, "DejaVuSans.ttf", "no such font.ttf")
    written = Lettering(GERMAN)
    assert written.names == GERMAN
    font = written.font(14)
    assert len({drawn(font, letter) for letter in "äöüß\U0010ffff"}) == 5
    assert len({drawn(ImageFont.load_default(14), letter) for letter in "äöüß"}) == 1
    assert Lettering(CHINESE).names[0] == "cat"


def test_worst_images_with_chinese_names(tmp_path: Path, fonts):
    """The same picture as with the numbers for names."""
    from cbn_det.data.worst_images import write_worst_images

    fonts(None)
    Image.new("RGB", (60, 40)).save(tmp_path / "1.png")
    sheets = []
    for names in (CHINESE, ["cat", "class 1", "class 2"]):
        data = {
            "images": [{"id": 1, "file_name": "1.png", "width": 60, "height": 40}],
            "categories": [{"id": 5 * i, "name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 5, "bbox": [5, 5, 9, 9], "area": 81}
                | {"iscrowd": 0}
            ],
        }
        (tmp_path / "set.json").write_text(json.dumps(data))
        made = [{"image_id": 1, "category_id": 10, "bbox": [30, 5, 9, 9], "score": 0.9}]
        (tmp_path / "made.json").write_text(json.dumps(made))
        path = tmp_path / "sheet.png"
        write_worst_images(Scenes(tmp_path / "made.json", tmp_path / "set.json", tmp_path), path)
        sheets.append(np.asarray(Image.open(path)))
    assert np.array_equal(*sheets)


# ---- colours, boxes, masks -------------------------------------------------------------------


def luminance(color: tuple[int, ...]) -> float:
    """Relative luminance of WCAG 2, 0 to 1."""
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_fixed_and_none_is_near_white_black_or_grey():
    assert color_of(3) == PALETTE[3] == color_of(3 + len(PALETTE))
    for color in PALETTE:
        assert min(color) < 150 and max(color) - min(color) > 60
        assert colorsys.rgb_to_hsv(*(c / 255 for c in color))[1] > 0.35
    colors = np.array(PALETTE)
    distances = np.abs(colors[:, None] - colors).sum(axis=2)
    assert distances[range(len(colors) - 1), range(1, len(colors))].min() > 150, "neighbours"
    assert distances[np.triu_indices(len(colors), 1)].min() > 60


@pytest.mark.parametrize("color", PALETTE)
def test_a_name_stands_in_the_colour_that_it_is_read_best_in(color):
    """Contrast of at least 4 : 1, where 4.5 is WCAG's for small text."""
    image = Image.new("RGB", (400, 400))
    picture = np.asarray(draw(image, [Mark((50, 50, 300, 300), "HHH", color)], Lettering(["H"])))
    field = picture[34:48, 53:90].reshape(-1, 3).astype(int)
    text = (255, 255, 255) if (field == 255).all(axis=1).any() else (0, 0, 0)
    assert (field == text).all(axis=1).any() and (field == color).all(axis=1).any()
    light, dark = sorted((luminance(text), luminance(color)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4


@pytest.mark.parametrize(
    ("size", "least"), [((160, 120), 14), ((640, 480), 14), ((2000, 1500), 40)]
)
def test_a_picture_is_drawn_at_a_size_that_can_be_read(size, least):
    """The field of the name is at least as high as asked for; boxes keep their place."""
    color = PALETTE[0]
    box = [0.2 * size[0], 0.3 * size[1], 0.8 * size[0], 0.9 * size[1]]
    picture = draw(Image.new("RGB", size), [Mark(box, "name", color)], Lettering(["name"]))
    assert min(picture.size) >= 400
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.01)
    rows, columns = np.nonzero((np.asarray(picture) == color).all(axis=2))
    scale = picture.width / size[0]
    assert abs(columns.max() - scale * box[2]) <= 1 and abs(rows.max() - scale * box[3]) <= 1
    assert scale * box[1] - rows.min() >= least


def test_masks_lie_where_they_are_and_nowhere_else():
    mask = np.zeros((400, 500), dtype=bool)
    mask[100:200, 150:300] = True
    image = Image.new("RGB", (500, 400), (100, 100, 100))
    marks = [Mark((150, 100, 299, 199), "x", PALETTE[1], mask)]
    picture = np.asarray(draw(image, marks, Lettering(["x"]))).astype(int)
    inside = picture[110:190, 160:290]
    expected = 0.6 * np.array([100, 100, 100]) + 0.4 * np.array(PALETTE[1])
    assert np.abs(inside - expected).max() <= 1
    outside = picture.copy()
    outside[80:204, 145:304] = 100
    assert (outside == 100).all()


def scene(folder: Path, predictions: list[dict], images: int = 9) -> list[Path]:
    """Predictions, annotations and images as files, an object with a mask in each image."""
    for i in range(1, images + 1):
        Image.new("RGB", (400, 400), (60, 60, 60)).save(folder / f"{i}.png")
    square = [[50, 50, 150, 50, 150, 150, 50, 150]]
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 400, "height": 400}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 9, "bbox": [50, 50, 100, 100], "area": 10000}
            | {"iscrowd": 0, "segmentation": square}
            for i in range(1, images + 1)
        ],
    }
    (folder / "set.json").write_text(json.dumps(data))
    (folder / "made.json").write_text(json.dumps(predictions))
    return [folder / "made.json", folder / "set.json", folder]


def prediction(image: int, score: float, x: int = 200) -> dict:
    return {"image_id": image, "category_id": 4, "bbox": [x, 200, 20, 20], "score": score}


def test_pictures_are_of_evenly_spaced_images_and_sure_predictions(tmp_path):
    made = [prediction(1, 0.9), prediction(1, 0.4, x=300)]
    made += [prediction(3, 0.1 * i, x=40 * i) for i in range(1, 5)]
    files = scene(tmp_path, made)
    paths = write_pictures(Scenes(*files), tmp_path / "pictures")
    assert [path.name for path in paths] == ["1.png", "3.png", "5.png", "7.png"]
    first, second, third, _ = (np.asarray(Image.open(path)) for path in paths)
    assert first.shape == (400, 800, 3)
    a, b = color_of(0), color_of(1)  # by the order of category ids
    assert tuple(first[200, 210]) == a, "the sure prediction's upper edge"
    assert tuple(first[219, 310]) == (60, 60, 60), "the unsure one is left out"
    assert [tuple(second[219, 40 * i + 10]) == a for i in range(1, 5)] == [False, True, True, True]
    assert (third[:, :400] == 60).all(), "nothing was predicted"
    assert tuple(first[50, 500]) == b, "the annotation's upper edge, on the right"
    assert tuple(first[100, 500]) == (60, 60, 60), "no masks where none are predicted"


def test_masks_of_both_sides_are_drawn_where_some_are_predicted(tmp_path):
    import pycocotools.mask as mask_util

    pixels = np.zeros((400, 400), dtype=np.uint8, order="F")
    pixels[200:300, 200:300] = 1
    rle = mask_util.encode(pixels)
    made = prediction(1, 0.9) | {"bbox": [200, 200, 100, 100]}
    made["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    (path,) = write_pictures(
        Scenes(*scene(tmp_path, [made], images=1)), tmp_path / "pictures", count=1
    )
    picture = np.asarray(Image.open(path)).astype(int)
    for at, label in (((250, 250), 0), ((100, 500), 1)):
        expected = 0.6 * 60 + 0.4 * np.array(color_of(label))
        assert np.abs(picture[at] - expected).max() <= 1


def test_no_predictions_at_all_is_a_picture_of_annotations(tmp_path):
    """detectron2 writes no file then."""
    made, annotations, images = scene(tmp_path, [], images=1)
    made.unlink()
    (path,) = write_pictures(Scenes(made, annotations, images), tmp_path / "pictures", count=1)
    assert (np.asarray(Image.open(path))[:, :400] == 60).all()
