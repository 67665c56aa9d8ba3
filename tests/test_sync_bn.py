"""``SyncBN(start=...)``: BatchNorm, and from a time of the schedule on over all ranks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cbn_det.deploy import fold
from cbn_det.norms import (
    build_norm,
    clock,
    format_norm_table,
    norm_rows,
    sync_bn,
    sync_running_stats,
)
from cbn_det.run.norm_schedule import NormSchedule, as_at_the_end
from cbn_det.run.precise_bn import recompute_statistics

ITERATIONS, START = 6, 4
SPEC = "SyncBN(start=0.67)"


def images(i: int, sizes: Sequence[int]) -> list[Tensor]:
    """Those of each rank, whose means differ; of so many."""
    generator = torch.Generator().manual_seed(i)
    shift = torch.randn(sum(sizes), 1, 1, 1, generator=generator)
    x = torch.randn(sum(sizes), 3, 6, 6, generator=generator) + shift
    return list(x.double().split(list(sizes)))


def network(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3)).double()


def step(model: nn.Module, bare: nn.Module, x: Tensor, of_all: int, ranks: int) -> None:
    """Of the mean over all images; DistributedDataParallel divides by the ranks."""
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    (model(x).square().mean((1, 2, 3)).sum() * (ranks / of_all)).backward()
    optimizer.step()
    bare.zero_grad()


def state(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def train(rank: int, ranks: int, spec: str, sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    bare = network(build_norm(spec, 4))
    model = DistributedDataParallel(bare, broadcast_buffers=False)
    times = NormSchedule(bare, ITERATIONS, list)
    found = []
    for i, of_ranks in enumerate(sizes):
        times.before_step(i)
        step(model, bare, images(i, of_ranks)[rank], sum(of_ranks), ranks)
        found.append(state(bare))
    return found


def over_all_images(
    model: nn.Module, sizes: Sequence[Sequence[int]], start: int = 0
) -> list[list[Tensor]]:
    found = []
    for i, of_ranks in enumerate(sizes[start:], start):
        step(model, model, torch.cat(images(i, of_ranks)), sum(of_ranks), 1)
        found.append(state(model))
    return found


@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 0, 1)], ids=["uneven", "a rank has none"])
def test_from_the_start_on_it_is_batchnorm_over_all_images(sizes, tmp_path: Path) -> None:
    found = run_ranks(train, 3, tmp_path, "SyncBN", [sizes] * 3)
    expected = over_all_images(network(nn.BatchNorm2d(4)), [sizes] * 3)
    for rank in found:
        for of_ours, of_torch in zip(rank, expected, strict=True):
            for ours, theirs in zip(of_ours, of_torch, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_before_it_is_each_ranks_batchnorm_and_then_that_of_all(tmp_path: Path) -> None:
    sizes = [(2, 1)] * ITERATIONS
    ours = run_ranks(train, 2, tmp_path / "late", SPEC, sizes)
    plain = run_ranks(train, 2, tmp_path / "plain", "BN", sizes)
    for rank in (0, 1):
        for i in range(START):
            assert all(map(torch.equal, ours[rank][i], plain[rank][i])), i
        assert not all(map(torch.equal, ours[rank][START], plain[rank][START]))
    whole = network(nn.BatchNorm2d(4))
    names = list(whole.state_dict())
    whole.load_state_dict(dict(zip(names, ours[1][START - 1], strict=True)))
    expected = over_all_images(whole, sizes, START)
    for of_ours, of_torch in zip(ours[1][START:], expected, strict=True):
        for value, theirs in zip(of_ours, of_torch, strict=True):
            torch.testing.assert_close(value, theirs, rtol=1e-10, atol=1e-10)


def _statistics(rank: int, ranks: int, spec: str, whole: bool = False) -> list[Tensor]:
    layer = build_norm(spec, 3).double()
    batches = [torch.cat(b) if whole else b[rank] for b in (images(i, (1, 2)) for i in range(6))]
    for x in batches[:4]:
        layer(x)
    found = state(layer)
    layer.reset_running_stats()
    with torch.no_grad():  # an average begun anew is of what is shown
        for x in batches[4:]:
            layer(x)
    return found + state(layer)


@pytest.mark.parametrize("options", ["ema='pooled'", "momentum=None"])
def test_running_statistics_pooled_or_cumulative(options: str, tmp_path: Path) -> None:
    expected = _statistics(0, 1, f"BN({options})", whole=True)
    for rank in run_ranks(_statistics, 2, tmp_path, f"SyncBN({options})"):
        for ours, theirs in zip(rank, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def _without_an_image(rank: int, ranks: int) -> list[Tensor]:
    layer = build_norm("SyncBN", 3).double()
    x = torch.zeros(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    return [x.grad, layer.weight.grad, layer.running_mean, layer.running_var]


def test_where_no_rank_has_an_image_nothing_moves(tmp_path: Path) -> None:
    for x_grad, weight_grad, mean, var in run_ranks(_without_an_image, 2, tmp_path):
        assert x_grad.shape == (0, 3, 4, 4) and not weight_grad.any()
        assert not mean.any() and bool((var == 1).all())


def _checkpointed(rank: int, ranks: int, recompute: bool) -> list[Tensor]:
    model = network(build_norm("SyncBN", 4))
    x = images(0, (1, 2))[rank].requires_grad_()
    y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    y.square().mean().backward()
    return [*state(model), x.grad, *(p.grad for p in model.parameters())]


def test_an_activation_checkpoint_counts_a_forward_once(tmp_path: Path) -> None:
    plain, twice = (
        run_ranks(_checkpointed, 2, tmp_path / str(recompute), recompute)
        for recompute in (False, True)
    )
    assert all(map(torch.equal, plain[0] + plain[1], twice[0] + twice[1]))


def _recomputed(rank: int, ranks: int, trained: bool) -> list[Tensor]:
    model = network(build_norm(SPEC, 4)).append(build_norm("BN(freeze=0.5)", 2).double())
    if trained:
        as_at_the_end(model)
        assert model[4].frozen
    batches = [images(i, (1, 2))[rank] for i in range(3)]
    recompute_statistics(model, batches, 3, layers=[model[1]])
    seen = model[1](model[0](batches[0])).detach()
    return [seen.mean((0, 2, 3))]


def test_of_a_loaded_model_statistics_are_recomputed_over_the_ranks(tmp_path: Path) -> None:
    """As in the last part of its training."""
    late, early = (
        run_ranks(_recomputed, 2, tmp_path / str(trained), trained) for trained in (True, False)
    )
    assert max(float(mean.abs().max()) for [mean] in early) < 1e-9, "each rank for itself"
    assert min(float(mean.abs().max()) for [mean] in late) > 1e-3


@pytest.mark.detectron2
def test_a_rank_in_trouble_knows_that_the_others_wait_in_forward() -> None:
    from cbn_det.plugin.step import has_sync_norm

    model = network(build_norm(SPEC, 4))
    times = NormSchedule(model, ITERATIONS, list)
    for i in range(ITERATIONS):
        times.before_step(i)
        assert has_sync_norm(model) == (i >= START)


def _half(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    layer = build_norm("SyncBN", 3)
    x = images(0, (1, 2))[rank].float()
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x.bfloat16()).float(), layer(x)


def test_sixteen_bits_are_normalised_in_thirty_two(tmp_path: Path) -> None:
    for half, full in run_ranks(_half, 2, tmp_path):
        assert float((half - full).detach().abs().max()) < 0.05


def _pooled(rank: int, ranks: int) -> list[Tensor]:
    layer = build_norm(SPEC, 3)
    layer(images(0, (1, 2))[rank].float())
    sync_running_stats(layer)
    return state(layer)


def test_statistics_from_before_are_pooled_for_a_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(_pooled, 2, tmp_path)
    assert all(map(torch.equal, first, second))


def test_in_one_process_it_is_batchnorm_and_folds() -> None:
    model, plain = network(build_norm("SyncBN", 4)), network(nn.BatchNorm2d(4))
    x = images(0, (3,))[0]
    assert torch.equal(model(x), plain(x))
    model.eval(), plain.eval()
    expected = plain(x)
    assert len(fold(model).folded) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def _given_on_a_gpu(rank: int, ranks: int) -> dict[str, object]:
    layer = build_norm("SyncBN(eps=1e-4)", 3).to("meta")
    takes = inspect.signature(sync_bn.SyncBatchNorm.forward)
    given = {}

    class Torchs:
        @staticmethod
        def apply(x: Tensor, *rest: object) -> Tensor:
            given.update(takes.bind(None, x, *rest).arguments)
            return x

    sync_bn.SyncBatchNorm = Torchs
    for n in (2, 0):
        x = torch.empty(n, 3, 4, 4, device="meta", dtype=torch.bfloat16)
        assert layer(x).dtype == torch.bfloat16
        assert given["input"].dtype == (torch.bfloat16 if n else torch.float32)
    own = "weight", "bias", "running_mean", "running_var"
    assert all(given[name] is getattr(layer, name) for name in own)
    return {name: given[name] for name in ("eps", "momentum", "world_size")}


def test_on_a_gpu_the_kernels_are_torchs(tmp_path: Path) -> None:
    expected = {"eps": 1e-4, "momentum": 0.1, "world_size": 2}
    assert run_ranks(_given_on_a_gpu, 2, tmp_path) == [expected] * 2


def test_options_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("1", "-0.1", "True", "'0.5'", "None"):
        with pytest.raises(ValueError, match=rf"start={value}: expected a number in \[0, 1\)"):
            build_norm(f"SyncBN(start={value})", 4)
    monkeypatch.setattr(clock, "_warned", set())
    model = network(build_norm(SPEC, 4))
    with pytest.warns(UserWarning, match=r"start=0.67 of SyncBN.*NormSchedule\("):
        model(images(0, (1,))[0])
    NormSchedule(model, 600, list)
    assert "start=402" in format_norm_table(norm_rows(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(0, (1,))[0])
