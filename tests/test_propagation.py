"""Moments of activations of a Gaussian, against integrals in numpy, draws, finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cbn_det.norms.propagation import activated

ERF = np.vectorize(math.erf)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


#: by operation: its options, the function in numpy, the error allowed, in the larger of the input's
#: standard deviation and 1
ACTIVATIONS = {
    "Relu": ((), lambda x: np.maximum(x, 0.0), 1e-7),
    "LeakyRelu": ((0.1,), lambda x: np.where(x > 0, x, 0.1 * x), 1e-7),
    "Silu": ((), lambda x: x * sigmoid(x), 1e-6),
    "Mish": ((), lambda x: x * np.tanh(np.logaddexp(0.0, x)), 1e-6),
    "Gelu": (("none",), lambda x: 0.5 * x * (1.0 + ERF(x / math.sqrt(2.0))), 1e-6),
    "Hardswish": ((), lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0, 5e-3),
    "Hardtanh": ((0.0, 6.0), lambda x: np.clip(x, 0.0, 6.0), 5e-3),
    "Elu": ((0.5, 1.0, 1.0), lambda x: np.where(x > 0, x, 0.5 * np.expm1(x)), 5e-3),
}
TORCH = {
    "LeakyRelu": lambda x: F.leaky_relu(x, 0.1),
    "Silu": F.silu,
    "Mish": F.mish,
    "Gelu": F.gelu,
    "Hardswish": F.hardswish,
    "Hardtanh": F.relu6,
    "Elu": lambda x: F.elu(x, 0.5),
}
MEANS = np.array([-6.0, -3.0, -1.1, -0.2, 0.0, 0.7, 2.0, 3.05, 6.0, 9.0])
STDS = np.array([1e-3, 0.1, 0.5, 1.0, 2.0, 4.0])
GRID = [np.repeat(MEANS, len(STDS)), np.tile(STDS, len(MEANS))]


@pytest.mark.parametrize("operation", ACTIVATIONS)
def test_moments_equal_integrals(operation):
    options, function, allowed = ACTIVATIONS[operation]
    nodes = np.linspace(-10.0, 10.0, 40_001)
    weights = np.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    mean, std = GRID
    values = function(mean[:, None] + std[:, None] * nodes)
    first = values @ weights
    second = np.sqrt(((values - first[:, None]) ** 2) @ weights)
    found = activated(*map(torch.from_numpy, (mean, std**2)), operation, options)
    unit = np.maximum(std, 1.0)
    assert (np.abs(found[0].numpy() - first) / unit).max() < allowed
    assert (np.abs(found[1].sqrt().numpy() - second) / unit).max() < allowed


@pytest.mark.parametrize("operation", TORCH)
def test_moments_equal_draws_of_torchs_function(operation):
    torch.manual_seed(0)
    mean, std = torch.tensor([-2.0, -0.3, 0.5, 3.0]), torch.tensor([1.0, 0.4, 2.0, 1.5])
    draws = TORCH[operation](mean + std * torch.randn(400_000, 4))
    first, second = activated(mean, std.square(), operation, ACTIVATIONS[operation][0])
    torch.testing.assert_close(first, draws.mean(0), rtol=0.01, atol=0.005)
    torch.testing.assert_close(second.sqrt(), draws.std(0), rtol=0.01, atol=0.005)


@pytest.mark.parametrize("operation", ["LeakyRelu", "Silu", "Mish", "Gelu"])
def test_gradients(operation):
    options = ACTIVATIONS[operation][0]
    mean, var = (torch.tensor(v, dtype=torch.double) for v in ([-2.0, 0.3, 1.0], [0.5, 2.0, 1.0]))
    assert torch.autograd.gradcheck(
        lambda m, v: activated(m, v, operation, options),
        [mean.requires_grad_(), var.requires_grad_()],
    )


@pytest.mark.parametrize("operation", ACTIVATIONS)
def test_gradients_are_finite_where_nothing_varies(operation):
    mean = torch.tensor([0.0, 0.0, 3.0, -40.0, 1e4], requires_grad=True)
    scale = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], requires_grad=True)
    moments = activated(mean, scale**2, operation, ACTIVATIONS[operation][0])
    sum(t.sum() for t in moments).backward()
    assert mean.grad.isfinite().all() and scale.grad.isfinite().all()
