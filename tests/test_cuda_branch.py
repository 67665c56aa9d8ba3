"""What norms do on CUDA, on a machine without one: SyncBatchNorm's kernels are stood in for, and on
torch's meta device, where there are no numbers, a read of one raises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import same_numbers  # noqa: E402
from counting import count_steps, set_schedule  # noqa: E402
from cuda_branch import cuda_branch  # noqa: E402
from test_kernels import MOST  # noqa: E402
from test_same_numbers import RECORD  # noqa: E402
from workloads import stack_workload  # noqa: E402

from cbn_det.norms import functional  # noqa: E402
from cbn_det.norms.normalization import normalize  # noqa: E402

# meta has no random state, which a second pass restores
NORMS = [norm for norm in MOST if norm not in ("GN", "MBN")]


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_after_burn_in_waits_for_no_number(norm: str) -> None:
    with cuda_branch():
        work = stack_workload(norm, 2, (2, 64, 8, 8), "meta")
        for _ in range(set_schedule(work.model) + 1):
            work.step()


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_that_deterministic_algorithms_refuse(norm: str) -> None:
    """torch names cumsum, of numbers that are not whole, among those that raise on CUDA."""
    with cuda_branch():
        work = stack_workload(norm, 2, (2, 64, 8, 8), "meta")
        for _ in range(set_schedule(work.model)):
            work.step()
        assert not [name for name in count_steps(work.step) if "cumsum" in name]


# autograd takes mv on a CPU for KN's where it takes a sum on meta
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "KN" not in norm])
def test_the_meta_device_dispatches_what_a_cpu_does(norm: str) -> None:
    counts = []
    with cuda_branch():
        for device in ("cpu", "meta"):
            work = stack_workload(norm, 2, (2, 64, 8, 8), device)
            for _ in range(2 * set_schedule(work.model)):  # constants are made once a device
                work.step()
            counts.append(count_steps(work.step).total())
    assert counts[0] == counts[1]


CASES = [case for case in same_numbers.CASES if not case.autocast]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_branches_give_the_same_numbers(case: same_numbers.Case) -> None:
    with cuda_branch():
        found = same_numbers.deviations(same_numbers.train(case), RECORD[case.name])
    assert found.pop("losses") <= case.losses
    assert max(found.values()) <= case.state


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_the_gradient_is_that_of_the_other_branch(
    share: float, channels_last: bool, dtype: torch.dtype, affine: bool
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 6, 5, 4, dtype=dtype).to(memory_format=layout)
    grad = torch.randn_like(x)
    leaves = [nn.Parameter(torch.rand(6) + 0.5) for _ in range(2)] if affine else []

    def run() -> tuple[torch.Tensor, ...]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        batch = functional.moments(leaf)
        estimate = functional.Estimate(batch.mean, batch.var, share)
        out = normalize(leaf, estimate, *(leaves or [None, None]), 1e-5)
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
        return out, *torch.autograd.grad(out, [leaf, *leaves], grad)

    expected = run()
    with cuda_branch():
        found = run()
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **tolerance)
