"""Ratios of times that were taken in turn, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

#: repetitions below which no interval for a median reaches the confidence
FEWEST = 6


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and an interval that holds the true median with `CONFIDENCE`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The ratio of two lists of times, the i-th of both taken one shortly after the other.

    What disturbs a machine for longer than a repetition takes disturbs both times of a pair, and
    what disturbs a single time is an outlier, which a median ignores.

    Raises:
        ValueError: lists of different length, or shorter than `FEWEST`.
    """
    ratios = [time / base for time, base in zip(times, reference, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A `CONFIDENCE` interval for the median of what the values are drawn from, whatever its
    distribution: the k-th smallest and the k-th largest value, with k as large as may be. (How many
    of n values lie below the true median is binomial, n times one half.)

    Raises:
        ValueError: fewer than `FEWEST` values.
    """
    n = len(values)
    if n < FEWEST:
        raise ValueError(f"{n} repetitions: an interval needs {FEWEST} or more")
    outside, k = 0.0, 0  # probability that fewer than k values lie below the true median
    while True:
        outside += math.comb(n, k) / 2**n
        if 2 * outside > 1 - CONFIDENCE:
            break
        k += 1
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]
