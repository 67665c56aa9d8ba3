"""A convolution and its norm: forward, backward, optimiser step."""

from __future__ import annotations

import runpy

import torch
from torch import nn

from ..norms import DoubleForward, build_norm, known_norms, parse_spec, resolve_burn_in
from .worker import Workload

_PLAIN = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(32, channels)}


def layer_workload(
    norm: str, shape: tuple[int, int, int, int], channels: int, kernel: int, device: str
) -> Workload:
    """
    Args:
        norm: "BN", "GN", or a norm of ours, with options or without; or "FILE.py:FUNCTION" for a
            layer of somebody else's: called with input channels, output channels and kernel size,
            the function returns a module that is convolution and norm in one.
        shape: of the convolution's input, [N, C, H, W], which needs a gradient, as behind any other
            layer.
        channels: of the convolution's output, which is as large as its input.

    Raises:
        ValueError: an unknown norm, or one that does not fit the channels.
        OSError: the file cannot be read.
    """
    torch.manual_seed(0)
    model = _conv_and_norm(norm, shape[1], channels, kernel).to(device)
    resolve_burn_in(model, 1)
    x = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape[0], channels, *shape[2:], device=device) / channels
    # weights have to move, or norms that follow them would have less to do; a little is enough
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    double_forward = DoubleForward(model)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).backward(gradient)
        optimizer.step()
        double_forward.refresh()

    return Workload(step, model, torch.device(device), {})


def _conv_and_norm(norm: str, inputs: int, channels: int, kernel: int) -> nn.Module:
    path, _, function = norm.rpartition(":")
    if path.endswith(".py"):
        found = runpy.run_path(path)
        if function not in found:
            raise ValueError(f"{path} defines no {function!r}")
        return found[function](inputs, channels, kernel)
    conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, build_layer_norm(norm, channels))


def build_layer_norm(norm: str, channels: int) -> nn.Module:
    """The norm of that name: BN, GN, or one of ours. Raises ValueError for an unknown one."""
    if norm in _PLAIN:
        return _PLAIN[norm](channels)
    name = parse_spec(norm)[0]
    if name not in known_norms():
        known = ", ".join([*_PLAIN, *sorted(known_norms())])
        raise ValueError(f"unknown norm {norm!r}. Known: {known}")
    return build_norm(norm, channels)
