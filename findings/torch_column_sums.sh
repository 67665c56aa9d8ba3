#!/bin/sh
# The sum over the first dimension of a matrix has other bits for the same column at another place.
#
# torch 2.14.1, on a CPU, one thread. Expected: every column is added up from top to bottom, so its
# sum does not depend on what stands beside it. Seen, of [50, 103] float32: after rolling the
# columns by 5 up to nine of the last twelve have other sums; those by cumsum(0)[-1] are the same.
# What several layers compute side by side in one tensor differs by it from what each computes
# alone.
set -eu
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
python3 -m pip install --quiet --target "$packages" torch==2.14.1 numpy
PYTHONPATH="$packages" python3 - <<'END'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(50, 103)
rolled = x.roll(5, 1)
sums = (x.sum(0) != rolled.sum(0).roll(-5)).nonzero().flatten().tolist()
running = (x.cumsum(0)[-1] != rolled.cumsum(0)[-1].roll(-5)).nonzero().flatten().tolist()
print(f"torch {torch.__version__}: columns whose sum has changed {sums}, by cumsum {running}")
assert torch.__version__.startswith("2.14.1"), "another version than the one this is about"
assert sums and min(sums) > 90 and not running, "it has changed: sums do not depend on the place"
END
