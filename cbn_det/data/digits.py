"""A small detection set of real handwritten digits, generated once and kept as COCO files.

The digits are those of scikit-learn's ``load_digits`` (1797 scans of 8 x 8 pixels). They are split
into a training and a validation part *before* they are pasted, so no validation image shows a
digit seen in training. Brightness, contrast, noise and background vary from image to image.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock
from PIL import Image

from ..progress import shown
from .findings import DataError

DIGITS_NAMES = ("digits_train", "digits_val")

# Part of the stamp: raise it when the generator changes, so that sets on disk are rewritten.
GENERATOR_VERSION = 2
SEED = 20170
IMAGE_SIZE = 160
DIGITS_PER_IMAGE = (2, 6)
DIGIT_SIZE = (24, 56)
VAL_FRACTION = 0.2
# A digit covered further than this by later ones would be a label that nobody can read.
MIN_VISIBLE_FRACTION = 0.7
MIN_VISIBLE_PIXELS = 40
PLACEMENT_TRIES = 30

_SPLITS = ("train", "val")


def default_root() -> Path:
    """The folder of all datasets: ``DETECTRON2_DATASETS``, or ``datasets`` where it is not set."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def digits_paths(root: str | os.PathLike | None = None) -> dict[str, tuple[Path, Path]]:
    """Maps each name of :data:`DIGITS_NAMES` to its annotation file and its image folder."""
    folder = Path(root if root is not None else default_root()) / "digits"
    return {
        name: (folder / "annotations" / f"{split}.json", folder / split)
        for name, split in zip(DIGITS_NAMES, _SPLITS, strict=True)
    }


def write_digits(
    root: str | os.PathLike | None = None, *, train_images: int = 1000, val_images: int = 150
) -> Path:
    """
    Writes the digits set below ``<root>/digits`` unless a complete one is there already.

    The set is deterministic: the same arguments give the same bytes. It appears under its name
    only when it is complete, and several processes may call this at once (one writes, the others
    wait for it).

    Args:
        root: folder of all datasets; ``None`` means :func:`default_root`.
        train_images, val_images: number of images. Image ``i`` does not depend on them.

    Returns:
        the folder ``<root>/digits``, with ``train/*.png``, ``val/*.png`` and
        ``annotations/{train,val}.json``.

    Raises:
        DataError: scikit-learn is missing, the folder cannot be written, or ``<root>/digits``
            holds something that was not written by this function.
    """
    folder = Path(root if root is not None else default_root()).absolute() / "digits"
    stamp = {
        "generator": "cbn_det digits",
        "version": GENERATOR_VERSION,
        "seed": SEED,
        "images": {"train": train_images, "val": val_images},
    }
    try:
        if _is_complete(folder, stamp):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            # Another process may have written it while this one waited for the lock.
            if not _is_complete(folder, stamp):
                _replace(folder, stamp)
    except OSError as e:
        raise DataError(
            f"cannot write the digits set below '{folder}': {e}. Set the environment variable "
            "DETECTRON2_DATASETS to a folder with space that you may write to"
        ) from e
    return folder


def _is_complete(folder: Path, stamp: dict) -> bool:
    path = folder / "stamp.json"
    return (
        path.is_file()
        and json.loads(path.read_text(encoding="utf-8")) == stamp
        and all(len(list((folder / s).glob("*.png"))) == n for s, n in stamp["images"].items())
    )


def _replace(folder: Path, stamp: dict) -> None:
    """Writes a new set beside ``folder`` and renames it into place. The lock must be held."""
    if folder.exists() and not (folder / "stamp.json").exists():
        raise DataError(
            f"'{folder}' exists but is not the digits set of cbn_det: move it away, or set "
            "DETECTRON2_DATASETS to another folder"
        )
    digits = _load_digits()
    # Fixed names: what a killed process has left behind is found and removed here.
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    for split, n in stamp["images"].items():
        _write_split(partial, split, n, *digits[split])
    (partial / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns, for each split, the digits ``[N, 8, 8]`` in [0, 1] and their labels ``[N]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DataError(
            "the digits set is made from scikit-learn's digits, and scikit-learn is not "
            'installed: pip install "cbn-det[standalone]"'
        ) from e
    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target
    rng = np.random.default_rng(SEED)
    is_val = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        chosen = rng.permutation(np.flatnonzero(labels == label))
        is_val[chosen[: round(VAL_FRACTION * len(chosen))]] = True
    return {
        "train": (images[~is_val], labels[~is_val]),
        "val": (images[is_val], labels[is_val]),
    }


def _write_split(
    folder: Path, split: str, num_images: int, digits: np.ndarray, labels: np.ndarray
) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in shown(range(num_images), f"writing digits_{split}"):
        rng = np.random.default_rng([SEED, _SPLITS.index(split), i])
        pixels, instances = _compose(rng, digits, labels)
        file_name = f"{i + 1:06d}.png"
        # The pixels are mostly noise: a higher compression level costs time and saves nothing.
        picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
        picture.save(folder / split / file_name, compress_level=1)
        images.append(
            {"id": i + 1, "file_name": file_name, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        for label, mask in instances:
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask_util.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    dataset = {
        "info": {"description": f"cbn_det digits, {split}, generator {GENERATOR_VERSION}"},
        "categories": [{"id": d + 1, "name": str(d), "supercategory": "digit"} for d in range(10)],
        "images": images,
        "annotations": annotations,
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(dataset), encoding="utf-8")


def _compose(
    rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """
    Returns one image ``[H, W, 3]`` (uint8) and its instances: label and mask of visible pixels.
    """
    image = _background(rng)
    background = image.mean(axis=(0, 1))
    placed: list[int] = []
    masks: list[np.ndarray] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1], endpoint=True)):
        chosen = rng.integers(len(digits))
        color = _digit_color(rng, background)
        for _ in range(PLACEMENT_TRIES):
            alpha = _place(rng, digits[chosen])
            mask = alpha >= 0.5
            left = [m & ~mask for m in masks]
            least = [max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * area) for area in full_areas]
            if all(m.sum() >= area for m, area in zip(left, least, strict=True)):
                break
        else:
            continue  # no room is left in this image for one more digit
        image += alpha[:, :, None] * (color - image)
        masks = [*left, mask]
        placed.append(int(labels[chosen]))
        full_areas.append(int(mask.sum()))
    return _camera(rng, image), list(zip(placed, masks, strict=True))


def _place(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Returns the opacity ``[H, W]`` in [0, 1] of the digit at a random size and place."""
    size = int(rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1], endpoint=True))
    y, x = rng.integers(0, IMAGE_SIZE - size, size=2, endpoint=True)
    smooth = _enlarge(digit, size)
    alpha = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    # A steeper ramp than the interpolation's own gives strokes with a clear edge.
    alpha[y : y + size, x : x + size] = np.clip((smooth - 0.25) / 0.4, 0, 1)
    return alpha


def _enlarge(values: np.ndarray, size: int) -> np.ndarray:
    """Cubic interpolation (a = -0.75) of float32 ``[n, n, ...]`` to ``[size, size, ...]``. Products
    are added one by one, so that every machine writes the same digits."""
    n = len(values)
    at = (np.arange(size) + 0.5) * (n / size) - 0.5
    first = np.floor(at).astype(int) - 1
    for _ in range(2):  # down, then across
        total = np.zeros((size, *values.shape[1:]), np.float32)
        for tap in range(4):
            d = np.abs(at - (first + tap))
            near, far = (1.25 * d - 2.25) * d * d + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
            weights = np.where(d <= 1, near, far).astype(np.float32)
            taken = values[np.clip(first + tap, 0, n - 1)]
            total += weights.reshape(-1, *[1] * (values.ndim - 1)) * taken
        values = total.swapaxes(0, 1)
    return values


def _background(rng: np.random.Generator) -> np.ndarray:
    """A colour, a gradient in a random direction and a smooth random texture, ``[H, W, 3]``."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = rng.uniform(50, 205, size=3)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
    slope = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    image += slope[:, :, None] * rng.uniform(0, 60, size=3).astype(np.float32)
    cells = int(rng.integers(3, 16))
    texture = rng.standard_normal((cells, cells, 3), dtype=np.float32) * rng.uniform(0, 20)
    image += _enlarge(texture.astype(np.float32), IMAGE_SIZE)
    return image


def _digit_color(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour that differs from the background by a random amount of at least 50."""
    while True:
        color = rng.uniform(0, 255, size=3).astype(np.float32)
        if np.abs(color - background).mean() >= 50:
            return color


def _camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Contrast, brightness and noise of this image; returns uint8."""
    mean = image.mean()
    image = (image - mean) * rng.uniform(0.35, 1.1) + mean + rng.uniform(-40, 40)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 16)
    return np.clip(image + noise, 0, 255).astype(np.uint8)
