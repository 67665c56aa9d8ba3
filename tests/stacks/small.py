"""What the tests of this folder share: a network, data, and numpy's view of what was shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cbn_det.norms import BGN2d, DoubleForward, build_norm

#: every norm that evaluates as BatchNorm, with memory from the first iteration on
NORMS = [
    "BGN(groups=4)",
    "BRN(burn_in=0, ramp=1, r_max=2, d_max=1, momentum=0.1)",
    "CBN(burn_in=0)",
    "KN",
    "MBN(burn_in=0)",
]


class Net(nn.Module):
    """Two convolutions with a norm each, and a linear layer: [N, 3, H, W] -> [N, 4]."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), make_norm(norm), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), make_norm(norm), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_norm(norm: str) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8) if norm == "BN" else build_norm(norm, 8)


def net(norm: str, seed: int = 0) -> Net:
    """The same weights for every norm."""
    torch.manual_seed(seed)
    return Net(norm)


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def batches(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    """``count`` mini-batches of 8 images of noise, 12x12."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(8, 3, 12, 12, generator=generator) + shift for _ in range(count)]


def other_batches(count: int) -> list[Tensor]:
    """Images unlike those of :func:`batches`: what a layer remembers does not describe them."""
    return batches(count, seed=1, scale=2.0, shift=1.0)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean((2, 3)).sum(1, keepdim=True)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    """A step for each mini-batch, with MBN's second pass."""
    second = DoubleForward(model)
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        second.refresh()
    second.remove()


@contextmanager
def inputs_of_norms(model: nn.Module) -> Iterator[list[list[np.ndarray]]]:
    """What every norm of the model is given, forward by forward, in float64."""
    seen: list[list[np.ndarray]] = [[] for _ in norms_of(model)]
    handles = [
        norm.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].detach().double().numpy())
        )
        for norm, kept in zip(norms_of(model), seen, strict=True)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def moments(shown: list[np.ndarray], groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [C] of everything that was shown, those of a group in all its channels."""
    channels = np.concatenate(shown).swapaxes(0, 1).reshape(groups, -1)
    width = shown[0].shape[1] // groups
    return channels.mean(1).repeat(width), channels.var(1).repeat(width)


def distance(norm: nn.BatchNorm2d, mean: np.ndarray, var: np.ndarray) -> float:
    """How far running statistics are from the given ones: the larger of the mean's error in
    standard deviations and the log variance's, in the worst channel."""
    off = np.abs(norm.running_mean.double().numpy() - mean) / np.sqrt(var)
    log = np.abs(np.log(norm.running_var.double().numpy() / var))
    return float(max(off.max(), log.max()))


def worst_distance(model: nn.Module, seen: list[list[np.ndarray]]) -> float:
    """Of the running statistics of all norms from the moments of what they were given."""
    return max(
        distance(norm, *moments(shown, norm.groups_used if isinstance(norm, BGN2d) else 8))
        for norm, shown in zip(norms_of(model), seen, strict=True)
    )
