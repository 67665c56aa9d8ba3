"""Which convolution feeds a norm: found by registration, checked by the graph, released again."""

import copy
import gc
import weakref

import pytest
import torch
from oracles import PaperCBN
from torch import nn
from torch.nn.utils import parametrizations

from cbn_det.norms import build_norm
from cbn_det.norms.model import check_bindings, format_norm_table, norm_rows

SPEC = "CBN(window=3, burn_in=0)"


def cbn(channels=4, spec=SPEC):
    return build_norm(spec, channels)


def conv(cin=3, cout=4, **kwargs):
    return nn.Conv2d(cin, cout, 3, padding=1, bias=False, **kwargs)


def images(n=2, channels=3, size=8):
    return torch.randn(n, channels, size, size)


def train(model, steps=3, channels=3, forward=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        (forward or model)(images(channels=channels)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class ConvWithNorm(nn.Conv2d):
    """The shape of detectron2's wrapper: the convolution owns the norm."""

    def __init__(self, *args, norm=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x)).relu()


class Blocks(nn.Module):
    """The shape of torchvision's residual blocks."""

    def __init__(self, order=("conv1", "bn1", "conv2", "bn2")):
        super().__init__()
        self.relu = nn.ReLU()
        for name in order:
            setattr(self, name, conv(3 if name == "conv1" else 4) if "conv" in name else cbn())

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


# ---- found -----------------------------------------------------------------------------------


def test_sequential():
    model = nn.Sequential(conv(), cbn(), nn.ReLU(), conv(4), cbn())
    assert model[1].conv is model[0] and model[4].conv is model[3]
    train(model)
    assert "patch" in model[1].memory.stacked


def test_wrapper_with_a_norm_of_its_own():
    model = nn.Sequential(ConvWithNorm(3, 4, 3, norm=cbn()), ConvWithNorm(4, 4, 3, norm=cbn()))
    assert model[0].norm.conv is model[0] and model[1].norm.conv is model[1]
    train(model)
    assert {n for n, _ in model.named_modules()} == {"", "0", "0.norm", "1", "1.norm"}
    assert len(list(model.parameters())) == 8


def test_blocks_by_attribute():
    model = Blocks()
    assert model.bn1.conv is model.conv1 and model.bn2.conv is model.conv2
    train(model)


def test_torchvision_resnet():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(norm_layer=lambda c: cbn(c))
    rows = norm_rows(model)
    assert len(rows) == 20 and all(row.conv for row in rows)
    assert {row.name: row.conv for row in rows}["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    check_bindings(model)
    train(model, 2, forward=lambda x: model(nn.functional.interpolate(x, size=(32, 32))))
    assert all("patch" in m.memory.pending for m in model.modules() if hasattr(m, "compensation"))
    table = format_norm_table(rows)
    assert "20 layers" in table and "layer1.0.bn1" in table and "of layer1.0.conv1" in table


@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_a_norm_put_in_place_of_another(name):
    """Surgery on a built model: the new norm has the place, and the convolution, of the old one."""
    model = Blocks()
    old, feeding = getattr(model, name), getattr(model, "conv" + name[-1])
    new = cbn()
    setattr(model, name, new)
    assert old.conv is None and new.conv is feeding
    assert len(feeding._forward_pre_hooks) == 1
    train(model)


def test_what_needs_no_convolution_is_bound_to_none():
    for spec in ("CBN(window=1, burn_in=0)", "CBN(compensation='none', burn_in=0)"):
        model = nn.Sequential(conv(), cbn(spec=spec))
        assert model[1].conv is None and not model[0]._forward_pre_hooks
        train(model)
        train(cbn(spec=spec), channels=4)  # without any convolution


class StandardisedConv2d(nn.Conv2d):
    """Computes with a weight that is made from its own, as weight standardisation does."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_made_from_the_convolutions_own_is_refused(autocast):
    model = nn.Sequential(StandardisedConv2d(3, 8, 3), build_norm("CBN", 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(RuntimeError, match="weight standardisation.*compensation='none'"):
            model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "weight_norm", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrised_weights_are_compensated(weight_norm):
    """Their weight is computed anew whenever it is read, also where no gradient is recorded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(conv()), cbn(spec=SPEC[:-1] + ", ema='batch', positions=None)")
    ).double()
    model.eval(), model[1].train()  # spectral_norm's power iteration would move between two reads
    paper = PaperCBN(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        x = images().double()
        out = model(x)
        expected = paper(model[0](x), model[0], model[1].weight, model[1].bias)
        model[1]._take_conv_input()
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        assert "gradient" in model[1].memory.pending
        paper.push(x, model[0])
        optimizer.zero_grad()
        out.pow(3).mean().backward()
        optimizer.step()


def test_several_norms_of_one_convolution():
    """A head shared by feature levels, with statistics of each level's own."""
    head, levels = conv(), nn.ModuleList(cbn() for _ in range(3))
    for norm in levels:
        norm.bind(head)
    model = nn.ModuleList([head, levels])
    train(
        model,
        forward=lambda x: sum(
            norm(head(nn.functional.avg_pool2d(x + k, 2**k))).mean()
            for k, norm in enumerate(levels)
        ),
    )
    assert all(len(norm.memory) == 2 for norm in levels)
    assert all("patch" in norm.memory.stacked for norm in levels)


# ---- refused ---------------------------------------------------------------------------------


def test_unbound_names_the_remedy():
    for model in (
        cbn(),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), cbn()),
        nn.Sequential(conv(), nn.ReLU(), cbn()),
        nn.Sequential(conv(3, 8), cbn(4)),
    ):
        with pytest.raises(RuntimeError, match=r"bound to no convolution.*compensation='none'"):
            (model[-1] if isinstance(model, nn.Sequential) else model)(images(channels=4))
        with pytest.raises(ValueError, match=r"compensation='none'"):
            check_bindings(model)


def test_unbound_layers_evaluate():
    norm = cbn().eval()
    assert torch.equal(norm(images(channels=4)).isfinite(), torch.ones(2, 4, 8, 8).bool())


@pytest.mark.parametrize("autocast", [False, True])
def test_wrong_order_of_registration(autocast):
    """conv1, conv2, bn1, bn2: bn1 looks as if conv2 fed it."""
    model = Blocks(("conv1", "conv2", "bn1", "bn2"))
    assert model.bn1.conv is model.conv2 and model.bn2.conv is None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with pytest.raises(RuntimeError, match="bound to.*but"):
            model(images())
    model.bn1.bind(model.conv1)
    model.bn2.bind(model.conv2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        train(model)


def test_another_convolution_of_the_same_shape():
    class Swapped(Blocks):
        def forward(self, x):  # the names are in order, their use is not
            return self.bn2(self.conv1(x)) + self.bn1(self.conv2(self.conv1(x)))

    with pytest.raises(RuntimeError, match="but|did not see"):
        train(Swapped())


def test_something_between_convolution_and_norm():
    class Between(Blocks):
        def forward(self, x):
            return self.bn1(self.conv1(x).relu())

    with pytest.raises(RuntimeError, match="[Rr]elu.*not from a convolution"):
        Between()(images())


def test_one_norm_shared_by_two_convolutions():
    shared = cbn()
    first, second = nn.Sequential(conv(), shared), nn.Sequential(conv(), shared)
    assert shared.conv is second[0] and not first[0]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="but|did not see"):
        train(nn.ModuleList([first, second]), forward=lambda x: first(x) + second(x))
    shared = cbn()
    first, second = nn.Sequential(conv(), shared), nn.Sequential(conv(), shared)
    with pytest.raises(RuntimeError, match="but|did not see"):
        train(nn.ModuleList([first, second]), forward=lambda x: second(x) + first(x))


def test_a_convolution_whose_module_was_not_called():
    """The graph shows what was computed; without it there is no telling."""
    model = nn.Sequential(conv(), cbn())
    other = copy.deepcopy(model)
    for seed in range(3):
        torch.manual_seed(seed)
        x = images()
        pair = (
            model[1](nn.functional.conv2d(x, model[0].weight, padding=1)),
            other[1](other[0](input=x)),
        )
        assert torch.equal(*pair)
        for m, out in zip((model, other), pair, strict=True):
            out.pow(3).mean().backward()
            torch.optim.SGD(m.parameters(), lr=0.1).step()
            assert "patch" in m[1].memory.pending
    y = other[0](input=images()).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="did not see the input"):
        other[1](y)


# ---- released --------------------------------------------------------------------------------


def inputs_kept(model):
    return [m for m in model.modules() if m.__dict__.get("_conv_input") is not None]


def test_no_input_is_kept_after_use():
    model = nn.Sequential(conv(), cbn(), nn.ReLU(), conv(4), cbn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for gradient in (True, False, True):
        x = images()
        seen = weakref.ref(x)
        with torch.set_grad_enabled(gradient):
            out = model(x)
        if gradient:
            out.sum().backward()
            optimizer.step()
        assert not inputs_kept(model)
        del x, out
        gc.collect()
        assert seen() is None
    model.eval()(images())
    assert not inputs_kept(model)
    model[0](images())  # the norm is in evaluation: nothing is kept for it
    assert not inputs_kept(model)


def test_memory_does_not_keep_the_graph_or_activations():
    model = nn.Sequential(conv(), cbn(spec=SPEC[:-1] + ", positions=16)"))
    train(model, 9)  # the last forward estimates the averaged derivative
    norm = model[1]
    memory = norm.memory
    remembered = (memory.rows, *memory.stacked.values(), *memory.kept.values(), *memory.older)
    assert "gradient" in memory.kept and {"patch", "gradient"} < memory.pending.keys()
    for tensor in (*remembered, *memory.pending.values()):
        assert not tensor.requires_grad and tensor.grad_fn is None
        # an entry is no larger than the weight, and there are 2 beside the pending one
        assert tensor.untyped_storage().nbytes() <= 2 * 4 * (4 * 3 * 9)


class Frozen(nn.Module):
    """A norm of no running state, as detectron2's FrozenBatchNorm2d."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("how", ["setattr", "add_module", "SyncBatchNorm", "index", "none"])
def test_a_replaced_norm_lets_go_of_its_convolution(how):
    if how == "index":
        model = nn.Sequential(conv(), cbn())
        feeding, old = model
        model[1] = Frozen()
    else:
        model = ConvWithNorm(3, 4, 3, norm=cbn())
        feeding, old = model, model.norm
        if how == "setattr":
            model.norm = Frozen()
        elif how == "add_module":
            model.add_module("norm", Frozen())
        elif how == "none":
            model.norm = None
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            assert type(model.norm) is nn.SyncBatchNorm  # documented: ours is a BatchNorm to torch
    assert old.conv is None and not feeding._forward_pre_hooks
    if how not in ("SyncBatchNorm", "none"):
        model(images())
    assert old.__dict__["_conv_input"] is None


def test_unbind_and_bind_again():
    model = nn.Sequential(conv(), cbn())
    model[1].unbind()
    model[1].unbind()
    assert not model[0]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="bound to no convolution"):
        model(images())
    model[1].bind(model[0])
    model[1].bind(model[0])
    assert len(model[0]._forward_pre_hooks) == 1
    train(model)


def test_a_copy_is_bound_to_the_copy_of_its_convolution():
    model = Blocks()
    train(model)
    other = copy.deepcopy(model)
    assert other.bn1.conv is other.conv1 and other.bn2.conv is other.conv2
    assert len(other.conv1._forward_pre_hooks) == 1
    other.bn1.unbind()
    assert not other.conv1._forward_pre_hooks and len(model.conv1._forward_pre_hooks) == 1
    train(model)


# ---- the table of a run ----------------------------------------------------------------------


def test_norm_rows():
    model = nn.Sequential(conv(), cbn(), nn.ReLU(), conv(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    for p in model[4].parameters():
        p.requires_grad_(False)
    model[4].eval()
    rows = norm_rows(model)
    assert [(r.name, r.norm, r.conv, r.channels) for r in rows] == [
        ("1", "CBN", "0", 4),
        ("4", "BN", "", 4),
        ("5", "GN", "", 4),
    ]
    assert [r.trainable for r in rows] == [True, False, True]
    assert "window=3" in rows[0].options and "burn_in=0" in rows[0].options
    text = format_norm_table(rows)
    assert "1 layer: CBN(window=3" in text and "1 frozen" in text
    assert format_norm_table([]) == "norms: none"


@pytest.mark.parametrize("burn_in", [0, 100])
def test_no_activation_outlives_a_forward(burn_in):
    """In burn-in the binding is checked, and nothing staged."""
    model = nn.Sequential(conv(), cbn(spec=f"CBN(window=3, burn_in={burn_in})"))
    train(model, 3)
    model(images())
    assert model[1].call is None
