#!/bin/sh
# The variance over the first dimension of a wide matrix takes a CPU dozens of times as long as two
# means.
#
# torch 2.14.1, one thread. Expected: about the time of x.mean(0) and of (x -
# mean).square().mean(0) together. Seen, of [4, 53120] float32: var 17 to 29 ms, the two means 0.3
# to 0.4 ms, the same numbers up to rounding. A loop that combines the variances of a few mini-
# batches, channels side by side, meets it.
set -eu
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
python3 -m pip install --quiet --target "$packages" torch==2.14.1 numpy
PYTHONPATH="$packages" python3 - <<'END'
import time

import torch


def seconds(function):
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[15]


def by_means():
    return (x - x.mean(0)).square().mean(0)


torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(4, 53120)
torch.testing.assert_close(x.var(0, correction=0), by_means())
var, means = seconds(lambda: x.var(0, correction=0)), seconds(by_means)
print(f"torch {torch.__version__}: var {1e3 * var:.2f} ms, two means {1e3 * means:.2f} ms")
assert torch.__version__.startswith("2.14.1"), "another version than the one this is about"
assert var > 10 * means, "it has changed: the variance is no longer slow"
END
