"""Measuring how far estimates are from the truth: numbers against numpy, and what is left alone."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import kalman
import numpy as np
import pytest
import torch
from torch import nn

from cbn_det.norms import (
    DoubleForward,
    build_norm,
    memory_state_dict,
    reading_memory,
    resolve_burn_in,
)
from cbn_det.run.errors import ConfigError
from cbn_det.run.precise_bn import recompute_statistics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import shadow_errors  # noqa: E402
from shadow_errors import StatisticsError  # noqa: E402
from shadows import Shadows  # noqa: E402

EPS = 1e-5
SIZE, IMAGES = 2, 8  # of a mini-batch, of the truth
WINDOWED = "CBN(burn_in=0, window=3, compensation='none')"
NORMS = [
    "BN",
    WINDOWED,
    "CBN(burn_in=0)",
    "MBN(burn_in=0)",
    "MBN(burn_in=0, double_forward=False)",
    "KN",
    "KN(gain=0.5)",
    "BRN(burn_in=0, ramp=0, r_max=1.2, d_max=0.1)",
    "BGN(groups=2)",
]


class Net(nn.Module):
    """Three convolutions with a norm, and a loss of positions that are chosen at random."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        widths = (3, 4, 6, 4)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), make(norm, b))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        for layer in self.convs:
            nn.init.uniform_(layer[1].weight, 0.5, 1.5)
            nn.init.normal_(layer[1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs[2](self.convs[1](self.convs[0](x).relu()).relu())
        return (x[:, :, torch.randperm(x.shape[2])[:4]] - 1.0).square().mean()


def make(norm: str, channels: int) -> nn.Module:
    if norm == "BN":
        return nn.BatchNorm2d(channels)
    layer = build_norm(norm, channels)
    resolve_burn_in(layer, 10)
    return layer


def images(place: int) -> torch.Tensor:
    """[SIZE, 3, 6, 6]; images differ in brightness and contrast."""
    draw = torch.Generator().manual_seed(place)
    x = torch.randn(SIZE, 3, 6, 6, generator=draw)
    return x * (0.5 + torch.rand(SIZE, 1, 1, 1, generator=draw)) + torch.randn(
        SIZE, 3, 1, 1, generator=draw
    )


def truth_batches() -> list[torch.Tensor]:
    return [images(1000 + i) for i in range(IMAGES // SIZE)]


class Training:
    """A few iterations of training, which may be measured before some of them."""

    def __init__(
        self, host: str, measured: bool = True, norms=NORMS, at=(1, 4), reference: str = ""
    ) -> None:
        self.model = Net(host)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.double_forward = DoubleForward(self.model)
        self.at = at if measured else ()
        self.lines: dict[int, dict] = {}
        if measured:
            self.errors = StatisticsError(self.model, self.double_forward, norms, 10, reference)

    def run(self, start: int, end: int) -> None:
        for iteration in range(start, end):
            if iteration in self.at:
                self.lines[iteration] = self.measure()
            torch.manual_seed(iteration)
            self.optimizer.zero_grad()
            self.model(images(iteration)).backward()
            self.optimizer.step()
            self.double_forward.refresh()

    def measure(self, forward=None) -> dict:
        return self.errors.measure(truth_batches(), IMAGES // SIZE, forward or self.model)


# ---- numbers ----------------------------------------------------------------------------------


class Captured:
    """Inputs of every norm, iteration by iteration, and those of the mini-batches of the truth."""

    def __init__(self, training: Training) -> None:
        self.trained: dict[str, list[np.ndarray]] = {}
        self.probed: dict[str, list[np.ndarray]] = {}
        self.model = training.model
        for name, module in training.model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda m, args, name=name: self._keep(name, args))

    def _keep(self, name: str, args: tuple) -> None:
        kept = self.trained if torch.is_grad_enabled() else self.probed
        kept.setdefault(name, []).append(args[0].detach().double().numpy())


def moments(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all values of each channel, written out."""
    mean, var = [], []
    for channel in range(inputs[0].shape[1]):
        values = np.concatenate([x[:, channel].ravel() for x in inputs])
        mean.append(sum(values) / len(values))
        var.append(sum((values - mean[-1]) ** 2) / len(values))
    return np.array(mean), np.array(var)


def expected(estimates: list[tuple], mean: np.ndarray, var: np.ndarray) -> dict[str, float]:
    """The errors by their definition."""
    rows = [
        ((m - mean) / np.sqrt(var + EPS), np.log((v + EPS) / (var + EPS))) for m, v in estimates
    ]
    first, second = (np.stack([row[k] for row in rows]) for k in (0, 1))
    return {
        "mean": np.sqrt(np.mean(first**2)),
        "var": np.sqrt(np.mean(second**2)),
        "var_fixed": np.sqrt(np.mean(second.mean(0) ** 2)),
    }


def check(found: dict[str, float], wanted: dict[str, float]) -> None:
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key


@pytest.fixture()
def run() -> tuple[Captured, dict, Training]:
    """Four iterations, captured, and the layers of what was measured before the fifth."""
    training = Training("BN")
    captured = Captured(training)
    training.run(0, 4)
    captured.probed.clear()  # of second passes
    layers = training.measure()
    assert list(layers) == ["convs.0.1", "convs.1.1", "convs.2.1"]
    return captured, layers, training


def test_the_truth_and_batchnorm(run) -> None:
    captured, layers, training = run
    for name, layer in layers.items():
        inputs = captured.probed[name]
        assert len(inputs) == IMAGES // SIZE
        mean, var = moments(*inputs)
        assert layer["values"] == sum(x[:, 0].size for x in inputs)
        check(layer["norms"]["BN"], expected([moments(x) for x in inputs], mean, var))
        # the trained network's own running statistics are those of its BatchNorm shadow
        host = training.model.get_submodule(name)
        off = (host.running_mean.double().numpy() - mean) / np.sqrt(var + EPS)
        ratio = np.log((host.running_var.double().numpy() + EPS) / (var + EPS))
        running = {
            "running_mean": np.sqrt(np.mean(off**2)),
            "running_var": np.sqrt(np.mean(ratio**2)),
        }
        check(layer["norms"]["BN"], running)


def test_estimates_are_made_of_the_first_mini_batches_only(monkeypatch) -> None:
    monkeypatch.setattr(shadow_errors, "_ESTIMATED", 2)
    training = Training("BN")
    captured = Captured(training)
    for name, layer in training.measure().items():
        inputs = captured.probed[name]
        assert len(inputs) == IMAGES // SIZE
        wanted = expected([moments(x) for x in inputs[:2]], *moments(*inputs))
        check(layer["norms"]["BN"], wanted)
    training.run(0, 1)
    assert all(layer.num_batches_tracked == 1 for layer in training.errors.shadows.layers())


def test_a_window_without_compensation(run) -> None:
    captured, layers, _ = run
    for name, layer in layers.items():
        before = [moments(x) for x in captured.trained[name][-2:]]
        estimates = []
        for x in captured.probed[name]:
            parts = [moments(x), *before]
            mean = np.mean([m for m, _ in parts], 0)
            estimates.append((mean, np.mean([v + m**2 for m, v in parts], 0) - mean**2))
        check(layer["norms"][WINDOWED], expected(estimates, *moments(*captured.probed[name])))


def test_distance_from_a_reference_is_taken_mini_batch_by_mini_batch() -> None:
    training = Training("BN", norms=["BGN(groups=2)", WINDOWED, "BN"], reference="BN")
    captured = Captured(training)
    training.run(0, 4)
    captured.probed.clear()
    for name, layer in training.measure().items():
        before = [moments(x) for x in captured.trained[name][-2:]]
        variances = []
        for x in captured.probed[name]:
            parts = [moments(x), *before]
            mean = np.mean([m for m, _ in parts], 0)
            windowed = np.mean([v + m**2 for m, v in parts], 0) - mean**2
            variances.append(np.log((windowed + EPS) / (parts[0][1] + EPS)) ** 2)
        check(layer["norms"][WINDOWED], {"apart_var": np.sqrt(np.mean(variances))})
        assert layer["norms"]["BN"]["apart_var"] == 0
        assert layer["norms"]["BGN(groups=2)"]["apart_var"] > 0


def test_groups_of_channels_have_a_truth_of_their_own(run) -> None:
    captured, layers, _ = run
    for name, layer in layers.items():

        def grouped(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            pools = [x.reshape(len(x), 2, -1, x.shape[-1]) for x in inputs]
            return moments(*pools)

        inputs = captured.probed[name]
        wanted = expected([grouped(x) for x in inputs], *grouped(*inputs))
        check(layer["norms"]["BGN(groups=2)"], wanted)


def test_kalman_norms_predict_what_the_models_norms_put_out(run) -> None:
    captured, layers, training = run
    convs = copy.deepcopy(training.model.convs).double()
    names = list(layers)
    for norm, gain in (("KN", 0.2), ("KN(gain=0.5)", 0.5)):
        estimates: dict[str, list] = {name: [] for name in names}
        for batch in range(IMAGES // SIZE):
            handed = None
            for (conv, layer), name in zip(convs, names, strict=True):
                found = tuple(torch.tensor(v) for v in moments(captured.probed[name][batch]))
                if handed is not None:
                    predicted = kalman.convolved(*kalman.rectified(*handed), conv)
                    found = kalman.mixed(gain, predicted, found)
                estimates[name].append([t.detach().numpy() for t in found])
                handed = layer.bias, layer.weight**2
        for name in names:
            wanted = expected(estimates[name], *moments(*captured.probed[name]))
            check(layers[name]["norms"][norm], wanted)


def test_a_correction_of_the_output_counts_as_one_of_the_statistics(run) -> None:
    """Batch Renormalization's statistics, read off what it does to its input."""
    captured, layers, training = run
    norm = NORMS[-2]
    for name, layer in layers.items():
        shadow = training.errors.shadows.sites[name].shadows[norm]
        gamma, beta = (p.detach().double().numpy() for p in (shadow.weight, shadow.bias))
        estimates = []
        for x in captured.probed[name]:
            with torch.no_grad(), reading_memory(shadow):
                out = shadow(torch.tensor(x).float()).double().numpy()
            lines = [np.polyfit(x[:, c].ravel(), out[:, c].ravel(), 1) for c in range(len(gamma))]
            slope, offset = np.array(lines).T
            slope, offset = slope / gamma, (offset - beta) / gamma
            estimates.append((-offset / slope, 1 / slope**2 - EPS))
        wanted = expected(estimates, *moments(*captured.probed[name]))
        for key, value in wanted.items():
            assert layer["norms"][norm][key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


# ---- shadows are the real layers --------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_shadow_of_the_same_norm_does_what_the_norm_does(norm: str) -> None:
    training = Training(norm, norms=[norm], at=(2, 5))
    hosts = dict(training.model.named_modules())
    sites = training.errors.shadows.sites
    outputs: list[tuple] = []
    for name, site in sites.items():
        own: list[torch.Tensor] = []
        layer = site.shadows[norm]
        layer.register_forward_hook(lambda m, a, out, own=own: own.append(out.detach()))
        hosts[name].register_forward_hook(
            lambda m, a, out, own=own: outputs.append((own.pop(), out.detach()))
        )
    training.run(0, 6)
    assert len(outputs) >= 6 * len(sites)
    tolerance = 1e-4 if norm == "BN" else 0.0  # torch's own kernel
    for found, wanted in outputs:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for name, site in sites.items():
        for key, buffer in site.shadows[norm].named_buffers():
            wanted = hosts[name].get_buffer(key)
            torch.testing.assert_close(buffer, wanted, rtol=tolerance, atol=tolerance)


# ---- nothing else changes ---------------------------------------------------------------------


def state_of(training: Training) -> list[torch.Tensor]:
    def tensors(value) -> list:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [t for item in value for t in tensors(item)]
        if torch.is_tensor(value):
            return [value]
        return [] if isinstance(value, str) else [torch.tensor(float(value or 0))]

    model = training.model
    optimizer = training.optimizer.state_dict()["state"]
    return tensors([model.state_dict(), memory_state_dict(model), optimizer])


@pytest.mark.parametrize("host", NORMS)
def test_the_training_is_the_same_to_the_last_bit(host: str) -> None:
    plain, measured = Training(host, measured=False), Training(host)
    for training in (plain, measured):
        random.seed(1)
        np.random.seed(1)
        training.run(0, 6)
        training.drawn = random.random(), np.random.rand(), torch.rand(3).tolist()
    assert measured.drawn == plain.drawn
    assert measured.model.state_dict().keys() == plain.model.state_dict().keys()
    for one, other in zip(state_of(plain), state_of(measured), strict=True):
        assert torch.equal(one, other)
    assert list(measured.lines) == [1, 4]


class Averaging(Net):
    """Keeps an average over training forwards as a plain number, as RetinaNet does."""

    average, count, latest = 100.0, 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * float(x.square().mean())
        self.count += 1
        self.latest = self.average
        return super().forward(x) / self.average


def test_numbers_that_modules_keep_of_training_forwards_are_left_alone() -> None:
    model = Averaging("BN")
    errors = StatisticsError(model, DoubleForward(model), ("BN", "KN"), 9)
    errors.measure((torch.randn(SIZE, 3, 8, 8) for _ in range(9)), 4, model)
    assert (model.average, model.count, model.latest) == (100.0, 0, None)
    batches = [torch.randn(SIZE, 3, 8, 8) for _ in range(3)]
    before = model.convs[0][1].running_mean.clone()
    assert recompute_statistics(model, batches, 3) == 3
    assert not torch.equal(model.convs[0][1].running_mean, before)
    assert (model.average, model.count, model.latest) == (100.0, 0, None)
    assert model.convs[0][1].momentum == 0.1


def test_random_numbers_go_on_as_if_nothing_had_been_measured() -> None:
    training = Training("BN")
    drawn: list[float] = []

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        drawn.append(draw()[0])
        return training.model(batch)

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    wanted = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    for _ in range(2):
        training.measure(forward)
    assert draw() == wanted
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:], "each time other RoIs"


def test_measuring_more_often_changes_no_number() -> None:
    few, many = Training("BN", at=(4,)), Training("BN", at=(1, 2, 3, 4))
    for training in (few, many):
        training.run(0, 5)
    assert few.lines[4] == many.lines[4]


def test_a_layer_that_sees_no_data_is_left_out() -> None:
    training = Training("BN")
    empty = [batch[:0] for batch in truth_batches()]
    assert training.errors.measure(empty, len(empty), training.model) == {}


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        ("GKN(groups=2)", "GKN2d is no BatchNorm2d"),
        ("NoSuch", "NoSuch"),
    ],
)
def test_norms_that_cannot_be_shadows(norm: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        Shadows(Net("BN"), [norm], 10)
    assert norm in str(error.value)


def test_batches_that_end_early() -> None:
    training = Training("BN")
    with pytest.raises(ValueError, match="only 3 of 4 mini-batches"):
        training.errors.measure(truth_batches()[:3], 4, training.model)
