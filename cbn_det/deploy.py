"""Models ready to be used: our norms as plain BatchNorm, or folded into their convolutions.

In evaluation all norms of :mod:`cbn_det.norms` but GKN and GN+WS are BatchNorm, so a trained model
needs neither this package nor any time for them. :func:`to_batchnorm` makes them
``nn.BatchNorm2d``, :func:`fold` takes them into the weights of the convolutions before them. Both
work on any torch model. :func:`main` writes the model of a training run as a file that loads
without this package.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .norms.sites import STATE, LeftNorm, Site, reasons, some, survey
from .norms.spec import name_of
from .norms.trace import find_no_chain_at_call

#: norms that take their statistics from their own input in evaluation, too
_OF_THEIR_INPUT = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)


@dataclass(frozen=True)
class Deployment:
    """What became of the norm layers of a model, by name; ``str()`` is a report of it.

    Attributes:
        converted: those that became plain BatchNorm.
        folded: those that went into their convolutions.
        left: those that are as they were, with the reason; after :func:`fold` some may be plain
            BatchNorm now.
    """

    converted: tuple[str, ...]
    folded: tuple[str, ...]
    left: tuple[LeftNorm, ...]

    def __str__(self) -> str:
        done = [f"{len(self.converted)} became plain BatchNorm"] if self.converted else []
        done += [f"{len(self.folded)} folded into their convolution"] if self.folded else []
        line = f"norm layers: {', '.join(done) or 'nothing to do'}"
        return "\n".join([line, *reasons(self.left)])


def to_batchnorm(model: nn.Module) -> Deployment:
    """Makes every norm of ours, and SyncBatchNorm, a plain ``nn.BatchNorm2d``, in place.

    What comes out in evaluation does not change by a bit. Layers keep their parameters, running
    statistics, mode and state keys, so the model's ``state_dict`` is that of the same model built
    with BatchNorm. Where several ranks trained it, :func:`cbn_det.norms.sync_running_stats` belongs
    before.

    Plain and frozen BatchNorms and norms that are not ours are left, and listed.

    Args:
        model: any module that contains norms.

    Raises:
        ValueError: the model is itself a norm, or a norm of ours computes something else than
            BatchNorm in evaluation (GKN, GN+WS); names the layers. The model is then as it was.
    """
    _refuse_a_norm(model)
    sites, left = _survey(model)
    ours = [row for row in left if name_of(type(model.get_submodule(row.name))) is not None]
    if ours:
        lines = (line.replace("left: ", "", 1) for line in reasons(ours))
        raise ValueError(
            f"{len(ours)} layers cannot become BatchNorm; nothing was changed:\n" + "\n".join(lines)
        )
    converted = []
    for site in sites:
        if type(site.layer) is nn.BatchNorm2d:
            left.append(LeftNorm(site.name, "BatchNorm2d", "plain BatchNorm already"))
            continue
        plain = _plain(site.layer)
        for parent, key in site.places:
            setattr(parent, key, plain)
        converted.append(site.name)
    for module in list(model.modules()):
        if "plain_class" in vars(type(module)):
            module.__class__ = type(module).plain_class
        find_no_chain_at_call(module)
    return Deployment(tuple(converted), (), tuple(left))


def fold(model: nn.Module) -> Deployment:
    """Folds the BatchNorms of a model in evaluation mode into the convolutions before them, in
    place.

    Norms of ours, BatchNorm, SyncBatchNorm and FrozenBatchNorm2d (detectron2's, torchvision's) are
    folded where it is certain which ``nn.Conv2d`` feeds them and nothing else: a norm inside its
    convolution (detectron2's wrapper), or one that the forward of the module around both calls on
    that convolution's output (found by tracing it). Each pair is tried before and after, on a small
    input. All other BatchNorms become or stay plain ones and are listed with the reason: the norms
    of several feature levels behind one convolution (RetinaNet, FCOS), deformable and transposed
    convolutions. Norms that take their statistics from their own input (GN, LN) are left and listed
    too. Outputs agree to rounding. The result is for inference and export: it holds new parameters,
    and detectron2 has no config for it, as its ResNet has no convolution with a bias.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: the model is itself a norm or in training mode, or see :func:`to_batchnorm`. The
            model is then as it was.
    """
    _refuse_a_norm(model)
    modules = model.named_modules()
    training = [n for n, m in modules if m.training and isinstance(m, _BatchNorm)]
    if model.training or training:
        raise ValueError(
            "folding is for evaluation: call model.eval() first"
            + (f" ({some(training)}: in training mode)" if training else "")
        )
    converted = to_batchnorm(model).converted
    folded, left = _fold_all(model)
    kept = [name for name in converted if name not in folded]
    return Deployment(tuple(kept), tuple(folded), tuple(left))


def _refuse_a_norm(model: nn.Module) -> None:
    if isinstance(model, (_BatchNorm, *_OF_THEIR_INPUT)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}: give the module that contains it"
        )


def _takes_own_statistics(layer: nn.Module) -> bool:
    if isinstance(layer, _OF_THEIR_INPUT) or "LayerNorm" in type(layer).__name__:
        return True
    return isinstance(layer, _BatchNorm) and layer.running_mean is None


def _survey(model: nn.Module) -> tuple[list[Site], list[LeftNorm]]:
    """:func:`~cbn_det.norms.sites.survey`, with this room's own reason for some to be left."""
    sites, left = survey(model)
    own = "takes its statistics from its own input in evaluation, too"
    layers = dict(model.named_modules())
    said = [own if _takes_own_statistics(layers[row.name]) else row.reason for row in left]
    return sites, [replace(row, reason=why) for row, why in zip(left, said, strict=True)]


def _plain(layer: nn.Module) -> nn.BatchNorm2d:
    """A plain BatchNorm with the parameters and buffers of a layer, the very same objects."""
    plain = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
    for name in STATE:
        setattr(plain, name, getattr(layer, name))
    return plain.train(layer.training)


# ---- folding ---------------------------------------------------------------------------------


def _fold_all(model: nn.Module) -> tuple[list[str], list[LeftNorm]]:
    """Folds whatever can be; names of those layers, and the others with the reason."""
    sites, left = _survey(model)
    layers = {site.name: site.layer for site in sites}
    layers |= {name: m for name, m in model.named_modules() if _is_frozen_batchnorm(m)}
    left = [row for row in left if row.name not in layers]
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    traced: dict[int, dict[str, nn.Module] | str] = {}
    folded = []
    for name, layer in layers.items():
        reason = _fold_one(layer, places, traced)
        if reason:
            left.append(LeftNorm(name, type(layer).__name__, reason))
        else:
            folded.append(name)
    return folded, left


def _is_frozen_batchnorm(module: nn.Module) -> bool:
    needed = ("weight", "bias", "running_mean", "running_var")
    return (
        "FrozenBatchNorm2d" in type(module).__name__
        and isinstance(getattr(module, "eps", None), float)
        and all(isinstance(module._buffers.get(key), Tensor) for key in needed)
    )


def _fold_one(
    norm: nn.Module,
    places: dict[int, list[tuple[nn.Module, str]]],
    traced: dict[int, dict[str, nn.Module] | str],
) -> str:
    """Folds one norm; returns why not, "" if it did."""
    if len(places[id(norm)]) > 1:
        return "used at several places"
    ((parent, key),) = places[id(norm)]
    if isinstance(parent, nn.Conv2d):
        conv, around = parent, parent
    else:
        if id(parent) not in traced:
            traced[id(parent)] = _fed_by_convolutions(parent)
        found = traced[id(parent)]
        if isinstance(found, str):
            return found
        if key not in found:
            return "no nn.Conv2d feeds it and nothing else"
        conv, around = found[key], nn.Sequential(found[key], norm)
    if len(places[id(conv)]) > 1:
        return "its convolution is used at several places"
    if "weight" not in conv._parameters or "bias" not in conv._parameters:
        return "its convolution computes its weight"
    if conv is not parent and (conv._forward_hooks or conv._backward_hooks):
        return "its convolution has hooks"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "has hooks on it"
    reason = _try(conv, norm, around, key)
    if not reason:
        conv.weight, conv.bias = _folded(conv, norm)
        setattr(parent, key, None if parent is conv else nn.Identity())
    return reason


class _CallsOf(fx.Tracer):
    """Records which children a module's own forward calls, on what."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _fed_by_convolutions(parent: nn.Module) -> dict[str, nn.Module] | str:
    """The convolutions that feed children of a module in its forward and nothing else, by the name
    of the child; or why that cannot be told."""
    dictionary = isinstance(parent, nn.ModuleDict) and type(parent).forward is nn.Module.forward
    if dictionary or isinstance(parent, nn.ModuleList):
        return "one of a list of norms, such as those of several feature levels"
    try:
        parameters = inspect.signature(parent.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        watched = copy.copy(parent)  # a forward may count its calls
        nodes = _CallsOf().trace(watched, concrete_args=defaults or None).nodes
    except Exception as error:
        return (
            f"what feeds it cannot be told from {type(parent).__name__}.forward:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    calls = [node for node in nodes if node.op == "call_module"]
    often = Counter(node.target for node in calls)
    found = {}
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not (isinstance(source, fx.Node) and source.op == "call_module"):
            continue
        once = often[node.target] == often[source.target] == len(source.users) == 1
        conv = parent.get_submodule(source.target)
        while type(conv) is nn.Sequential and len(conv):
            conv = conv[-1]
        if once and isinstance(conv, nn.Conv2d):
            found[node.target] = conv
    return found


@torch.no_grad()
def _try(conv: nn.Conv2d, norm: nn.Module, around: nn.Module, key: str) -> str:
    """Folds copies in double precision and compares; returns what is wrong, "" if nothing."""
    try:
        before = copy.deepcopy(around).double()
        after = copy.deepcopy(conv).double()
        after.weight, after.bias = _folded(after, copy.deepcopy(norm).double())
        if around is conv:
            setattr(after, key, None)
        sizes = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
        height, width = (d * (k - 1) + 1 + 2 * s for k, d, s in sizes)
        count = conv.in_channels * height * width
        x = torch.linspace(-1, 1, count, dtype=torch.double, device=conv.weight.device).cos()
        x = x.view(1, conv.in_channels, height, width)
        expected, found = before(x), after(x)
    except Exception as error:
        return f"it failed when tried: {str(error).splitlines()[0]}"
    close = 1e-9 * max(float(t.abs().max()) for t in (expected, after.weight, after.bias))
    if found.shape != expected.shape or not torch.allclose(found, expected, 1e-6, close):
        return "its convolution does more than a convolution, folding would change the output"
    return ""


def _folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the convolution with the norm taken in, computed in double precision."""
    parts = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, *moments, scale, shift = (t if t is None else t.detach().double() for t in parts)
    fused = fuse_conv_bn_weights(weight, bias, *moments, norm.eps, scale, shift)
    trained = conv.weight.requires_grad
    weight, bias = (nn.Parameter(t.detach().to(conv.weight.dtype), trained) for t in fused)
    return weight, bias


# ---- a training run --------------------------------------------------------------------------

_DESCRIPTION = """Writes the trained model of a run as files that load without this package.

  torch        detectron2: config.yaml and model.pth of stock detectron2, our norms as "BN";
               standalone: model.pth, a detector of torchvision's classes, for torch.load
  torchscript  model.ts for torch.jit.load, with torchvision imported
  onnx         model.onnx

Norms are folded into their convolutions, except in detectron2's own format, whose configs cannot
express that. What was written is tried beside the trained model before it is left there. model.json
says what goes into the model and what comes out.

Exit codes: 0 written, 1 outputs differ, 2 refused.
"""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "cbn-det deploy", description=_DESCRIPTION, formatter_class=raw
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a training run")
    add("--format", choices=("torch", "torchscript", "onnx"), default="torch")
    add("--weights", type=Path, metavar="PTH", help="another checkpoint than the run's last")
    add("--output", type=Path, help="a new or an empty folder (RUN/deployed-FORMAT)")
    said = "try the model on it, not on test images of the run; may be repeated"
    add("--image", action="append", dest="images", type=Path, metavar="FILE", help=said)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides, such as MODEL.DEVICE cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """``cbn-det deploy``; returns the exit code."""
    args = make_parser().parse_intermixed_args(arguments)
    output = args.output or args.run / f"deployed-{args.format}"
    # a traced model has the device in it that it was traced on
    device = [] if args.format == "torch" else ["MODEL.DEVICE", "cpu"]
    try:
        from .predict import load_run
        from .run.detector import without_notices_of_torch
        from .run.export import export

        with without_notices_of_torch():
            detector = load_run(args.run, args.weights, [*device, *args.opts])
            report, files = export(detector, args.format, output, args.images)
    except (ValueError, ImportError) as error:  # ConfigError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"Files: {', '.join(map(str, files))}")
    return 0
