"""Masks as run lengths (COCO's RLE), checked before pycocotools gets them.

They come from a file that is not checked yet; pycocotools gets those that fill their image.
"""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util

__all__ = ["checked_rle", "num_pixels_within"]

_MOST_DIGITS = 7  # of 5 bits: longer runs than any image's


def checked_rle(segmentation: dict) -> dict | None:
    """
    pycocotools' own form of a mask.

    Args:
        segmentation: with ``counts``, a list of integers or COCO's compressed text, and ``size``,
            ``[height, width]``, two positive integers.

    Returns:
        None where ``counts`` are something else, or do not fill the image exactly.
    """
    counts = segmentation["counts"]
    height, width = segmentation["size"]
    if height * width >= 2**31:  # more than pycocotools counts
        return None
    if isinstance(counts, list):
        if not all(type(c) is int and 0 <= c <= height * width for c in counts):
            return None
        if sum(counts) != height * width:
            return None
        return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    runs = _decompressed(counts) if isinstance(counts, str) else None
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return None
    return {"size": [height, width], "counts": counts.encode("ascii")}


def _decompressed(text: str) -> np.ndarray | None:
    """Each number is a row of digits of 5 bits, the lowest first, the last one with the sign; from
    the fourth on, numbers are differences to the last but one."""
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() >= 64 or digits[-1] >= 32:
        return None
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_DIGITS:
        return None
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << 5 * place, starts)
    numbers -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def num_pixels_within(mask: dict, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a mask lie in a box ``x, y, width, height`` of whole pixels."""
    boxed = mask_util.frPyObjects(np.array([box], dtype=np.float64), *mask["size"])
    return int(mask_util.area(mask_util.merge([mask, *boxed], intersect=True)))
