"""Image files that are there and decode, and would still be read as something else."""

from __future__ import annotations

import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_set import HEIGHT, WIDTH, tiny_set

tiny = tiny_set


def replace_first(tiny, name: str) -> Path:
    """The file of the first image, to be written under a new name."""
    (tiny.images / "1.jpg").unlink()
    tiny.data["images"][0]["file_name"] = name
    return tiny.images / name


WIDE = {
    "16-bit grey": (np.uint16, "png"),
    "16-bit grey in TIFF": (np.uint16, "tif"),
    "32-bit integers": (np.int32, "tif"),
    "32-bit float": (np.float32, "tif"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_images_that_reading_as_rgb_makes_white(tiny, kind):
    """Oracle: what Pillow's own conversion leaves of a ramp."""
    dtype, suffix = WIDE[kind]
    ramp = np.linspace(300, 60000, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(dtype)
    path = replace_first(tiny, f"a.{suffix}")
    Image.fromarray(ramp).save(path)
    with Image.open(path) as image:
        assert len(np.unique(np.asarray(image))) > 1000
        assert np.unique(np.asarray(image.convert("RGB"))).tolist() == [255]
    mode = "mode F" if dtype is np.float32 else "mode I"
    message = tiny.refused_once(f"first: image 1 'a.{suffix}': ", mode, "to 8 bits")
    assert "(1 in all" in message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_8_bits_pass(tiny, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (WIDTH, HEIGHT)).save(replace_first(tiny, f"a.{suffix}"))
    assert tiny.check().warnings == ()


def test_color_of_16_bits_passes(tiny):
    """Pillow takes the upper half of each value: nothing is cut off."""
    rows = np.zeros((HEIGHT, 1 + 6 * WIDTH), dtype=np.uint8)  # a filter byte, then 16 bits a value
    write_png(replace_first(tiny, "a.png"), rows, bits=16, color=2)
    assert tiny.check().warnings == ()


def write_png(path: Path, rows: np.ndarray, bits: int, color: int) -> None:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + end

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes()))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


def save_turned(path: Path, orientation: int) -> np.ndarray:
    """Stores an image of WIDTH x HEIGHT with an orientation tag; returns it as it is to be seen."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    pixels = pixels.repeat(16, axis=0).repeat(16, axis=1)  # which JPEG leaves nearly as it is
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        6: np.rot90(pixels, -1),
        8: np.rot90(pixels),
    }
    return turns[orientation]


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_size_is_that_of_the_image_as_shown(tiny, suffix, orientation):
    """Oracle: the image that was turned by hand."""
    path = replace_first(tiny, f"a.{suffix}")
    shown = save_turned(path, orientation)
    with Image.open(path) as image:
        read = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert read.shape == shown.shape and (suffix == "jpg" or np.array_equal(read, shown))
    height, width = shown.shape[:2]
    tiny.data["images"][0] |= {"width": width, "height": height}
    if (height, width) != (HEIGHT, WIDTH):
        tiny.data["annotations"][0]["image_id"] = 3
    assert tiny.check(reader="pillow").warnings == ()
    tiny.data["images"][0] |= {"width": width + 1}
    by_exif = " as its EXIF orientation turns it" if orientation > 1 else ""
    tiny.refused(
        f"is {width} x {height}{by_exif}, listed as {width + 1} x {height}", reader="pillow"
    )


@pytest.mark.detectron2
@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_what_detectron2_turns_twice_is_refused_for_detectron2(tiny, suffix, orientation):
    """Oracle: detectron2's own reader."""
    from detectron2.data.detection_utils import read_image

    path = replace_first(tiny, f"a.{suffix}")
    shown = save_turned(path, orientation)
    height, width = shown.shape[:2]
    tiny.data["images"][0] |= {"width": width, "height": height}
    read = read_image(str(path), "RGB")
    right = read.shape == shown.shape and np.abs(read.astype(int) - shown).mean() < 9
    assert right == (suffix != "tif" or orientation == 1)
    if right:
        assert tiny.check(reader="detectron2").warnings == ()
    else:
        tiny.refused_once("image 1 'a.tif'", "detectron2 applies once more", reader="detectron2")
        tiny.warned("image 1 'a.tif'", "use --engine standalone")


def test_a_tiff_of_five_bands_is_to_be_converted(tiny):
    """A TIFF as remote sensing writes it: one strip of 5 bytes a pixel."""
    size = WIDTH * HEIGHT * 5
    bits = struct.pack("<5H", *[8] * 5)
    tags = [  # number, type (3: 16 bits, 4: 32 bits), count, value or its place in the file
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (258, 3, 5, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8 + len(bits)),
        (277, 3, 1, 5),
        (278, 3, 1, HEIGHT),
        (279, 4, 1, size),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path = replace_first(tiny, "a.tif")
    whole = b"II*\0" + struct.pack("<I", 8 + len(bits) + size) + bits + bytes(size) + directory
    path.write_bytes(whole)
    tiny.refused_once("cannot be read as RGB of 8 bits", "or convert them", "'a.tif'")


@pytest.mark.parametrize(
    "stored, listed",
    [
        ("sub/x.jpg", "sub\\x.jpg"),
        ("x.jpg", "C:\\data\\images\\x.jpg"),
        ("x y.jpg", "x%20y.jpg"),
        ("x.jpg", "https://host.example/upload/x.jpg?size=9"),
        ("x.JPG", "x.jpg"),
        ("x.jpg", "images/x.jpg"),
        ("deeper/x.jpg", "x.jpg"),
        (unicodedata.normalize("NFC", "ü.jpg"), unicodedata.normalize("NFD", "ü.jpg")),
        (unicodedata.normalize("NFD", "ü.jpg"), unicodedata.normalize("NFC", "ü.jpg")),
    ],
)
def test_a_file_under_another_name_is_named(tiny, stored, listed):
    path = tiny.images / stored
    path.parent.mkdir(exist_ok=True)
    (tiny.images / "1.jpg").rename(path)
    tiny.data["images"][0]["file_name"] = listed
    message = tiny.refused_once(f"image 1 '{listed}' is '{stored}'", "(1 in all", "'file_name'")
    assert "write 'file_name' as the files are called" in message
    tiny.data["images"][0]["file_name"] = stored
    assert tiny.check().warnings == ()


def test_files_that_are_there_and_files_that_are_not(tiny):
    (tiny.images / "sub").mkdir()
    (tiny.images / "1.jpg").rename(tiny.images / "sub" / "1.jpg")
    tiny.data["images"][0]["file_name"] = "sub\\1.jpg"
    tiny.data["images"][1]["file_name"] = "sub\\2.png"
    message = tiny.refused_once("image 1 'sub\\1.jpg' is 'sub/1.jpg', image 2 'sub\\2.png')")
    assert "does not hold as they are listed" in message and "(2 in all" in message


def test_names_that_differ_in_case_alone_are_two_files(tiny):
    (tiny.images / "2.jpg").rename(tiny.images / "A.jpg")
    (tiny.images / "1.jpg").rename(tiny.images / "a.jpg")
    if len(list(tiny.images.iterdir())) < 3:
        pytest.skip("this disk does not tell them apart")
    tiny.data["images"][0]["file_name"] = "a.jpg"
    tiny.data["images"][1]["file_name"] = "A.jpg"
    assert tiny.check().warnings == ()


@pytest.mark.parametrize("again", ["1.jpg", "./1.jpg"])
def test_a_file_under_two_ids(tiny, again):
    tiny.data["images"].append({**tiny.data["images"][0], "id": 7, "file_name": again})
    tiny.warned("listed under several ids", "'1.jpg' is ids 1, 7")


def test_a_folder_of_images_is_listed_once(tiny, monkeypatch):
    """On a network disk each request costs a millisecond."""
    import os

    listed = []
    listdir = os.listdir
    monkeypatch.setattr("os.listdir", lambda path: listed.append(str(path)) or listdir(path))
    monkeypatch.setattr("os.path.exists", lambda path: pytest.fail("one request a file"))
    tiny.data["images"] += [{**tiny.data["images"][0], "id": i} for i in range(10, 20)]
    tiny.check()
    assert listed == [str(tiny.images)]
