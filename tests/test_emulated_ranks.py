"""Ranks that are emulated in one process are what as many models beside each other are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cbn_det.norms import build_norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = pytest.mark.detectron2
RANKS, IMAGES, STEPS = 2, 2, 4


def conv(channels: int, out: int, size: int, norm: str) -> nn.Module:
    from detectron2.layers import Conv2d

    return Conv2d(channels, out, size, bias=False, norm=build_norm(norm, out))


class Heads(nn.Module):
    """A RoI head: images of an iteration have different numbers of RoIs."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv = conv(6, 5, 1, norm)

    def label_and_sample_proposals(self, rois: list[int]) -> list[list[int]]:
        return [[0] * count for count in rois]

    def forward(self, x: Tensor, rois: list[int]) -> Tensor:
        counts = [len(of_image) for of_image in self.label_and_sample_proposals(rois)]
        return self.conv(x.repeat_interleave(torch.tensor(counts), 0))


class Detector(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.body = conv(3, 6, 3, norm)
        self.roi_heads = Heads(norm)

    def forward(self, x: Tensor, rois: list[int]) -> Tensor:
        return self.roi_heads(self.body(x).relu(), rois)


def batches() -> list[SimpleNamespace]:
    torch.manual_seed(1)
    counts = [[1, 3, 2, 2], [4, 1, 1, 2], [2, 2, 3, 1], [1, 1, 1, 1]]
    return [SimpleNamespace(x=torch.randn(RANKS * IMAGES, 3, 6, 6), rois=c) for c in counts]


def step(model: nn.Module, x: Tensor, rois: list[int]) -> Tensor:
    """A loss that is a sum over RoIs, so that ranks' losses add up."""
    return model(x, rois).square().mul(torch.arange(5.0)[:, None, None]).sum()


@pytest.mark.parametrize("norm", ["BN", "CBN(burn_in=1)", "MBN(burn_in=1)"])
def test_each_rank_has_its_own_norms_and_all_the_same_weights(norm: str) -> None:
    from emulated import emulate_ranks, of_one_rank, pool_statistics

    torch.manual_seed(0)
    whole = Detector(norm)
    ranks = [copy.deepcopy(whole) for _ in range(RANKS)]
    emulate_ranks(whole, RANKS)
    assert sum(1 for _ in whole.parameters()) == sum(1 for _ in ranks[0].parameters())
    together = torch.optim.SGD(whole.parameters(), 0.01)
    # one optimizer steps for all ranks, as they step at once
    apart = torch.optim.SGD([p for rank in ranks for p in rank.parameters()], 0.01)
    for batch in batches():
        together.zero_grad()
        apart.zero_grad()
        loss = step(whole, batch.x, batch.rois)
        losses = []
        for i, rank in enumerate(ranks):
            mine = slice(i * IMAGES, (i + 1) * IMAGES)
            losses.append(step(rank, batch.x[mine], batch.rois[mine]))
        torch.testing.assert_close(loss, sum(losses))
        loss.backward()
        sum(losses).backward()
        for p, *of_ranks in zip(whole.parameters(), *(r.parameters() for r in ranks), strict=True):
            total = sum(q.grad for q in of_ranks)
            torch.testing.assert_close(p.grad, total)
            for q in of_ranks:
                q.grad = total.clone()
        together.step()
        apart.step()
    pool_statistics(whole)
    found = of_one_rank(whole.state_dict())
    for name in ("body.norm", "roi_heads.conv.norm"):
        norms = [rank.get_submodule(name) for rank in ranks]
        for layer in norms:
            getattr(layer, "settle", lambda: None)()
        means = torch.stack([layer.running_mean for layer in norms])
        variances = torch.stack([layer.running_var for layer in norms])
        torch.testing.assert_close(found[f"{name}.running_mean"], means.mean(0))
        between = means.var(0, correction=0)
        torch.testing.assert_close(found[f"{name}.running_var"], variances.mean(0) + between)
    assert found.keys() == ranks[0].state_dict().keys()
    whole.eval()
    ranks[0].load_state_dict(found)
    ranks[0].eval()
    last = batches()[0]
    torch.testing.assert_close(whole(last.x, last.rois), ranks[0](last.x, last.rois))


@pytest.mark.parametrize(
    ("norm", "iteration"),
    [
        ("BN", 600),
        ("BN(freeze=0.5)", 300),
        ("CBN(burn_in=0.4)", 240),
        ("CBN(burn_in=0.4, freeze=0.67)", 240),
        ("MBN(burn_in=0.8, freeze=0.5)", 300),
        ("CBN(burn_in=100)", 100),
        ("BGN", 0),
        ("GN", 0),
        ("SyncBN", 0),
        ("SyncBN(start=0.67)", 402),
    ],
)
def test_what_norms_share_is_where_they_are_batchnorm(norm: str, iteration: int) -> None:
    from emulated_ranks import batchnorm_until

    assert batchnorm_until(norm, 600) == iteration


def test_what_norms_share_is_trained_from_the_latest_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import emulated_ranks
    from emulated_ranks import Reached, train_shared

    begun = []

    class Trainer:
        stops: Sequence[int]

        def resume_or_load(self, resume: bool) -> None:
            latest = tmp_path / "last_checkpoint"
            begun.append((latest.read_text() if latest.exists() else "", list(self.stops)))

        def train(self) -> None:
            for stop in self.stops:
                name = f"model_{stop - 1:07d}.pth"
                (tmp_path / name).touch()
                (tmp_path / "last_checkpoint").write_text(name)
            raise Reached

    monkeypatch.setattr(emulated_ranks, "build", lambda *args: Trainer())
    for stops in ([20, 40], [30, 40, 50], [10, 50], [40, 10]):
        train_shared(stops, "8x1", 1, tmp_path, None)
    assert begun == [("", [20, 40]), ("model_0000019.pth", [30, 50]), ("", [10])]
