"""How many operations a norm dispatches: exact counts, and what counts as one."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kernels  # noqa: E402
from counting import (  # noqa: E402
    DispatchCounter,
    count_steps,
    layer_counts,
    over_batchnorm,
)
from cuda_branch import cuda_branch  # noqa: E402
from detector import detector_step  # noqa: E402
from workloads import stack_workload, training_step  # noqa: E402

# operations a layer and iteration over BatchNorm: (full windows, in burn-in), at most
MOST = {
    "GN": (-1, -1),
    "BGN": (10, 10),
    "BRN": (15, 6.25),
    "MBN(double_forward=False)": (14, 3),
    "MBN": (26.5, 3),
    "CBN": (23, 3),
    "CBN(positions=None)": (26, 3),
    "KN": (38, 38),
    "GKN": (55, 55),
    "GN+WS": (22, 22),
}


@pytest.fixture(scope="module")
def batchnorm() -> Counter[str]:
    return layer_counts("BN")


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with cuda_branch():
        yield


@pytest.mark.parametrize("norm", MOST)
def test_a_norm_dispatches_no_more_than_this(norm: str, batchnorm: Counter[str]) -> None:
    full, early = MOST[norm]
    assert over_batchnorm(layer_counts(norm), batchnorm) <= full
    assert over_batchnorm(layer_counts(norm, in_burn_in=True), batchnorm) <= early


def test_gkn_is_groupnorm_where_nothing_is_predicted() -> None:
    """To the last operation: the maps are read for no statistics that are not used."""
    counts = []
    for norm in ("GN", "GKN"):
        step = stack_workload(norm, 1, (2, 32, 8, 8), "cpu").step
        step()
        counts.append(count_steps(step, 1))
    assert counts[0] == counts[1]


def test_what_counts_as_an_operation() -> None:
    x = torch.ones(2, 3)
    with DispatchCounter() as counter:
        x.detach().view(6)[1:].split(2)  # views
        x.t().add_(1.0)  # writes to one
        torch._foreach_mul_([x, x[0]], 2.0)  # returns nothing; x[0] is a view
        x.sum().item()  # the second is a host read
    assert counter.counts == {
        "aten.add_.Tensor": 1,
        "aten._foreach_mul_.Scalar": 1,
        "aten.sum.default": 1,
        "aten._local_scalar_dense.default": 1,
    }


def test_backward_and_step_are_counted() -> None:
    """A convolution and a BatchNorm, by hand."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
    step = training_step(model, torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3))
    step()  # the optimiser's buffers
    counts = count_steps(step, 3)
    once = ("convolution.default", "convolution_backward.default", "native_batch_norm.default")
    for name in (*once, "native_batch_norm_backward.default"):
        assert counts[f"aten.{name}"] == 3
    assert counts["aten._foreach_add_.List"] == 6  # momentum and weights


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_counts_are_those_of_the_meta_device_and_of_other_sizes(norm: str) -> None:
    def counts(device: str, size: int) -> Counter[str]:
        step = stack_workload(norm, 2, (2, 32, size, size), device).step
        step()
        return count_steps(step, 1)

    usual = counts("cpu", 8)
    assert counts("cpu", 16) == usual
    assert counts("meta", 8).total() == usual.total()


@pytest.mark.detectron2
def test_a_detectors_steps_are_alike_and_have_the_norm_where_they_say() -> None:
    model, step = detector_step("BN", "fpn_and_head", rois=4)
    named = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # laterals and outputs of four levels, and four convolutions of the head
    assert len(named) == 12
    assert all(name.startswith(("backbone.fpn_", "roi_heads.box_head.")) for name in named)
    step()
    counts = count_steps(step, 1)
    assert counts["aten.native_batch_norm_backward.default"] == 12
    assert count_steps(step, 1) == counts


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "layer.csv"
    assert kernels.main(["layer", "--norms", "BGN", "--operations", "--out", str(path)]) == 0
    with open(path, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["norm"] == "BGN" and float(row["a layer over BN"]) <= MOST["BGN"][0]
    assert row["torch"] == torch.__version__
    assert "aten.rsqrt_.default" in capsys.readouterr().out


def test_an_unknown_norm_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["layer", "--norms", "CBM"])
    assert "unknown norm 'CBM'" in capsys.readouterr().err
