"""Class names on pictures are letters, not the boxes that fonts draw for what they lack."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cbn_det.data import lettering
from cbn_det.data.lettering import Lettering, drawable_names

LATIN, GERMAN, CHINESE = ["cat", "dog"], ["Katze", "Läufer"], ["cat", "细胞", "核"]


def drawn(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    image = Image.new("L", (60, 40))
    ImageDraw.Draw(image).text((5, 5), text, fill=255, font=font)
    return image.tobytes()


@pytest.fixture
def fonts(monkeypatch):
    """Which of the fonts are installed."""

    def only(*names: str | None) -> None:
        monkeypatch.setattr(lettering, "_FONTS", names)

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
    assert written.drawable("cat 细.png") == "cat ?.png"


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


def test_only_what_is_not_drawn_becomes_a_number():
    assert drawable_names(["a", "b", "ab"], lambda name: "b" not in name) == [
        "a",
        "class 1",
        "class 2",
    ]


@pytest.mark.detectron2
def test_pictures_of_detectron2_have_a_glyph_for_each_letter():
    """Oracle: matplotlib warns of each glyph that it draws a box for."""
    import torch
    from detectron2.data.catalog import Metadata
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.visualizer import Visualizer

    from cbn_det.plugin.pictures import _drawable

    names = ["Läufer", "細胞核", "кот"]
    found = Instances((40, 60), pred_boxes=Boxes(torch.tensor([[5.0, 5, 30, 30]] * 3)))
    found.scores, found.pred_classes = torch.ones(3), torch.arange(3)

    def missing(metadata: Metadata) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            image = np.zeros((40, 60, 3), dtype=np.uint8)
            Visualizer(image, metadata).draw_instance_predictions(found).get_image()
        return [str(w.message) for w in told if "Glyph" in str(w.message)]

    metadata = Metadata(name="letters", thing_classes=names)
    assert missing(metadata)
    drawable = _drawable(metadata)
    assert not missing(drawable)
    assert drawable.thing_classes == ["Läufer", "class 1", "кот"] and drawable.name == "letters"
    assert metadata.thing_classes == names
    assert _drawable(Metadata(name="nothing")).get("thing_classes") is None


def test_worst_images_with_chinese_names(tmp_path: Path, fonts):
    """The same picture as with the numbers for names."""
    import json

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
        write_worst_images(tmp_path / "made.json", tmp_path / "set.json", tmp_path, path)
        sheets.append(np.asarray(Image.open(path)))
    assert np.array_equal(*sheets)
