#!/bin/sh
# A batched product of vectors takes a CPU many times as long, or not, by the stride of a dimension
# of length 1.
#
# torch 2.14.1, one thread. Expected: the stride of a dimension that is never stepped along does
# not matter. Seen, of [512, 1, 4608] times [512, 4608, 1]: 7 to 15 ms where the second operand is
# v.unsqueeze(2) with strides (4608, 1, 1), 0.9 ms where it is v.unsqueeze(1).mT with strides
# (4608, 1, 4608). The operands are equal, the results up to rounding. einsum('cd,cd->c') is as
# slow as the first.
set -eu
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
python3 -m pip install --quiet --target "$packages" torch==2.14.1 numpy
PYTHONPATH="$packages" python3 - <<'END'
import time

import torch


def seconds(function):
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[10]


torch.set_num_threads(1)
torch.manual_seed(0)
rows, v = torch.randn(512, 1, 4608), torch.randn(512, 4608)
slow, fast = v.unsqueeze(2), v.unsqueeze(1).mT
assert torch.equal(slow, fast)
torch.testing.assert_close(torch.bmm(rows, slow), torch.bmm(rows, fast), rtol=1e-3, atol=1e-3)
times = [seconds(lambda second=second: torch.bmm(rows, second)) for second in (slow, fast)]
einsum = seconds(lambda: torch.einsum("cd,cd->c", rows[:, 0], v))
print(f"torch {torch.__version__}: strides {slow.stride()} {1e3 * times[0]:.2f} ms,")
print(f"strides {fast.stride()} {1e3 * times[1]:.2f} ms; einsum {1e3 * einsum:.2f} ms")
assert torch.__version__.startswith("2.14.1"), "another version than the one this is about"
assert times[0] > 3 * times[1] and einsum > 3 * times[1], "it has changed: both are as fast"
END
