"""What ``benchmarks/benchmark.py`` times: a process of its own for each norm.

python benchmarks/workloads.py layer NORM N C H W OUT KERNEL DEVICE
python benchmarks/workloads.py norm NORM N C H W DEVICE
python benchmarks/workloads.py iteration LAUNCHER-ARGUMENTS
python benchmarks/workloads.py inference trained|deployed|folded LAUNCHER-ARGUMENTS
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn
from worker import Workload, serve

from cbn_det.deploy import fold, to_batchnorm
from cbn_det.engines import resolve_engine
from cbn_det.norms import DoubleForward, build_norm, known_norms, parse_spec, resolve_burn_in
from cbn_det.run.arguments import argument_parser
from cbn_det.run.job import built

COPY = "copy"
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

    return Workload(step, model, torch.device(device))


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


def norm_workload(norm: str, shape: tuple[int, int, int, int], device: str) -> Workload:
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


#: training batches, read before anything is timed and used in turn
BATCHES = 8


def parse(words: list[str]) -> argparse.Namespace:
    """The launcher's arguments, with the engine resolved.

    Raises:
        ImportError: the engine does not work here.
    """
    args = argument_parser().parse_args(words)
    args.engine = resolve_engine(args.engine)
    args.command = "benchmarks/benchmark.py"
    return args


def iteration_workload(args: argparse.Namespace) -> Workload:
    """The training iteration that a launcher's command line describes: forward, backward,
    optimiser step, Double Forward. Reading images, evaluation and checkpoints are no part of it.

    Raises:
        ValueError: a config that cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:  # metrics are opened there, and not read
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        model, step_on = _training(args)
    turns = cycle(range(BATCHES))
    return Workload(lambda: step_on(next(turns)), model, next(model.parameters()).device)


#: what is done to the model before it is timed
STAGES = {"trained": None, "deployed": to_batchnorm, "folded": fold}


def inference_workload(stage: str, args: argparse.Namespace) -> Workload:
    """The forward pass over a test image that a launcher's command line describes, from the image
    in memory to the detections.

    Args:
        stage: a name of `STAGES`.

    Raises:
        ValueError: a config that cannot be run, or a norm that cannot be deployed so.
    """
    with tempfile.TemporaryDirectory() as folder:  # evaluation would write there; this does not
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        model, batches = _inference(args)
    if (deploy := STAGES[stage]) is not None:
        print(deploy(model), file=sys.stderr)
    turns = cycle(batches)

    def step() -> None:
        with torch.inference_mode():
            model(next(turns))

    return Workload(step, model, next(model.parameters()).device)


def _training(args: argparse.Namespace) -> tuple[nn.Module, Callable[[int], None]]:
    """The model of a command line, and what makes one of its steps, as both engines do."""
    if args.engine == "detectron2":
        from cbn_det.plugin.trial import Detectron2Trial as Trial
    else:
        from cbn_det.standalone.trial import StandaloneTrial as Trial
    trial = Trial(args)
    trial.prepare()
    model = trial.build(Path(trial.cfg.OUTPUT_DIR), bool(trial.cfg.MODEL.WEIGHTS))
    trial.repeat(BATCHES)
    return model, trial.step


def _inference(args: argparse.Namespace) -> tuple[nn.Module, list]:
    """The model of a command line, for evaluation, and test batches of one image."""
    if args.engine == "detectron2":
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
    if args.engine == "detectron2":
        return model, list(islice(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]), BATCHES))
    samples = islice(in_order(job.test_set(), cfg), BATCHES)
    return model, [[image.to(cfg.MODEL.DEVICE)] for image, _ in samples]


def main(words: list[str]) -> int:
    """Runs a worker until its stdin ends and returns its exit code."""
    kind, *rest = words
    if kind == "layer":
        norm, *numbers, device = rest
        n, c, h, w, out, kernel = map(int, numbers)
        return serve(lambda: layer_workload(norm, (n, c, h, w), out, kernel, device))
    if kind == "norm":
        norm, *numbers, device = rest
        n, c, h, w = map(int, numbers)
        return serve(lambda: norm_workload(norm, (n, c, h, w), device))
    if kind == "inference":
        stage, *rest = rest
        args = parse(rest)
        return serve(lambda: inference_workload(stage, args))
    args = parse(rest)
    return serve(lambda: iteration_workload(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
