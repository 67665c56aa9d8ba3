"""Whole detectors on two ranks (gloo, CPU): nothing hangs where one rank has no RoI, running
statistics are pooled before they are used or saved, and SyncBN's replacement synchronises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import in_order, run_ranks
from test_accumulate import make_trainer
from tiny_run import tiny_inputs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in tensors.items()}


def statistics(model: nn.Module) -> dict[str, np.ndarray]:
    return arrays({n: b for n, b in model.named_buffers() if ".running_" in n})


# ---- a rank without RoIs ---------------------------------------------------------------------

# Mask R-CNN's box and mask head; the rest of it has BN
HEADS = [("KN", "GKN"), ("MBN", "BGN"), ("BRN", "CBN"), ("SyncBN", "SyncBN")]
SYNC_BN = "naiveSyncBN_N"  # what our launcher takes for SyncBN on CPU


def _one_rank_without_rois(rank: int, world: int, heads: tuple[str, str]) -> Any:
    import zoo_models as zoo

    import cbn_det
    from cbn_det.norms import DoubleForward, memory_state_dict, sync_running_stats

    cbn_det.register()
    specs = [zoo.NORMS.get(kind, SYNC_BN) for kind in heads]
    sections = dict(zip(("ROI_BOX_HEAD", "ROI_MASK_HEAD"), specs, strict=True))
    model = zoo.build("mask_rcnn", "BN", sections=sections)
    if rank == 1:
        model.proposal_generator.min_box_size = 1e6  # no proposal is that large
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    double_forward = DoubleForward(parallel)
    before = statistics(model)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        batch = zoo.random_inputs(10 * step + rank, images=1, objects=0 if rank else 3)
        terms = zoo.losses(parallel, batch)
        sum(terms.values()).backward()
        optimizer.step()
        with zoo.EventStorage():
            double_forward.refresh()
        losses.append(sum(float(term.detach()) for term in terms.values()))
    after = statistics(model)
    steps = {name: state["steps"] for name, state in memory_state_dict(model).items()}
    sync_running_stats(model)
    weights = arrays(dict(model.named_parameters()))
    return losses, before, after, steps, statistics(model), weights


@pytest.mark.parametrize("heads", HEADS, ids="-".join)
def test_a_rank_without_rois_hangs_nobody(zoo, tmp_path: Path, heads: tuple[str, str]) -> None:
    ranks = run_ranks(_one_rank_without_rois, 2, tmp_path, heads)
    for losses, *_ in ranks:
        assert np.isfinite(losses).all()
    (_, before, ours, steps, pooled, weights), (_, _, theirs, their_steps, their_pooled, _) = ranks
    for name, value in ranks[1][5].items():
        np.testing.assert_array_equal(value, weights[name])
    remembers = [head for head in heads if head in ("CBN", "MBN", "BRN")]
    assert set(steps.values()) == ({2} if remembers else set())
    assert set(their_steps.values()) == ({0} if remembers else set())
    of_heads = [name for name in before if "box_head" in name or "mask_head" in name]
    without_statistics = 4 if "GKN" in heads else 0
    assert len(of_heads) == 2 * (2 + 4 - without_statistics)
    for name in of_heads:
        assert not np.array_equal(ours[name], before[name]), name
        if heads[0] == "SyncBN":
            np.testing.assert_array_equal(theirs[name], ours[name])
            continue
        np.testing.assert_array_equal(theirs[name], before[name])  # it saw nothing
        np.testing.assert_allclose(pooled[name], ours[name], rtol=1e-6)  # and so it does not count
        np.testing.assert_allclose(their_pooled[name], ours[name], rtol=1e-6)


# ---- pooling before use ----------------------------------------------------------------------

POOLED = {
    "KN BGN MBN": ("KN", "BGN(groups=4)", "MBN(burn_in=0)"),
    "BRN CBN BGN": ("BRN(burn_in=0)", "CBN(burn_in=0)", "BGN(groups=8, ema='batch')"),
}


def _train_two_ranks(rank: int, world: int, inputs: Path, folder: Path, norms: Any) -> Any:
    from detectron2.utils import comm

    import cbn_det
    from cbn_det.plugin import hooks

    cbn_det.register()
    comm.create_local_process_group(world)
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
    words = [word for pair in zip(keys, norms, strict=True) for word in pair]
    trainer = make_trainer("detectron2", inputs, folder, *words, "SOLVER.MAX_ITER", "2")
    model = trainer.bare_model
    found: dict[str, Any] = {}
    pool, evaluate = hooks.sync_running_stats, trainer.evaluate

    def noted_pool(pooled: nn.Module) -> None:
        found["before"] = statistics(model)
        pool(pooled)

    def noted_evaluate() -> Any:
        found["evaluated"] = statistics(model)
        return {}

    hooks.sync_running_stats = noted_pool
    for hook in trainer._hooks:
        if hasattr(hook, "_func") and hook._func == evaluate:
            hook._func = noted_evaluate
    trainer.train()
    return found


@pytest.mark.parametrize("norms", POOLED.values(), ids=POOLED)
def test_statistics_are_pooled_before_evaluating_and_saving(
    inputs: Path, tmp_path: Path, norms: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    ranks = run_ranks(_train_two_ranks, 2, tmp_path, inputs, folder, norms)
    saved = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    means = [name for name in ranks[0]["before"] if name.endswith("running_mean")]
    assert len(means) == 53 + 8 + 1
    for name in means:
        variance = name.replace("running_mean", "running_var")
        mean, var = (np.stack([r["before"][key] for r in ranks]) for key in (name, variance))
        assert mean.std(0).max() > 0, name  # each rank has seen other images
        expected = {name: mean.mean(0), variance: var.mean(0) + mean.var(0)}
        for key, value in expected.items():
            for found in (ranks[0]["evaluated"], ranks[1]["evaluated"], arrays(saved)):
                np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


# ---- SyncBN ----------------------------------------------------------------------------------


def _one_step(rank: int, world: int, norm: str) -> Any:
    """Of Faster R-CNN on this rank's share of two images."""
    import zoo_models as zoo

    import cbn_det

    cbn_det.register()
    model = zoo.build("faster_rcnn_fpn", norm)
    counts = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda m, args, name=name: counts.update({name: args[0].numel() / args[0].shape[1]})
            )
    images = zoo.random_inputs(0, images=2)
    parallel, share = model, images
    if world > 1:
        torch.randperm = in_order
        parallel, share = DistributedDataParallel(model, broadcast_buffers=False), [images[rank]]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    terms = zoo.losses(parallel, share)
    sum(terms.values()).backward()
    optimizer.step()
    losses = {name: float(term.detach()) for name, term in terms.items()}
    return losses, statistics(model), counts, arrays(dict(model.named_parameters()))


def test_two_ranks_of_sync_bn_are_one_of_the_doubled_batch(
    zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # anchors and proposals are sampled in order, so that it does not matter in which process
    monkeypatch.setattr(torch, "randperm", in_order)
    whole, expected, counts, weights = _one_step(0, 1, "BN")
    synchronised = run_ranks(_one_step, 2, tmp_path / "sync", SYNC_BN)
    apart = run_ranks(_one_step, 2, tmp_path / "apart", "BN")

    def loss(ranks: Any, name: str) -> float:
        return sum(losses[name] for losses, *_ in ranks) / len(ranks)

    assert len(whole) == 4
    for name, value in whole.items():
        assert loss(synchronised, name) == pytest.approx(value, rel=1e-3), name
    assert loss(apart, "loss_cls") != pytest.approx(whole["loss_cls"], rel=1e-3)
    differences = []
    for layer, count in counts.items():
        mean, var = (f"{layer}.running_{which}" for which in ("mean", "var"))
        # detectron2's takes the biased variance
        biased = 0.9 + (expected[var] - 0.9) * (count - 1) / count
        for _, found, _, _ in synchronised:
            np.testing.assert_allclose(found[mean], expected[mean], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found[var], biased, rtol=1e-3, atol=1e-4)
        differences += [abs(found[mean] - expected[mean]).max() for _, found, _, _ in apart]
    assert len(counts) == 63 and np.mean(differences) > 1e-3
    for name in weights:
        np.testing.assert_array_equal(synchronised[0][3][name], synchronised[1][3][name])
    assert max(abs(apart[0][3][n] - synchronised[0][3][n]).max() for n in weights) > 1e-4
