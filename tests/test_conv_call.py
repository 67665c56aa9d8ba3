"""What a convolution's call computed with: what its forward pads, several calls before the norms,
activation checkpoints, parametrised weights, and what is checked where there is no graph.

The oracle is nn.BatchNorm2d: a layer is BatchNorm over all inputs of its window at the present
weight, with ``positions=None`` but for what is of second order in the weight's steps. They are so
small that this is within the tolerance, and so large that the first order is 200 times over it: a
wrong input, geometry or weight shows.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cbn_det.norms import build_norm, conv_call, load_memory_state_dict, memory_state_dict

OWN = "CBN(window=3, burn_in=0, positions=None, affine=False)"
SMALL = 1e-5  # learning rate
SPECS = {OWN: SMALL, "CBN(window=3, burn_in=0)": 0.0, "CBN(window=3, burn_in=0, positions=None)": 0}
STEPS = 5


def cbn(spec=OWN, channels=4):
    return build_norm(spec, channels)


def images(seed, size=9, n=2, channels=3):
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 + seed % 3  # mini-batches whose statistics differ
    return torch.randn(n, channels, size, size, generator=generator, dtype=torch.double) * scale + 1


def of_window(function, xs):
    """The outputs for the last input, normalised by BatchNorm2d over those for the last three."""
    ys = torch.cat([function(x).detach() for x in xs[-3:]])
    return nn.BatchNorm2d(ys.shape[1], affine=False).double()(ys)[-len(xs[-1]) :]


def sgd(model, lr=SMALL):
    return torch.optim.SGD(model.parameters(), lr=lr)


def check_window(model, conv_of, spec=OWN, lr=SMALL, size=9, forward=None):
    """Trains ``model`` and compares each output with BatchNorm's over what ``conv_of`` gives, at
    the present weight, for the inputs of the window."""
    optimizer, xs = sgd(model, lr), []
    for t in range(STEPS):
        xs.append(images(t, size))
        out = (forward or model.forward)(xs[-1])
        expected = of_window(conv_of, xs)
        torch.testing.assert_close(out.detach(), expected, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        out.pow(3).mean().backward()
        optimizer.step()
    assert "patch" in model[1].memory.stacked


def tick():
    """An optimiser step that changes nothing."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0).step()


def hidden(y):
    """The same numbers without the graph behind them."""
    return y.detach().requires_grad_()


# ---- padding inside the forward --------------------------------------------------------------


class SamePadded(nn.Conv2d):
    """TensorFlow's "same": as many outputs as inputs, divided by the stride, more padding below."""

    def forward(self, x):
        pads = []
        for n, k, s, d in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation, strict=True
        ):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads += [total // 2, total - total // 2]
        x = F.pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PadThenConvolve(nn.Conv2d):
    """Says nothing of its padding."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 1, 0, 3), mode="reflect"))


PADDED = {
    "same": lambda: SamePadded(3, 4, 3),
    "same, stride": lambda: SamePadded(3, 4, 5, stride=2, bias=False),
    # as many outputs as its attributes say, one row and one column further on
    "same, fits": lambda: SamePadded(3, 4, 3, stride=2, padding=1),
    "pad, then convolve": lambda: PadThenConvolve(3, 4, 3),
    "a mode of torch's own": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "torch's same": lambda: nn.Conv2d(3, 4, 4, padding="same", dilation=(1, 2)),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", PADDED)
def test_padding_inside_the_forward(kind, spec):
    model = nn.Sequential(PADDED[kind](), cbn(spec)).double()
    check_window(model, model[0], spec, SPECS[spec], size=8)


@pytest.mark.parametrize("kind", PADDED)
def test_derivatives_are_autograds_where_the_forward_pads(kind):
    model = nn.Sequential(PADDED[kind](), cbn("CBN(burn_in=0, positions=None)")).double()
    x = images(3)
    y = model[0](x)
    norm = model[1]
    norm(y)
    weight = model[0].weight
    for k, (mean, var) in enumerate(
        zip(y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0), strict=True)
    ):
        (of_mean,) = torch.autograd.grad(mean, weight, retain_graph=True)
        (of_var,) = torch.autograd.grad(var, weight, retain_graph=True)
        torch.testing.assert_close(norm.memory.pending["patch"][0], of_mean[k].flatten())
        torch.testing.assert_close(norm.memory.pending["gradient"][k], of_var[k].flatten())


@pytest.mark.parametrize("kind", ["same", "same, stride", "same, fits", "pad, then convolve"])
def test_padding_inside_the_forward_is_refused_without_the_graph(kind):
    model = nn.Sequential(PADDED[kind](), cbn()).double()
    with pytest.raises(RuntimeError, match=f"{type(model[0]).__name__} pads"):
        model[1](hidden(model[0](images(0, 8))))


# ---- all levels through the convolution, then through their norms ------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("same_size", [True, False])
def test_levels_layer_by_layer(same_size, spec):
    head, norms = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(cbn(spec) for _ in range(3))
    for norm in norms:
        norm.bind(head)
    model = nn.ModuleList([head, norms]).double()
    optimizer, seen = sgd(model, SPECS[spec]), []
    for t in range(STEPS):
        seen.append([images(10 * t + k, 8 if same_size else 8 - k) + k for k in range(3)])
        outs = [norm(y) for norm, y in zip(norms, [head(x) for x in seen[-1]], strict=True)]
        for out, xs in zip(outs, zip(*seen, strict=True), strict=True):
            expected = of_window(head, xs)
            torch.testing.assert_close(out.detach(), expected, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        sum(out.pow(3).mean() for out in outs).backward()
        optimizer.step()


@pytest.mark.parametrize("same_size", [True, False])
def test_levels_layer_by_layer_are_refused_without_the_graph(same_size):
    head, norms = nn.Conv2d(3, 4, 3, padding=1).double(), [cbn().double() for _ in range(2)]
    for norm in norms:
        norm.bind(head)
    first, _ = head(images(0)), head(images(1, 9 if same_size else 7))
    with pytest.raises(RuntimeError, match="called again before this norm"):
        norms[0](hidden(first))


# ---- activation checkpoints ------------------------------------------------------------------


def memory_of(model):
    """Without the names of options, which assert_close does not compare."""
    saved = memory_state_dict(model)
    return {name: {**state, "kind": None} for name, state in saved.items()}


def deep(spec):
    torch.manual_seed(0)
    blocks = ((nn.Conv2d(3, 4, 3), cbn(spec), nn.ReLU()), (nn.Conv2d(4, 4, 3), cbn(spec)))
    return nn.Sequential(*blocks[0], *blocks[1]).double()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("segments", [1, 5])
def test_a_checkpoints_border_between_convolution_and_norm(spec, segments):
    """Every layer a segment, and no border."""
    plain = deep(spec)
    other = copy.deepcopy(plain)
    pair = [sgd(model, 0.1) for model in (plain, other)]
    for t in range(STEPS):
        x, z = (images(t).requires_grad_() for _ in range(2))
        a, b = plain(x), checkpoint_sequential(other, segments, z, use_reentrant=False)
        assert torch.equal(a, b)
        for out, optimizer in zip((a, b), pair, strict=True):
            optimizer.zero_grad()
            out.pow(3).mean().backward()
            optimizer.step()
        assert torch.equal(x.grad, z.grad)
    torch.testing.assert_close(memory_of(plain), memory_of(other), rtol=0, atol=0)


def test_a_checkpointed_convolution_whose_norm_is_not():
    for reentrant in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn()).double()
        conv, norm = model
        check_window(
            model,
            conv,
            forward=lambda x, conv=conv, norm=norm, reentrant=reentrant: norm(
                checkpoint(conv, x.requires_grad_(), use_reentrant=reentrant)
            ),
        )


def test_a_reentrant_checkpoint_of_the_norm_alone_is_named():
    model = deep(OWN)
    out = checkpoint_sequential(model, 5, images(0).requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="re-entrant activation checkpoint.*use_reentrant=False"):
        out.mean().backward()


# ---- parametrised weights ----------------------------------------------------------------------


def powers(conv):
    return [b.clone() for b in conv.parametrizations.weight.buffers()]


@pytest.mark.parametrize("case", ["graph", "hidden", "bfloat16", "no gradient", "checkpoint"])
def test_spectral_norm_moves_on_as_with_batchnorm(case):
    """One power iteration for each call of the convolution, and none by the norm."""
    spec = "CBN(window=3, burn_in=0)"
    dtype = torch.float if case == "bfloat16" else torch.double
    conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).to(dtype)
    pair = [
        nn.Sequential(copy.deepcopy(conv), norm.to(dtype))
        for norm in (nn.BatchNorm2d(4), cbn(spec))
    ]
    for t in range(6):
        for model in pair:
            x = images(t).to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
                y = model[0](x)
                if case == "checkpoint":
                    out = checkpoint(model, x, use_reentrant=False)
                elif case == "no gradient" and t % 2:
                    with torch.no_grad():
                        model(x)
                    out = model(x)
                else:
                    out = model[1](hidden(y) if case == "hidden" else y)
            out.float().pow(2).mean().backward()
        tick()
        for a, b in zip(powers(pair[0][0]), powers(pair[1][0]), strict=True):
            assert torch.equal(a, b)
    state = memory_state_dict(pair[1])
    before = powers(pair[1][0])
    load_memory_state_dict(pair[1], state)
    for a, b in zip(before, powers(pair[1][0]), strict=True):
        assert torch.equal(a, b)


class Noisy(nn.Module):
    """A weight that is a little different at every reading in training."""

    def forward(self, weight):
        return weight * (1.0 + SMALL * torch.randn_like(weight)) if self.training else weight


@pytest.mark.parametrize(
    "made", [parametrizations.spectral_norm, parametrizations.weight_norm, Noisy]
)
def test_the_weight_is_the_one_that_was_computed_with(made):
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Noisy()) if made is Noisy else made(conv)
    model = nn.Sequential(conv, cbn()).double()
    for _ in range(30):  # power iterations of spectral_norm: its weight moves little then
        _ = conv.weight
    used = []
    conv.parametrizations.weight.register_forward_hook(lambda m, a, out: used.append(out.detach()))

    def conv_of(x):
        return F.conv2d(x, used[-1], conv.bias)

    check_window(model, conv_of)
    assert len(used) == STEPS  # computed once a step, by the convolution


# ---- by numbers, where there is no graph -------------------------------------------------------


class Between(nn.Module):
    def __init__(self, between, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **options)
        self.between = between
        self.norm = cbn()
        self.norm.bind(self.conv)

    def forward(self, x):
        return self.norm(hidden(self.between(self.conv(x))))


BETWEEN = {
    "ReLU": nn.ReLU(),
    "a scale": lambda y: 2 * y,
    "an offset": lambda y: y + 0.3,
    "noise": lambda y: y + 0.2 * torch.randn_like(y),
    "dropout": nn.Dropout2d(0.3),
    "smoothing": nn.AvgPool2d(3, 1, 1),
    "another order": lambda y: y.flip(1),
    "one row further": lambda y: y.roll(1, 2),
    "another convolution": nn.Conv2d(4, 4, 1),
    "normalisation": nn.BatchNorm2d(4, affine=False),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_what_lies_between_is_found_by_numbers(between, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"bound to Conv2d\(3, 4, .*something lies between"):
            Between(BETWEEN[between])(images(0).float())


RIGHT = {
    "plain": {},
    "groups": {"groups": 3, "out": 6},
    "stride and dilation": {"stride": 2, "dilation": (1, 2)},
    "reflect": {"padding_mode": "reflect"},
    "same": {"padding": "same", "kernel": 4},
    "bias": {"bias": True},
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("how", ["float", "bfloat16", "half", "autocast", "channels_last"])
def test_what_is_right_is_not_refused_by_numbers(kind, offset, how):
    options = {"out": 4, "kernel": 3, "padding": 1, "bias": False} | RIGHT[kind]
    out, kernel = options.pop("out"), options.pop("kernel")
    model = nn.Sequential(nn.Conv2d(3, out, kernel, **options), cbn(channels=out))
    x = images(1).float() + offset
    if kind == "bias":
        nn.init.constant_(model[0].bias, 300.0)
    if how in ("bfloat16", "half"):
        model[0], x = (t.to(getattr(torch, how)) for t in (model[0], x))
    if how == "channels_last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            model[1](hidden(model[0](x)))


def test_numbers_that_say_nothing_are_neither_error_nor_proof():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), cbn())
    right, relu = model[1], nn.ReLU()
    with torch.no_grad():
        kept = model[0].weight.clone()
        model[0].weight.zero_()
        model[0].bias.abs_()
    for _ in range(3):  # constant: ReLU changes nothing
        right(hidden(relu(model[0](images(0).float()))))
    right(hidden(relu(model[0](torch.full((2, 3, 9, 9), float("inf"))))))  # a scaler's first steps
    with torch.no_grad():
        model[0].weight.copy_(kept)
    with pytest.raises(RuntimeError, match="something lies between"):
        right(hidden(relu(model[0](images(0).float()))))


class HostReads(TorchDispatchMode):
    """Counts what waits for a GPU: single numbers, and lists of them, read from tensors."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        to_list = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (self._read(), to_list(t))[1])

    def _read(self):
        self.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_numbers_are_read_in_the_first_forwards_and_after_a_change(monkeypatch):
    """(The moments of contiguous activations look at numbers, on the CPU only.)"""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn("CBN(burn_in=0)"))
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, images(0).float()))
    conv, norm = model

    def reads(graph=False):
        tick()
        y = conv(x) if graph else hidden(conv(x))
        with HostReads(monkeypatch) as mode:
            norm(y)
        return mode.count > 0

    assert [reads(graph=True) for _ in range(3)] == [False] * 3
    assert [reads() for _ in range(5)] == [True] * 2 + [False] * 3
    assert not reads(graph=True) and not reads()
    norm.bind(conv)
    assert [reads() for _ in range(3)] == [True, True, False]
    parametrizations.weight_norm(conv)
    assert [reads() for _ in range(3)] == [True, True, False]
    assert [reads(graph=True) for _ in range(3)] == [True, True, False]


def test_what_comes_between_later_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn()).double()
    for t in range(3):
        model(images(t))
    with pytest.raises(RuntimeError, match="Relu.*not from a convolution"):
        model[1](model[0](images(4)).relu())
    with pytest.raises(RuntimeError, match="something lies between"):
        model[1](hidden(model[0](images(4)).relu()))


def test_a_transposed_convolution_of_the_same_weight_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), cbn())
    y = F.conv_transpose2d(images(0, channels=4).float(), model[0].weight, padding=1)
    with pytest.raises(RuntimeError, match="transposed convolution"):
        model[1](y)


def test_a_version_of_torch_that_does_not_show_what_nodes_keep(monkeypatch):
    monkeypatch.setattr(conv_call, "saved", lambda node, name: None)
    monkeypatch.setattr("cbn_det.norms.binding.saved", lambda node, name: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn()).double()
    check_window(model, model[0])
    model = nn.Sequential(PADDED["same, fits"](), cbn()).double()
    with pytest.raises(RuntimeError, match="SamePadded pads"):
        model(images(0, 8))


def test_weights_that_are_given_for_one_call():
    """Inner loops of meta-learning: a step of the weights that is itself differentiated."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn()).double()
    conv = model[0]
    xs = [images(t) for t in range(4)]
    weights = dict(conv.named_parameters())
    for t, x in enumerate(xs):
        out = torch.func.functional_call(model, {f"0.{k}": v for k, v in weights.items()}, x)
        expected = of_window(lambda x, w=weights: F.conv2d(x, **w), xs[: t + 1])
        torch.testing.assert_close(out.detach(), expected, rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(out.pow(3).mean(), weights.values())
        weights = {k: v * 1.0 - SMALL * g for (k, v), g in zip(weights.items(), grads, strict=True)}
        tick()
    assert weights["weight"].grad_fn is not None
    y = torch.func.functional_call(conv, {"weight": conv.weight * 2.0}, xs[0])
    with pytest.raises(RuntimeError, match="another weight than its own"):
        model[1](y)


# ---- another convolution in the place of the first ---------------------------------------------


def put_in_place(model, conv):
    """As torch.ao.quantization swaps modules: with the hooks, behind the model's back."""
    for hook in model[0]._forward_pre_hooks.values():
        conv.register_forward_pre_hook(hook)
    model._modules["0"] = conv


@pytest.mark.parametrize("graph", [True, False])
def test_a_convolution_that_took_over_the_hooks(graph):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn()).double()
    conv, norm = model
    norm(hidden(conv(images(0))))
    norm(hidden(conv(images(1))))
    model[1].forget()
    new = nn.Conv2d(3, 4, 3).double()
    put_in_place(model, new)
    check_window(model, new, forward=model if graph else (lambda x: norm(hidden(new(x)))), lr=0.0)
    assert norm.conv is new
    put_in_place(model, nn.Conv2d(3, 4, 3).double())
    with pytest.raises(RuntimeError, match="something lies between"):
        norm(hidden(model[0](images(2)).relu()))
    norm.unbind()
    model[0](images(3))
    assert norm._take_conv_input() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("steps", [0, 3])
def test_quantisation_aware_training_is_refused_at_any_time(steps):
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = nn.Sequential(nn.Conv2d(3, 4, 3), cbn())
    for t in range(steps):
        model(images(t).float())
    model.qconfig = get_default_qat_qconfig("fbgemm")
    model = prepare_qat(model.train())
    with pytest.raises(RuntimeError, match="not from a convolution.*compensation='none'"):
        model(images(4).float())
