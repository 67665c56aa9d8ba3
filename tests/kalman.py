"""Kalman Normalization written out with autograd, for small networks; shares nothing with the
package. Raw second moments, dense weights, every dependence kept. Last, a check of both norms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    a = mean / var.sqrt()
    below = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    first = mean * below + var.sqrt() * density
    second = (mean * mean + var) * below + mean * var.sqrt() * density
    return first, second - first * first


def dense(weight: Tensor, groups: int) -> Tensor:
    """[C_out, C_in, kh, kw] with zeros between groups."""
    blocks = [torch.zeros(0)] * groups
    rows = []
    for g, part in enumerate(weight.chunk(groups)):
        blocks = [torch.zeros_like(part) for _ in range(groups)]
        blocks[g] = part
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows)


def convolved(mean: Tensor, var: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    weight = dense(conv.weight, conv.groups)
    bias = 0.0 if conv.bias is None else conv.bias
    return (
        torch.einsum("oiab,...i->...o", weight, mean) + bias,
        torch.einsum("oiab,...i->...o", weight**2, var),
    )


def mixed(p: Tensor | float, predicted: tuple, observed: tuple) -> tuple[Tensor, Tensor]:
    (m1, v1), (m2, v2) = predicted, observed
    mean = p * m1 + (1 - p) * m2
    return mean, p * (v1 + m1**2) + (1 - p) * (v2 + m2**2) - mean**2


def batch_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.mean((0, 2, 3)), (y - y.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))


def group_statistics(y: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[N, groups] each."""
    flat = y.reshape(len(y), groups, -1)
    mean = flat.mean(2)
    return mean, (flat - mean[..., None]).square().mean(2)


def of_groups(pair: tuple[Tensor, Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """A prediction for channels, [..., C], as one for groups, [N or 1, groups]."""
    mean, var = (t.reshape(-1, groups, t.shape[-1] // groups) for t in pair)
    first = mean.mean(2)
    return first, (var + mean**2).mean(2) - first**2


def spread(values: Tensor, channels: int) -> Tensor:
    """[N, groups] to [N, C]."""
    return values.repeat_interleave(channels // values.shape[1], 1)


class Kalman:
    """One layer, called as ``(y, prediction)`` with a prediction for its channels, or None."""

    def __init__(self, norm: nn.Module, gain: float, groups: int | None = None):
        self.norm, self.gain, self.groups = norm, gain, groups

    def __call__(self, y: Tensor, prediction: tuple | None) -> Tensor:
        channels = y.shape[1]
        if self.groups is None:
            observed = batch_statistics(y)
        else:
            observed = group_statistics(y, self.groups)
            prediction = prediction and of_groups(prediction, self.groups)
        mean, var = observed if prediction is None else mixed(self.gain, prediction, observed)
        if self.groups is not None:
            mean, var = spread(mean, channels), spread(var, channels)
        #: of the input: what the authors' code hands on, whose output is another quantity
        self.estimate = mean, var
        view = (-1, channels, 1, 1)
        y = (y - mean.reshape(view)) / (var.reshape(view) + self.norm.eps).sqrt()
        return y * self.norm.weight.view(view) + self.norm.bias.view(view)

    @property
    def handed(self) -> tuple[Tensor, Tensor]:
        """The distribution of the output."""
        return self.norm.bias, self.norm.weight**2


def checkpointed_after_one_iteration_without(
    model: nn.Module, images: Callable[[int], Tensor]
) -> nn.Module:
    """A copy of ``model`` (norms norm1 to norm3) that was run under re-entrant checkpoints, having
    seen that its first iteration has no prediction and those after it are ``model``'s."""
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    for norm in (plain.norm1, plain.norm2, plain.norm3):
        norm.gain = 0.0
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    for t in range(3):
        # two forwards before their backward passes: each must give the same twice
        zs = [images(2 * t + k).requires_grad_() for k in range(2)]
        outs = [checkpoint(twin, z, use_reentrant=True) for z in zs]
        reference = plain if t == 0 else model
        for z, out in zip(zs, outs, strict=True):
            x = z.detach().clone().requires_grad_()
            expected = reference(x)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
            (grad,) = torch.autograd.grad(expected.pow(3).sum(), x)
            out.pow(3).sum().backward()
            torch.testing.assert_close(z.grad, grad, rtol=1e-8, atol=1e-10)
        optimizer.step()
    return twin
