"""What predictions share in a forward pass: the same numbers as each layer on its own, gradients
included, and new ones whenever parameters may have changed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from test_chain import RULES, Between, concatenated
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import build_norm, tick
from cbn_det.norms.functional import Moments
from cbn_det.norms.prediction import evaluated
from cbn_det.norms.shared import Shared


def images(seed: int, n: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype)


class Net(nn.Module):
    """A stem, three residual blocks of which each sum holds the one before, and two branches."""

    def __init__(self, norm: str = "KN(gain=0.3)") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(6))
        self.norms = nn.ModuleList(build_norm(norm, 4) for _ in range(6))
        for layer in self.norms:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        self.checkpoints = False
        self.double()

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norms[i](self.convs[i](x)) + x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norms[0](self.convs[0](x)))
        for i in (1, 2, 3):
            if self.checkpoints:
                x = checkpoint(self.block, i, x, use_reentrant=False)
            else:
                x = self.block(i, x)
        return self.norms[4](self.convs[4](x)) + self.norms[5](self.convs[5](x))


def alone(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A forward in which nothing is shared: every layer evaluates its chain with autograd."""
    layers = [m for m in model.modules() if hasattr(m, "_predict")]
    for layer in layers:
        layer._shared_moments = None
        layer._predict = lambda y, like, layer=layer: (
            evaluated(layer.chain, like) if hasattr(layer.chain, "weight") else None
        )
    try:
        return model(x)
    finally:
        for layer in layers:
            del layer._predict, layer._shared_moments


def loss(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).pow(3).mean()


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-9, atol=1e-11, msg=name)


def known(norm: str = "KN(gain=0.3)") -> Net:
    model = Net(norm)
    model(images(0))
    return model


# ---- one layer's prediction ------------------------------------------------------------------


OTHERS = {
    "concatenation": concatenated,
    "twice": lambda m, a, b: a + F.relu(a),
    "three levels": lambda m, a, b: F.relu(a + F.relu(b + F.silu(F.relu(a)))),
    "shifted": lambda m, a, b: F.relu(m.conv_free(a) + m.scale.view(1, -1, 1, 1)),
}


@pytest.mark.parametrize("rule", [*RULES, *OTHERS, "groups", "frozen weights"])
def test_gradcheck(rule: str) -> None:
    torch.manual_seed(0)
    between = OTHERS.get(rule) or RULES.get(rule, RULES["residual"])[0]
    model = Between(between, width=8 if rule == "concatenation" else 4)
    if rule == "groups":
        model.conv_c = nn.Conv2d(4, 4, 3, groups=2)
    for norm in (model.a, model.b, model.bn):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    model(torch.randn(2, 3, 8, 8))
    model.double().requires_grad_(True)
    if rule == "frozen weights":
        model.a.weight.requires_grad_(False)
        model.conv_c.weight.requires_grad_(False)
    chain, like = model.c.chain, torch.empty(0, dtype=torch.float64)
    tensors = [t for t in chain.made_of() if t.requires_grad]

    def prediction(*_: torch.Tensor) -> torch.Tensor:
        return Shared([model.c], model.c, like).predict(chain)

    torch.testing.assert_close(prediction(), evaluated(chain, like), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(prediction, tensors)


# ---- a model's -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["KN(gain=0.3)", "GKN(groups=2, gain=0.3)"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_same_as_alone(norm: str, checkpoints: bool) -> None:
    model = known(norm)
    other = copy.deepcopy(model)
    other(images(0))
    model.checkpoints = checkpoints
    for step in range(2):  # gradients add up
        outs = model(images(step)), alone(other, images(step))
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
        for out in outs:
            loss(out).backward()
    assert_same_gradients(model, other)
    assert len({id(layer._shared) for layer in model.norms[1:]}) == 1  # and it was shared


def test_convolutions_of_one_shape_that_differ_otherwise() -> None:
    """In groups, bias or where the norm before is; weights are [4, 2, 3, 3]."""
    torch.manual_seed(0)
    convs = [
        nn.Conv2d(3, 4, 3),
        *(nn.Conv2d(4, 4, 3, groups=2, bias=bias, padding=1) for bias in (True, False, True)),
        nn.Conv2d(4, 2, 1),
        nn.Conv2d(2, 4, 3),
    ]
    layers = [(conv, build_norm("KN(gain=0.3)", conv.out_channels), nn.ReLU()) for conv in convs]
    model = nn.Sequential(*(layer for group in layers for layer in group)).double()
    for _, norm, _ in layers:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    model(images(0))
    other = copy.deepcopy(model)
    other(images(0))
    outs = model(images(1)), alone(other, images(1))
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    for out in outs:
        loss(out).backward()
    assert_same_gradients(model, other)


def test_backward_passes_one_by_one() -> None:
    model = known()
    other = copy.deepcopy(model)
    outs = [model(images(step)) for step in range(2)]
    for out in reversed(outs):
        loss(out).backward()
    for step in range(2):
        loss(other(images(step))).backward()
    assert_same_gradients(model, other)


def halve_in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(0.5)


def halve_through_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.5)


def replace_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("change", [halve_in_place, halve_through_data, replace_data])
@pytest.mark.parametrize("which", ["norms.0.weight", "norms.2.bias", "convs.5.weight"])
def test_changed_parameters_count_at_once(change, which: str) -> None:
    """Without an optimiser's step that could be seen."""
    model = known()
    model(images(1))
    change(model.get_parameter(which))
    torch.testing.assert_close(model(images(2)), alone(model, images(2)), rtol=1e-10, atol=1e-10)


def test_a_part_that_runs_alone_after_a_change() -> None:
    """The layer that asked first in the latest pass does not ask again."""
    for change in (halve_in_place, lambda p: (halve_through_data(p), tick())):
        model = known()
        x = model(images(1)).detach()
        change(model.norms[3].weight)
        part = [m.norms[4](m.convs[4](x)) for m in (model, fresh(model))]
        torch.testing.assert_close(*part)


def fresh(model: Net) -> Net:
    other = known()
    other.load_state_dict(model.state_dict())
    return other


def test_the_parameters_of_the_forward_are_those_of_the_backward_pass() -> None:
    """A functional call puts the module's own back in between."""
    model = known()
    given = {n: (p.detach() * 1.5).requires_grad_() for n, p in model.named_parameters()}
    out = torch.func.functional_call(model, given, (images(1),))
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **given})
    gradients = torch.autograd.grad(loss(out), list(given.values()))
    expected = torch.autograd.grad(loss(other(images(1))), list(other.parameters()))
    for name, g, h in zip(given, gradients, expected, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-11, msg=name)


def test_two_models_take_turns() -> None:
    models = [known() for _ in range(2)]
    others = [copy.deepcopy(m) for m in models]
    halve_in_place(models[1].norms[0].weight), halve_in_place(others[1].norms[0].weight)
    for model, other in zip(models, others, strict=True):
        loss(model(images(1))).backward()
        loss(alone(other, images(1)) if other.norms[1].chain else other(images(1))).backward()
        assert_same_gradients(model, other)


def test_a_head_that_runs_once_for_each_level() -> None:
    model = known()
    other = copy.deepcopy(model)
    features = [model(images(step)).detach() for step in (1, 2)]
    for m in (model, other):
        out = m(images(0))
        for x in features:
            y = F.relu(m.norms[0](m.convs[0](x[:, :3])))
            out = out + m.norms[1](m.convs[1](y))
        loss(out).backward()
        m.out = out.detach()
    torch.testing.assert_close(model.out, other.out)
    assert_same_gradients(model, other)


def test_a_refused_prediction_has_no_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), build_norm("KN", 4), nn.Conv2d(4, 4, 1, bias=False))
    model.append(build_norm("KN(gain=0.3)", 4))
    plain = copy.deepcopy(model)
    plain[3].gain = 0.0
    for m in (model, plain):
        m[1].eps = 1e4  # the output has nearly no variance, and not gamma**2
        m.double()
        loss(m(images(0))).backward()
    assert float(model[3].diagnostics["guarded"]) == 1.0
    assert_same_gradients(model, plain)


# ---- cost ------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Operations that are dispatched, views left out."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view and "detach" not in str(func)
        return func(*args, **(kwargs or {}))


def operations(layers: int) -> tuple[int, int]:
    """Of estimates and their backward pass, as accelerators make them."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Conv2d(3 if not modules else 4, 4, 3, bias=False, padding=1)]
        modules += [build_norm("KN(gain=0.3)", 4), nn.ReLU()]
    model = nn.Sequential(*modules)
    for seed in range(2):  # finds the chain
        model(images(seed, dtype=torch.float32))
    model.to("meta")
    y = torch.empty(2, 4, 8, 8, device="meta").requires_grad_().clone()
    mean, var = torch.empty(2, 4, device="meta")
    norms = model[4::3]
    for _ in range(2):
        model.zero_grad()
        with Counter() as forward:
            found = []
            for norm in norms:
                norm._input = y
                found.append(norm.estimate(Moments(mean, var, 128)))
        with Counter() as backward:
            tensors = [t for estimate in found for t in (estimate.mean, estimate.var)]
            torch.autograd.backward(tensors, [torch.empty_like(t) for t in tensors])
    return forward.count, backward.count - len(tensors)


def test_no_host_read_and_few_operations() -> None:
    """On ``meta``, where every read from the host raises: what each layer adds, and what is done
    once for all of them."""
    counts = [operations(n) for n in (3, 5, 8)]
    (a, b), (c, d), (e, f) = counts
    assert (c - a, d - b) == (2 * 10, 2 * 8) and (e - c, f - d) == (3 * 10, 3 * 8), counts
    assert (a - 2 * 10, b - 2 * 8) <= (38, 0), counts


def test_a_prediction_costs_the_same_after_any_number_of_blocks() -> None:
    """What lies between is differentiated once, not in each layer's backward pass."""
    model = known()
    model(images(1))
    counts = []
    for norm in (model.norms[1], model.norms[4]):  # after one norm; after a sum of four
        prediction = norm._shared.predict(norm.chain)
        model.zero_grad()
        with Counter() as counter:
            prediction.sum().backward()
        counts.append(counter.count)
    assert counts[0] == counts[1]
    assert len(list(model.norms[4].chain.made_of())) == 2 + 4 * 2


def test_a_model_is_released() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(o) is Net for o in gc.get_objects())

    before = alive()
    model = known()
    loss(model(images(1))).backward()
    assert alive() == before + 1
    del model
    assert alive() == before


@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_of_a_sum_do_not_share_their_memory(shifted: bool) -> None:
    """Both norms have the same gradient by their biases, and so have the bias of a convolution and
    what is added to it; a second backward pass adds to each."""
    torch.manual_seed(0)
    model = Residual("KN(gain=0.5)").double()
    model.shifted = shifted
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model(x)  # finds the chain
    model.cut = True  # gradients of the first two norms are then the prediction's alone
    probe = torch.linspace(-1.0, 2.0, 288, dtype=torch.float64).view(2, 4, 6, 6)
    (model(x) * probe).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    once = {name: parameter.grad.clone() for name, parameter in trained.items()}
    assert ({"free.bias", "shift"} if shifted else {"norm0.bias", "norm1.bias"}) <= once.keys()
    (model(x) * probe).square().sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, 2.0 * once[name], msg=name)


class Residual(nn.Module):
    """The last norm's input is made of the sum of two others."""

    cut = shifted = False

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.free, self.shift = nn.Conv2d(4, 4, 1), nn.Parameter(torch.zeros(4))
        for i, width in enumerate((3, 3, 4)):
            self.add_module(f"conv{i}", nn.Conv2d(width, 4, 1, bias=False))
            self.add_module(f"norm{i}", build_norm(spec, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.norm0(self.conv0(x)) + self.norm1(self.conv1(x))
        if self.shifted:
            total = self.free(total) + self.shift.view(1, -1, 1, 1)
        total = total.detach() if self.cut else total
        return self.norm2(self.conv2(total)) * torch.arange(4.0).view(1, -1, 1, 1)
