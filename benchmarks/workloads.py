"""What the benchmarks time or count: steps of convolutions with their norms, of norms alone, and of
detectors."""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from timing import Workload
from torch import Tensor, nn

from cbn_det.commands.check import make_trial
from cbn_det.deploy import fold, to_batchnorm
from cbn_det.engines import resolve_engine
from cbn_det.norms import DoubleForward, resolve_burn_in
from cbn_det.run.arguments import argument_parser
from cbn_det.run.job import built
from cbn_det.standalone.norm_layers import norm_builder

COPY = "copy"
#: training batches, read before anything is timed and used in turn
BATCHES = 8
#: what is done to a detector before its inference is timed
STAGES = {"trained": None, "deployed": to_batchnorm, "folded": fold}

Shape = tuple[int, int, int, int]


def build_layer_norm(norm: str, channels: int) -> nn.Module:
    """The norm that a config calls so. Raises ValueError for an unknown one."""
    return norm_builder("--norms", norm)(channels)


def training_step(model: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Forward, backward, optimiser step and, where a norm asks for it, Double Forward.

    Args:
        x: the input of each step.
        gradient: of the output.
    """
    # weights have to move, or norms that follow them would have less to do; a little is enough
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    twice = any(getattr(layer, "double_forward", False) for layer in model.modules())
    double_forward = DoubleForward(model) if twice else None

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).backward(gradient)
        optimizer.step()
        if double_forward is not None:
            double_forward.refresh()

    return step


def layer_workload(norm: str, shape: Shape, channels: int, kernel: int, device: str) -> Workload:
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
    path, _, function = norm.rpartition(":")
    if path.endswith(".py"):
        found = runpy.run_path(path)
        if function not in found:
            raise ValueError(f"{path} defines no {function!r}")
        model = found[function](shape[1], channels, kernel)
    else:
        conv = nn.Conv2d(shape[1], channels, kernel, padding=kernel // 2, bias=False)
        model = nn.Sequential(conv, build_layer_norm(norm, channels))
    model.to(device)
    resolve_burn_in(model, 1)
    x = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape[0], channels, *shape[2:], device=device) / channels
    return Workload(training_step(model, x, gradient), model, torch.device(device))


def stack_workload(norm: str, count: int, shape: Shape, device: str) -> Workload:
    """So many 3x3 convolutions, each with its norm and ReLU.

    Args:
        norm: "BN", "GN" or a spec of ours.
        shape: of the input and all outputs, [N, C, H, W].

    Raises:
        ValueError: an unknown norm, or one that does not fit the channels.
    """
    torch.manual_seed(0)
    channels = shape[1]
    layers: list[nn.Module] = []
    for _ in range(count):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [conv, build_layer_norm(norm, channels), nn.ReLU()]
    model = nn.Sequential(*layers).to(device)
    x, gradient = (torch.randn(shape, device=device) for _ in range(2))
    return Workload(training_step(model, x, gradient), model, torch.device(device))


def norm_workload(norm: str, shape: Shape, device: str) -> Workload:
    """
    Args:
        norm: "BN", "GN", a norm of ours, with options or without, or "copy": one tensor written
            over another. There is no convolution: CBN needs ``compensation='none'``, KN has
            nothing to predict from.
        shape: of the float32 input, [N, C, H, W].

    Raises:
        ValueError: an unknown norm, or one that does not fit the channels.
    """
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    gradient = torch.randn_like(x)
    if norm == COPY:
        return Workload(lambda: gradient.copy_(x), nn.Module(), torch.device(device))
    model = build_layer_norm(norm, shape[1]).to(device)
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        model(x).backward(gradient)

    return Workload(step, model, torch.device(device))


def iteration_workload(words: Sequence[str]) -> Workload:
    """The training iteration that a launcher's command line describes: forward, backward,
    optimiser step, Double Forward. Reading images, evaluation and checkpoints are no part of it.

    Raises:
        ImportError: the engine does not work here.
        ValueError: a config that cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:  # metrics are opened there, and not read
        trial = make_trial(_parse([*words, "OUTPUT_DIR", folder]))
        trial.prepare()
        model = trial.build(Path(folder), bool(trial.cfg.MODEL.WEIGHTS))
        trial.repeat(BATCHES)
    turns = cycle(range(BATCHES))
    return Workload(lambda: trial.step(next(turns)), model, next(model.parameters()).device)


def inference_workload(stage: str, words: Sequence[str]) -> Workload:
    """The forward pass over a test image that a launcher's command line describes, from the image
    in memory to the detections.

    Args:
        stage: a name of `STAGES`.

    Raises:
        ImportError: the engine does not work here.
        ValueError: a config that cannot be run, or a norm that cannot be deployed so.
    """
    with tempfile.TemporaryDirectory() as folder:  # evaluation would write there; this does not
        model, batches = _inference(_parse([*words, "OUTPUT_DIR", folder]))
    if (deploy := STAGES[stage]) is not None:
        print(deploy(model), file=sys.stderr)
    turns = cycle(batches)

    def step() -> None:
        with torch.inference_mode():
            model(next(turns))

    return Workload(step, model, next(model.parameters()).device)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The launcher's arguments."""
    args = argument_parser().parse_args(words)
    args.command = "benchmarks/benchmark.py"
    return args


def _inference(args: argparse.Namespace) -> tuple[nn.Module, list]:
    """The model of a command line, for evaluation, and test batches of one image."""
    engine = resolve_engine(args.engine)
    if engine == "detectron2":
        from cbn_det.plugin.config import build_config
        from cbn_det.plugin.job import Detectron2Job as Job
        from cbn_det.plugin.trainer import Trainer

        cfg, _ = build_config(args, world_size=1)
        build_model = Trainer.build_model
    else:
        from cbn_det.standalone.job import StandaloneJob as Job
        from cbn_det.standalone.launch import build_config
        from cbn_det.standalone.loading import in_order
        from cbn_det.standalone.model import build_model

        cfg, _ = build_config(args)
    job = Job(cfg, args)
    job.prepare(eval_only=True)
    torch.manual_seed(cfg.SEED)
    model = built(job.build_trained if cfg.MODEL.WEIGHTS else lambda: build_model(cfg))
    model.to(cfg.MODEL.DEVICE).eval()
    if engine == "detectron2":
        return model, list(islice(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]), BATCHES))
    samples = islice(in_order(job.test_set(), cfg), BATCHES)
    return model, [[image.to(cfg.MODEL.DEVICE)] for image, _ in samples]
