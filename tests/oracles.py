"""Slow, plain reference code that shares nothing with the package: numpy float64, or autograd."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def conv_patches(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """Every input patch of a convolution, [groups, N, H_out, W_out, d], cut out by hand."""
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    elif conv.padding == "valid":
        pads = [(0, 0), (0, 0)]
    else:
        pads = [(p, p) for p in conv.padding]
    x = np.pad(x, [(0, 0), (0, 0), *pads], mode=PAD_MODES[conv.padding_mode])
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    per_group = x.shape[1] // conv.groups
    out = np.empty((conv.groups, x.shape[0], height, width, per_group * kh * kw))
    for i in range(height):
        for j in range(width):
            rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
            cols = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
            cut = x[:, :, rows, cols]
            for g in range(conv.groups):
                group = cut[:, g * per_group : (g + 1) * per_group]
                out[g, :, i, j] = group.reshape(len(x), -1)
    return out


def conv_moments(patches: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of every output channel of a convolution without bias."""
    groups = patches.shape[0]
    flat = patches.reshape(groups, -1, patches.shape[-1])
    y = np.einsum("gmd,god->gom", flat, weight.reshape(groups, -1, patches.shape[-1]))
    y = y.reshape(weight.shape[0], -1)
    return y.mean(1), y.var(1)


class PaperCBN:
    """CBN as the paper writes it: raw second moments, remembered weights, ``autograd.grad``.

    One output per call, in the dtype of ``y``. ``push`` is called by hand after the backward pass.

    Args:
        rule: ``'max'``: ``max(nu, mu**2)`` of each entry (the paper); ``'drop'``: an entry whose
            variance is negative leaves both means of that channel, and the rest is divided by their
            number (the authors' code); ``'none'``: entries as they are.
        averaged: not the paper's: the derivative of the variance is the same for all entries, an
            exponential average of that of every 8th iteration, each with this weight, and of the
            first one remembered, along the whole way of the weight.
        step: iterations before the first one remembered.
    """

    def __init__(
        self,
        window: int,
        rule: str = "max",
        eps: float = 1e-5,
        eps_outside: bool = False,
        averaged: float | None = None,
        step: int = 0,
    ):
        self.averaged, self.step = averaged, step
        self.average: Tensor | float = 0.0  # derivative of the variance
        self.history: list = []  # of all iterations: weight, average after it
        self.entries: deque = deque(maxlen=max(window - 1, 1))
        self.enabled = window > 1
        self.rule, self.eps, self.eps_outside = rule, eps, eps_outside
        self.affected = 0  # (entry, channel) pairs that the rule changed

    def statistics(self, y: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor]:
        mus, nus = [y.mean((0, 2, 3))], [(y * y).mean((0, 2, 3))]
        now = conv.weight.detach()
        bias = 0.0 if conv.bias is None or self.rule == "none" else conv.bias
        for old in self.entries:
            mu, nu = old["mu"], old["nu"]
            delta = now - old["weight"]
            if self.averaged:
                dmu = (old["dmu"] * delta).sum((1, 2, 3))
                nu = nu + self.along_the_way(old["weight"], now) + 2 * mu * dmu
                mu = mu + dmu
            elif self.rule != "none":
                mu = mu + (old["dmu"] * delta).sum((1, 2, 3))
                nu = nu + (old["dnu"] * delta).sum((1, 2, 3))
            if self.rule == "max":
                self.affected += int((nu < mu**2).sum())
                nu = torch.maximum(nu, mu**2)
            # about the conv bias: E[(y + b)**2] = E[y**2] + 2 b E[y] + b**2
            mus.append(mu + bias)
            nus.append(nu + 2 * bias * mu + bias**2)
        mu, nu = torch.stack(mus), torch.stack(nus)
        keep = torch.ones_like(mu)
        if self.rule == "drop":
            keep = (nu - mu**2 >= 0).to(mu.dtype)
            self.affected += int((keep == 0).sum())
        count = keep.sum(0)
        mean = (mu * keep).sum(0) / count
        return mean, (nu * keep).sum(0) / count - mean**2, count

    def __call__(self, y: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var, _ = self.statistics(y, conv)
        std = var.sqrt() + self.eps if self.eps_outside else (var + self.eps).sqrt()
        return (y - _row(mean)) / _row(std) * _row(weight) + _row(bias)

    def along_the_way(self, start: Tensor, now: Tensor) -> Tensor:
        """Sum of <average derivative of the time, step of the weight> since ``start``."""
        weights = [weight for weight, _ in self.history] + [now]
        total = torch.zeros(len(now), dtype=now.dtype)
        first = max(i for i, weight in enumerate(weights[:-1]) if weight is start)
        for s in range(first, len(self.history)):
            _, average = self.history[s]
            total += (average * (weights[s + 1] - weights[s])).sum((1, 2, 3))
        return total

    def push(self, x: Tensor, conv: nn.Conv2d) -> None:
        """Remembers an iteration; ``x`` is the convolution's input, weights as they were."""
        if not self.enabled:
            return
        weight = conv.weight.detach().clone().requires_grad_()
        bias = None if self.rule != "none" or conv.bias is None else conv.bias.detach()
        y = conv._conv_forward(x.detach(), weight, bias)
        mu, nu = y.mean((0, 2, 3)), (y * y).mean((0, 2, 3))
        (dmu,) = torch.autograd.grad(mu.sum(), weight, retain_graph=True)
        (dnu,) = torch.autograd.grad(nu.sum(), weight)
        mu, nu, weight = mu.detach(), nu.detach(), weight.detach()
        self.entries.appendleft({"mu": mu, "nu": nu, "dmu": dmu, "dnu": dnu, "weight": weight})
        if self.averaged:
            estimate = dnu - 2 * _col(mu) * dmu
            if not self.history:
                self.average = estimate
            elif (self.step + len(self.history)) % 8 == 0:
                self.average = (1 - self.averaged) * self.average + self.averaged * estimate
            self.history.append((weight, self.average))


Slopes = tuple[list[Tensor], Tensor, Tensor | float]


def derivatives(y: Tensor, conv: nn.Conv2d) -> Slopes:
    """Of mean and variance of ``y = conv(x)`` by each channel's own weight, [C, d] each, by
    autograd; and weight and bias."""
    of = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    grads = [torch.autograd.grad(v.sum(), conv.weight, retain_graph=True)[0] for v in of]
    bias = 0.0 if conv.bias is None else conv.bias.detach().clone()
    return [g.flatten(1) for g in grads], conv.weight.detach().clone(), bias


def carry(running: list[Tensor], then: Slopes, conv: nn.Conv2d) -> None:
    """Takes mean and variance along to first order with the step of the weight since ``then``."""
    slopes, weight, bias = then
    step = (conv.weight.detach() - weight).flatten(1)
    for buffer, slope in zip(running, slopes, strict=True):
        buffer.add_((slope * step).sum(1))
    running[1].clamp_(min=0.0)
    if conv.bias is not None:
        running[0].add_(conv.bias.detach() - bias)


def _row(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def _col(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


def batch_norm(y: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    return (y - _row(mean)) / (_row(var) + eps).sqrt()


class MixtureEMA:
    """Running statistics kept as raw moments: what ``ema='pooled'`` promises, in numpy."""

    def __init__(self, channels: int, momentum: float = 0.1):
        self.first, self.second = np.zeros(channels), np.ones(channels)  # of mean 0 and variance 1
        self.momentum = momentum

    def update(self, mean: np.ndarray, var: np.ndarray, count: float) -> None:
        unbiased = var * count / (count - 1)
        m = self.momentum
        self.first = (1 - m) * self.first + m * mean
        self.second = (1 - m) * self.second + m * (unbiased + mean**2)

    @property
    def var(self) -> np.ndarray:
        return self.second - self.first**2


class PaperNet:
    """conv + CBN + ReLU blocks that run on :class:`PaperCBN`; parameters are those of ``net``."""

    def __init__(self, net: nn.Sequential, **options):
        self.net = net  # Sequential of (conv, norm) pairs; the norms lend their parameters only
        self.norms = [PaperCBN(**options) for _ in range(len(net) // 2)]

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs = []
        for k, reference in enumerate(self.norms):
            conv, norm = self.net[2 * k], self.net[2 * k + 1]
            self.inputs.append(x)
            x = F.relu(reference(conv(x), conv, norm.weight, norm.bias))
        return x

    def push(self) -> None:
        for k, reference in enumerate(self.norms):
            reference.push(self.inputs[k], self.net[2 * k])
