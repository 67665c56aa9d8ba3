"""GroupNorm after a weight-standardised convolution: the formulas in numpy float64, plain torch."""

import copy
import io
import sys
import threading

import numpy as np
import pytest
import torch
from oracles import conv_patches
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbn_det import deploy
from cbn_det.norms import (
    build_norm,
    check_bindings,
    convert_norm,
    format_norm_table,
    norm_rows,
    parse_spec,
)

SPEC = "GN+WS(groups=2)"


def images(
    seed: int, n: int = 2, size: int = 7, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.manual_seed(seed), dtype=dtype)


def network(spec: str = SPEC) -> nn.Sequential:
    """The middle convolution has no norm, the last one groups."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        build_norm(spec, 8) if spec else nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        build_norm(spec, 4) if spec else nn.GroupNorm(2, 4),
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 0.3 if name in ("1.weight", "5.weight") else 0.0, 0.4)
    return model.double()


class Reference(nn.Module):
    """The same network in plain operations of torch, on the parameters of another one."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, norm, _, plain, last, norm2 = self.model
        x = F.conv2d(x, by_hand(first.weight), first.bias, 2, 1)
        x = F.group_norm(x, 2, norm.weight, norm.bias).relu()
        x = F.conv2d(x, plain.weight, plain.bias)
        x = F.conv2d(x, by_hand(last.weight), groups=2)
        return F.group_norm(x, 2, norm2.weight, norm2.bias)


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in weight.flatten(1):
        centred = row - row.sum() / len(row)
        std = (centred.square().sum() / (len(row) - 1)) ** 0.5
        rows.append(centred / (std + 1e-5))
    return torch.stack(rows).view_as(weight)


def train(model: nn.Module, run=lambda model, x: model(x)) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        x = images(step).requires_grad_()
        optimizer.zero_grad()
        output = run(model, x)
        (output.sin() * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        optimizer.step()
    return [output, x.grad, *model.parameters()]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], **how: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **how)


def overridden(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "weight" in vars(module)]


# ---- the method ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_output_is_the_formula_in_numpy(training: bool, eps: float) -> None:
    x = images(3)
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).double()
    norm = build_norm(f"GN+WS(groups=4, eps={eps})", 8).double()
    with torch.no_grad():
        conv.weight[2] *= 1e-6  # where the constant beside the deviation counts
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.uniform_(-1.0, 1.0)
    found = nn.Sequential(conv, norm).train(training)(x).detach().numpy()

    w = conv.weight.detach().numpy().reshape(8, -1)
    w = (w - w.mean(1, keepdims=True)) / (w.std(1, ddof=1, keepdims=True) + 1e-5)
    y = conv_patches(x.numpy(), conv)[0] @ w.T + conv.bias.detach().numpy()
    y = np.moveaxis(y, -1, 1)
    groups = y.reshape(len(y), 4, -1)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + eps)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
    np.testing.assert_allclose(found, normal.reshape(y.shape) * scale + shift, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    model = network()
    names, values = zip(*model.named_parameters(), strict=True)

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)

    leaves = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(output, (images(0, 1, 5).requires_grad_(), *leaves))


def test_training_is_that_of_plain_operations_and_other_convolutions_stay() -> None:
    model, twin = network(), network()
    assert_same(train(model), train(Reference(twin)), rtol=1e-9, atol=1e-10)
    assert model.state_dict().keys() == network("").state_dict().keys()
    assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())
    assert model[0].weight is model[0]._parameters["weight"] and not overridden(model)


@pytest.mark.parametrize("way", ["checkpoint", "re-entrant", "compiled", "deepcopy", "loaded"])
def test_whatever_it_is_run_through_it_trains_the_same(way: str) -> None:
    model = network()
    if way == "deepcopy":
        original, model = model, copy.deepcopy(model)
        assert model[1].conv is model[0] and original[1].conv is original[0]
    if way == "loaded":
        file = io.BytesIO()
        torch.save(model, file)
        model = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    runs = {
        "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
        "re-entrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
        "compiled": torch.compile(lambda m, x: m(x), backend="aot_eager", fullgraph=True),
    }
    found = train(model, runs.get(way, lambda model, x: model(x)))
    assert_same(found, train(Reference(network())), rtol=1e-9, atol=1e-10)
    assert not overridden(model)


def _shared(rank: int, world: int) -> list[torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(network())
    found = train(model, lambda model, x: model(x[rank::world]))
    return [p.detach() for p in found[2:]]


def _alone() -> list[torch.Tensor]:
    """What two ranks do together, whose gradients are averaged."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            output = Reference(model)(images(step)[rank::2])
            loss = (output.sin() * torch.linspace(0, 1, output.numel()).view_as(output)).sum()
            (loss / 2).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_ranks_average_the_gradients_of_the_plain_weight(tmp_path) -> None:
    for found in run_ranks(_shared, 2, tmp_path):
        assert_same(found, _alone(), rtol=1e-9, atol=1e-10)


def test_half_precision_standardises_in_single() -> None:
    """bfloat16 has 8 bits, too few for the deviation of weights around 1."""
    model = nn.Sequential(nn.Conv2d(64, 2, 3), build_norm(SPEC, 2))
    nn.init.uniform_(model[0].weight, 1.0, 1.02)
    seen = []
    model[0].register_forward_pre_hook(lambda conv, args: seen.append(conv.weight))
    x = torch.randn(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    torch.testing.assert_close(seen[0], by_hand(model[0].weight.double()).float())
    model.bfloat16()(x.bfloat16()).sum().backward()
    torch.testing.assert_close(seen[1], by_hand(model[0].weight.double()).bfloat16())
    assert model[0].weight.grad.dtype == torch.bfloat16


# ---- its convolution -------------------------------------------------------------------------


class Swapped(nn.Module):
    """Registered in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), build_norm(SPEC, 4)
        self.call = lambda x: self.norm(self.a(self.b.forward(self.a(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, x: m.norm(m.a(x)), "which did not make its input"),
        (lambda m, x: m.norm(m.b(m.a(x)).relu()), "which did not make its input"),
        (lambda m, x: m.norm(m.b.forward(m.a(x))), "called without its hooks"),
    ],
)
def test_an_input_that_is_not_the_standardised_convolutions_is_an_error(call, told) -> None:
    model = Swapped()
    x = images(0, dtype=torch.float32)
    model.norm(model.b(model.a(x)))
    with pytest.raises(RuntimeError, match=rf'{told}.*Use NORM: "GN" at this site'):
        call(model, x)
    model.b.weight.requires_grad_(False)
    model.norm(model.b(model.a(x)))


def test_without_a_convolution_it_is_refused() -> None:
    alone = nn.Sequential(nn.ReLU(), build_norm(SPEC, 4))
    with pytest.raises(ValueError, match=r'1 GN\+WS layers are fed by no.*: 1 .*NORM: "GN" there'):
        check_bindings(alone)
    for layer in (alone.train(), alone.eval()):
        with pytest.raises(RuntimeError, match='bound to no convolution.*NORM: "GN"'):
            layer(torch.ones(1, 4, 2, 2))
    with pytest.raises(ValueError, match="one weight each, which has no standard deviation"):
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), build_norm(SPEC, 4))
    parametrised = network()
    torch.nn.utils.parametrizations.weight_norm(parametrised[0])
    with pytest.raises(RuntimeError, match="computes its weight itself"):
        parametrised(images(0))


def test_a_convolution_is_released_by_errors_and_by_another_norm() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.ones(1, 5, 7, 7, dtype=torch.double))
    assert not overridden(model)
    failing = model[0].register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):  # before anything was standardised
        model(images(0))
    failing.remove()
    stopping = model[0].register_forward_pre_hook(lambda *_: sys.exit())
    with pytest.raises(SystemExit):  # after which torch calls no hooks: the next call clears up
        model(images(0))
    stopping.remove()
    model(images(0))
    assert not overridden(model)
    model[1] = nn.GroupNorm(2, 8).double()
    assert not (model[0]._forward_pre_hooks or model[0]._forward_hooks)
    y = model[:2](images(0))
    expected = F.group_norm(F.conv2d(images(0), model[0].weight, model[0].bias, 2, 1), 2)
    torch.testing.assert_close(y, expected)


def test_threads_share_a_model() -> None:
    """One is stopped between the standardisation and the convolution while another passes."""
    model, x = network().eval(), images(4)
    expected = Reference(model)(x)
    there, go_on, found = threading.Event(), threading.Event(), []

    def stop_once(conv: nn.Module, args: tuple) -> None:
        if not there.is_set():
            there.set()
            assert go_on.wait(20)

    model[0].register_forward_pre_hook(stop_once)
    thread = threading.Thread(target=lambda: found.append(model(x)))
    thread.start()
    assert there.wait(20)
    found.append(model(x))
    go_on.set()
    thread.join()
    for output in found:
        torch.testing.assert_close(output, expected)
    assert len(found) == 2 and not overridden(model)


def test_empty_input_and_single_values() -> None:
    model = network()
    assert model(images(0)[:0]).shape == (0, 4, 2, 2)
    model(images(0)[:0]).sum().backward()
    assert all(not p.grad.any() for p in model.parameters())
    one = nn.Sequential(nn.Conv2d(3, 2, 3), build_norm(SPEC, 2)).double()
    assert one(images(0, 2, 3)).abs().max() < 1e-9


# ---- by name, in tables, in graphs -----------------------------------------------------------


def test_its_name_is_read_with_and_without_options() -> None:
    assert parse_spec("GN+WS") == ("GN+WS", {})
    assert parse_spec(" GN+WS (groups=16, eps=1e-3)") == ("GN+WS", {"groups": 16, "eps": 1e-3})
    for wrong in ("GN+", "+WS", "GN+WS(16)", "GN+WS(groups=16)(eps=1)", "GN-WS", "GN++WS"):
        with pytest.raises(ValueError, match="cannot read the norm"):
            parse_spec(wrong)
    layer = build_norm("GN+WS", 64)
    assert (layer.num_groups, layer.eps) == (32, 1e-5) and isinstance(layer, nn.GroupNorm)
    assert repr(layer) == "GNWS2d(64, groups=32, eps=1e-05)"
    bare = build_norm("GN+WS(affine=False)", 64)
    assert repr(bare) == "GNWS2d(64, groups=32, eps=1e-05, affine=False)"
    for spec, told in (
        ("GN+WS(groups=0)", "groups=0: expected"),
        ("GN+WS(eps=-1)", "eps=-1: expected"),
        ("GN+WS(window=4)", "GN\\+WS has no option 'window'"),
    ):
        with pytest.raises(ValueError, match=told):
            build_norm(spec, 64)
    with pytest.raises(ValueError, match=r"does not divide the 48 .* use GN\+WS\(groups=24\)"):
        build_norm("GN+WS", 48)


def test_it_does_not_fold_and_says_so() -> None:
    model = network().eval()
    before, x = copy.deepcopy(model), images(0)
    for made in (deploy.to_batchnorm, deploy.fold):
        with pytest.raises(ValueError, match="GNWS2d.*takes its statistics from its own input"):
            made(model)
    with pytest.raises(ValueError, match=r"GNWS2d is no BatchNorm2d.*build the model with it"):
        convert_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), SPEC)
    assert torch.equal(model(x), before(x))
    table = format_norm_table(norm_rows(model))
    assert "2 layers: GN+WS(groups=2, eps=1e-05)" in table and "trainable  of 4" in table


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_graphs_hold_the_standardisation() -> None:
    model, x = network().eval(), images(5, 1)
    expected = Reference(model)(x)
    traced = torch.jit.trace(model, images(6, 1))
    exported = torch.export.export(model, (images(6, 1),)).module()
    symbolic = torch.fx.symbolic_trace(model)
    for graph in (traced, exported, symbolic):
        torch.testing.assert_close(graph(x), expected)
    with pytest.raises(RuntimeError, match="cannot compile GNWS2d"):
        torch.jit.script(model)


@pytest.fixture(scope="module")
def zoo():
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "name", ["mask_rcnn", "retinanet", "mask_rcnn_regnet", "panoptic_deeplab_depthwise"]
)
def test_detectors_are_those_of_groupnorm_with_standardised_weights(zoo, name, monkeypatch) -> None:
    """Which convolutions those are is seen in the calls of ``F.conv2d`` in the other model."""
    ours = zoo.build(name, "GN+WS(groups=4)")
    theirs = zoo.build(name, "GKN(groups=4, gain=0)")
    theirs.load_state_dict(ours.state_dict())  # with GroupNorm's keys
    check_bindings(ours)
    with zoo.convolutions_seen(theirs, monkeypatch) as fed:
        zoo.losses(theirs, zoo.random_inputs())
    zoo.losses(ours, zoo.random_inputs())  # RetinaNet averages the number of its targets
    assert None not in fed.values() and len(fed) >= 30
    with torch.no_grad():
        for weight in {id(weight): weight for weight in fed.values()}.values():
            weight.copy_(by_hand(weight))
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # of proposals and RoIs
        losses.append(zoo.losses(model, zoo.random_inputs()))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    sum(losses[0].values()).backward()
    assert all(m.weight.grad.any() for n, m in ours.named_modules() if n in fed)
