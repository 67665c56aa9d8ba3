"""Models with norms of ours in the hands of torch.fx, torch.jit and torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from cbn_det.deploy import to_batchnorm
from cbn_det.norms import build_norm, memory_state_dict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using .torch.compile")

SPECS = [
    "CBN(window=3, burn_in=0)",
    "MBN(burn_in=0)",
    "BRN(burn_in=0, ramp=9)",
    "BGN(groups=2)",
    "KN",
    "GKN(groups=2)",
]
BATCH_NORMS = SPECS[:-1]


def images(seed, size=8):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Branches(nn.Module):
    """Registered in pairs, called convolutions first."""

    def __init__(self, spec):
        super().__init__()
        for name in "ab":
            setattr(self, f"conv_{name}", nn.Conv2d(3, 4, 3))
            setattr(self, f"norm_{name}", build_norm(spec, 4))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), build_norm(spec, 4), nn.ReLU())

    def forward(self, x):
        a, b = self.conv_a(x), self.conv_b(x)
        return self.last(F.relu(self.norm_a(a) + self.norm_b(b)))


def memory_of(model):
    """Without the names of options, which assert_close does not compare."""
    saved = memory_state_dict(model)
    return {name: {**state, "kind": None} for name, state in saved.items()}


def train(model, seeds):
    optimizer, outs = torch.optim.SGD(model.parameters(), lr=0.05), []
    for seed in seeds:
        out = model(images(seed))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        outs.append(out.detach())
    return torch.stack(outs)


CASES = [(spec, True) for spec in SPECS] + [(spec, False) for spec in BATCH_NORMS]


@pytest.mark.parametrize(("spec", "training"), CASES)
def test_symbolic_trace_sees_a_norm_as_it_sees_batchnorm(spec, training):
    model = Branches(spec).train(training)
    plain = copy.deepcopy(model)
    for name in ("norm_a", "norm_b", "last.1"):
        plain.set_submodule(name, nn.BatchNorm2d(4))
    traced, reference = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(plain)
    assert traced.code == reference.code
    other = copy.deepcopy(model)
    assert torch.equal(train(traced, range(5)), train(other, range(5)))
    torch.testing.assert_close(memory_of(model), memory_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("spec", BATCH_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_feature_extractor_of_torchvision(spec, training):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Branches(spec).train(training)
    other = copy.deepcopy(model)
    extractor = extraction.create_feature_extractor(model, ["norm_b", "last.1"])
    outs = extractor(images(0))
    x = other.norm_b(other.conv_b(images(0)))
    assert torch.equal(outs["norm_b"], x)
    x = F.relu(other.norm_a(other.conv_a(images(0))) + x)
    assert torch.equal(outs["last.1"], other.last[1](other.last[0](x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("spec", BATCH_NORMS[:2])
def test_quantisation_aware_training_of_a_traced_graph(spec):
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("fbgemm")
    model = quantize.prepare_qat_fx(Branches(spec), mapping, (images(0),))
    if spec.startswith("CBN"):
        with pytest.raises(RuntimeError, match="bound to Conv2d.*compensation='none'"):
            train(model, range(2))
    else:
        assert train(model, range(4)).isfinite().all()


@pytest.mark.parametrize("spec", BATCH_NORMS)
def test_script_names_what_to_do_first(spec):
    model = Branches(spec)
    train(model, range(3))
    layer = model.norm_a
    with pytest.raises(RuntimeError, match=rf"script.*{type(layer).__name__}.*to_batchnorm"):
        torch.jit.script(model)
    assert model.norm_a is layer
    # what it names instead works
    deployed = copy.deepcopy(model).eval()
    to_batchnorm(deployed)
    expected = model.eval()(images(9))
    torch.testing.assert_close(torch.jit.script(deployed)(images(9)), expected)
    with torch.no_grad():
        traced = torch.jit.trace(copy.deepcopy(model), images(8), check_trace=False)
        torch.testing.assert_close(traced(images(9)), expected)


def test_script_of_a_norm_that_cannot_become_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), build_norm("GKN(groups=2)", 4))
    with pytest.raises(RuntimeError, match=r"cannot compile GKN2d: .*model\.eval\(\)$"):
        torch.jit.script(model)


# ---- torch.compile ---------------------------------------------------------------------------


class SamePadded(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Net(nn.Module):
    def __init__(self, conv, between=None, again=False):
        super().__init__()
        self.conv, self.norm = conv, build_norm(SPECS[0], 4)
        self.between, self.again = between, again

    def forward(self, x):
        y = self.conv(x)
        if self.again:
            self.conv(x + 1)
        return self.norm(y if self.between is None else self.between(y))


WRONG = {
    "ReLU": lambda: Net(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
    "padding, fits": lambda: Net(SamePadded(3, 4, 3, stride=2, padding=1)),
    "again": lambda: Net(nn.Conv2d(3, 4, 3), again=True),
}


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda model: torch.compile(model, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize("kind", WRONG)
def test_a_compiled_model_is_refused_by_its_numbers(kind, compiled):
    model = WRONG[kind]()
    model.norm.bind(model.conv)
    with pytest.raises(RuntimeError, match="is not what that convolution makes of"):
        train(compiled(model), range(1))


def test_a_compiled_model_with_spectral_norm_trains_as_it_does_eagerly(compiled):
    model = Net(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)))
    other = copy.deepcopy(model)
    ours, theirs = train(model, range(6)), train(compiled(other), range(6))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory_of(other), memory_of(model), rtol=1e-4, atol=1e-5)
