"""Masks as run lengths (COCO's RLE), read with numpy.

They come from a file that is not checked yet; pycocotools gets those that fill their image. Pixels
are counted column by column, as COCO counts them.
"""

from __future__ import annotations

import numpy as np

__all__ = ["extent", "num_pixels", "num_pixels_within", "runs_of"]

_MOST_DIGITS = 7  # of 5 bits: longer runs than any image's


def runs_of(segmentation: dict) -> np.ndarray | None:
    """
    The lengths of the runs, background first.

    Args:
        segmentation: with ``counts``, a list of integers or COCO's compressed text, and ``size``,
            ``[height, width]``, two positive integers.

    Returns:
        int64 ``[n]``; None where ``counts`` are something else, or do not fill the image exactly.
    """
    counts = segmentation["counts"]
    height, width = segmentation["size"]
    if isinstance(counts, list):
        if not all(type(c) is int and 0 <= c <= height * width for c in counts):
            return None
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, str):
        runs = _decompressed(counts)
    else:
        return None
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return None
    return runs


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


def _objects(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and the one after the last, of each run that is not empty background."""
    ends = runs.cumsum()
    starts, stops = ends[0::2], ends[1::2]
    starts = starts[: len(stops)]
    return starts[stops > starts], stops[stops > starts]


def num_pixels(runs: np.ndarray) -> int:
    return int(runs[1::2].sum())


def extent(runs: np.ndarray, height: int) -> tuple[int, int, int, int] | None:
    """Corners ``x1, y1, x2, y2`` around the mask's pixels; None where there are none."""
    starts, stops = _objects(runs)
    if not len(starts):
        return None
    first, last = starts // height, (stops - 1) // height  # columns
    within = first == last
    top = np.where(within, starts % height, 0).min()
    bottom = np.where(within, (stops - 1) % height, height - 1).max()
    return int(first.min()), int(top), int(last.max()) + 1, int(bottom) + 1


def num_pixels_within(runs: np.ndarray, height: int, corners: tuple[int, int, int, int]) -> int:
    """How many of the mask's pixels lie in a box of whole pixels inside the image."""
    x1, y1, x2, y2 = corners

    def before(pixel: np.ndarray) -> np.ndarray:
        """Pixels of the box that are counted before ``pixel``."""
        column, row = pixel // height, pixel % height
        whole = np.clip(column - x1, 0, x2 - x1) * (y2 - y1)
        inside = (x1 <= column) & (column < x2)
        return whole + np.where(inside, np.clip(row - y1, 0, y2 - y1), 0)

    starts, stops = _objects(runs)
    return int((before(stops) - before(starts)).sum())
