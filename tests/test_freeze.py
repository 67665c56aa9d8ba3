"""``freeze``: statistics computed anew at a time of the schedule, and fixed from then on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn.precise_bn import update_bn_stats
from ranks import run_ranks
from same_run import same
from torch import Tensor, nn

from cbn_det.deploy import fold
from cbn_det.norms import (
    DoubleForward,
    build_norm,
    clock,
    convert_norm,
    find_chain_at_call,
    format_norm_table,
    image_share,
    memory_state_dict,
    norm_diagnostics,
    norm_rows,
    resolve_burn_in,
    sync_running_stats,
)
from cbn_det.run.checkpoint import load_norm_state, norm_state
from cbn_det.run.norm_schedule import NormSchedule

ITERATIONS, WHEN = 8, 5  # freeze=0.6 of 8 is 4.8
NORMS = {
    "BN": "BN(freeze=0.6)",
    "BGN": "BGN(groups=2, freeze=0.6)",
    "CBN": "CBN(window=3, burn_in=1, freeze=0.6)",
    "MBN": "MBN(window=3, burn_in=1, freeze=0.6)",
    "BRN": "BRN(burn_in=1, ramp=1, freeze=0.6)",
    "KN": "KN(freeze=0.6)",
}
every_norm = pytest.mark.parametrize("spec", NORMS.values(), ids=NORMS)


def images(number: int, n: int = 2) -> Tensor:
    """Images whose means differ a lot, as those of one mini-batch do not."""
    generator = torch.Generator().manual_seed(number)
    shift = 2 * torch.randn(n, 1, 1, 1, generator=generator)
    return torch.randn(n, 3, 9, 9, generator=generator) + shift


def others(rank: int = 0) -> Iterator[Tensor]:
    """What statistics are computed over."""
    return (images(1000 + 100 * rank + i) for i in range(100))


def network(spec: str) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [build_norm(spec, c) if spec else nn.BatchNorm2d(c) for c in (4, 6)]
    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


class Training:
    """A loop of this package's kind: accumulation, a GradScaler, the second pass."""

    def __init__(self, model: nn.Module, accumulate: int = 1, skip: int = -1) -> None:
        self.model, self.accumulate, self.skip = model, accumulate, skip
        self.dtype = next(model.parameters()).dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        resolve_burn_in(model, ITERATIONS)
        self.freeze = NormSchedule(model, ITERATIONS, self.others, iterations=5)
        self.double_forward = DoubleForward(model)
        self.second_passes: list[int] = []

    def others(self) -> Iterator[Tensor]:
        return (batch.to(self.dtype) for batch in others())

    def iterate(self, start: int = 0, end: int = ITERATIONS) -> Training:
        for i in range(start, end):
            self.freeze.before_step(i)
            self.step(i)
        return self

    def step(self, i: int) -> None:
        self.optimizer.zero_grad()
        for k in range(self.accumulate):
            out = self.model(images(10 * i + k).to(self.dtype))
            loss = (out - torch.linspace(-1, 2, out.numel()).view(out.shape)).square().mean()
            self.scaler.scale(loss / self.accumulate).backward()
        if i == self.skip:
            next(self.model.parameters()).grad.fill_(float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.double_forward.refresh():
            self.second_passes.append(i)


def alike(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    theirs = b.state_dict()
    for key, value in a.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance, msg=key)


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"skip": 2}, {"skip": WHEN - 1}], ids=str
)
def test_bn_is_batchnorm_put_in_evaluation_mode_after_precise_bn(options: dict[str, int]) -> None:
    ours = Training(network("BN(freeze=0.6)").double(), **options)
    plain = Training(network("").double(), **options)
    alike(ours.iterate(end=WHEN).model, plain.iterate(end=WHEN).model, 1e-6)
    assert all(layer.training for layer in norms_of(ours.model))
    update_bn_stats(plain.model, plain.others(), 5)
    for layer in norms_of(plain.model):
        layer.eval()
    ours.iterate(WHEN)
    plain.iterate(WHEN)
    alike(ours.model, plain.model, 1e-6)


@every_norm
def test_statistics_stay_those_of_all_mini_batches_and_nothing_is_remembered(spec: str) -> None:
    training = Training(network(spec), accumulate=2)
    model = training.iterate(end=WHEN).model
    conv, layer = model[0], model[1]
    x = torch.cat([conv(batch) for batch, _ in zip(others(), range(5), strict=False)]).detach()
    groups = x.view(len(x), 2, 2, -1) if "BGN" in spec else x.view(len(x), 4, 1, -1)
    mean = groups.mean((0, 2, 3)).repeat_interleave(4 // groups.shape[1])
    var = groups.var((0, 2, 3), correction=0).repeat_interleave(4 // groups.shape[1])
    training.iterate(WHEN, WHEN + 1)
    assert layer.frozen and not layer.training
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=1e-5)
    at_freeze = [b.clone() for m in norms_of(model) for b in m.buffers()]
    gamma = layer.weight.detach().clone()
    model.eval()
    model.train()  # as after an evaluation
    training.iterate(WHEN + 1)
    sync_running_stats(model)
    assert all(map(torch.equal, at_freeze, (b for m in norms_of(model) for b in m.buffers())))
    assert not torch.equal(layer.weight, gamma)  # goes on training
    x = torch.randn(2, 4, 5, 5)
    expected = F.batch_norm(x, mean, var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert not norm_diagnostics(model)
    for memory in memory_state_dict(model).values():
        assert not (memory["pushed"] or memory["forwards"] or memory["pending"] or memory["rows"])
    assert training.second_passes == (list(range(1, WHEN)) if "MBN" in spec else [])


@every_norm
def test_a_resumed_training_is_the_one_that_never_stopped(spec: str) -> None:
    whole = Training(network(spec)).iterate()
    for at in (WHEN - 1, WHEN, WHEN + 1):
        before = Training(network(spec)).iterate(end=at)
        saved = copy.deepcopy(
            [before.model.state_dict(), norm_state(before.model), before.optimizer.state_dict()]
        )
        after = Training(network(spec))
        after.model.load_state_dict(saved[0])
        assert load_norm_state(after.model, saved[1], at, ITERATIONS) == ""
        after.optimizer.load_state_dict(saved[2])
        after.iterate(at)
        assert same(after.model.state_dict(), whole.model.state_dict()), at


def test_a_schedule_made_longer_thaws_and_one_made_shorter_freezes_anew() -> None:
    training = Training(network("BN(freeze=0.6)")).iterate(end=WHEN + 1)
    state = norm_state(training.model)
    assert state["frozen_norms"] == ["1", "4"]
    longer, shorter = network("BN(freeze=0.6)"), network("BN(freeze=0.6)")
    NormSchedule(longer, 20, others)
    load_norm_state(longer, state, WHEN + 1, 20)
    assert not longer[1].frozen
    freeze = NormSchedule(shorter, 4, others, 2)
    load_norm_state(shorter, {**state, "frozen_norms": []}, WHEN + 1, 4)
    assert freeze.before_step(WHEN + 1) == 2 and shorter[1].frozen
    assert freeze.before_step(WHEN + 2) == 0


# ------------------------------------------------------------------ several ranks


def _of_a_rank(rank: int, world: int) -> list[Tensor]:
    model = network("BN(freeze=0.5)").double()
    freeze = NormSchedule(model, 2, lambda: (b.double() for b in others(rank)), 3)
    model(images(rank).double())  # each rank has statistics of its own
    freeze.before_step(1)
    found = [model[1].running_mean.clone(), model[1].running_var.clone()]
    sync_running_stats(model)  # as before an evaluation: it pools in single precision
    assert all(map(torch.equal, found, (model[1].running_mean, model[1].running_var)))
    return found


def test_ranks_get_the_same_statistics_of_all_their_images(tmp_path: Path) -> None:
    found = run_ranks(_of_a_rank, 3, tmp_path)
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))
    pictures = [b for rank in range(3) for b, _ in zip(others(rank), range(3), strict=False)]
    x = network("BN").double()[0](torch.cat(pictures).double()).detach()
    torch.testing.assert_close(found[0][0], x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], x.var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ around it


@pytest.mark.parametrize("value", ["0", "-0.5", "1.5", "400", "True", "'0.5'", "None"])
def test_a_freeze_out_of_range_is_named(value: str) -> None:
    with pytest.raises(ValueError, match=rf"freeze={value}: expected a number in \(0, 1\]"):
        build_norm(f"BN(freeze={value})", 4)


def test_where_nobody_freezes_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_warned", set())
    model = network("MBN(burn_in=0, freeze=0.6, double_forward=False)")
    with pytest.warns(UserWarning, match=r"freeze=0.6 of MBN2d .*\.NormSchedule\("):
        model(images(0))
    monkeypatch.setattr(clock, "_warned", set())
    NormSchedule(model, 10, others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(0))
        network("BN(freeze=1)")(images(0))


def test_a_burn_in_that_outlasts_the_freeze_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_warned", set())
    with pytest.warns(UserWarning, match=r"CBN\(burn_in=0.667, freeze=0.5\).*BatchNorm throughout"):
        build_norm("CBN(freeze=0.5)", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in ("CBN", "CBN(burn_in=0.3, freeze=0.5)", "MBN(burn_in=9, freeze=0.5)"):
            build_norm(spec, 4)


def test_the_table_says_when() -> None:
    model = network("BN(freeze=0.6)")
    assert "freeze=0.6" in format_norm_table(norm_rows(model))
    NormSchedule(model, 600, others)
    assert "BN(ema='batch', freeze=360," in format_norm_table(norm_rows(model))


def test_reset_statistics_are_computed_anew() -> None:
    model = Training(network("BN(freeze=0.6)")).iterate().model
    torch.optim.swa_utils.update_bn([images(i) for i in range(3)], model)
    x = model[0](torch.cat([images(i) for i in range(3)])).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_a_test_image_has_no_share_in_frozen_statistics() -> None:
    model = network("BN(freeze=0.6)")
    model[4] = build_norm("BN", 6)
    with image_share(model.eval(), images_per_gpu=2) as layers:
        assert layers == ["4"]


def test_converted_models_freeze() -> None:
    model = network("")
    convert_norm(model, "BN(freeze=0.6)", max_iter=ITERATIONS)
    expected = Training(network("BN(freeze=0.6)")).iterate().model
    alike(Training(model).iterate().model, expected, 0.0)


@every_norm
def test_a_frozen_model_folds(spec: str) -> None:
    model = network(spec)
    find_chain_at_call(model)
    Training(model).iterate()
    x = images(77)
    trained = model(
        x
    )  # still in training mode, in which a frozen layer is what it is in evaluation
    fold(model.eval())
    assert not norms_of(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)


def test_parts_that_are_not_trained_keep_their_statistics() -> None:
    model = network("BN(freeze=0.6)")
    model[1].eval()
    NormSchedule(model, 10, others, 2).before_step(6)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[4].running_mean.abs().min() > 0


def test_other_norms_keep_their_statistics() -> None:
    model = network("BN(freeze=0.6)")
    model[4] = nn.BatchNorm2d(6)
    NormSchedule(model, 10, others, 2).before_step(6)
    assert torch.equal(model[4].running_mean, torch.zeros(6)) and model[4].training
    assert model[1].running_mean.abs().min() > 0
