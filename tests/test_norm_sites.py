"""Code of detectron2 and torch that decides on the norm, and what it makes of ours."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


def _pair(zoo: Any, name: str, changes: list[tuple[str, Any]] = (), norm: str = "") -> tuple:
    """The same weights under BN (the oracle) and under CBN."""
    batchnorm = zoo.build(name, "BN", changes)
    model = zoo.build(name, norm or zoo.CBN, changes)
    model.load_state_dict(batchnorm.state_dict(), strict=True)
    return batchnorm, model


# One model whose sections have a norm each
MIXED = {
    "RESNETS": "KN",
    "FPN": "GKN",
    "ROI_BOX_HEAD": "MBN",
    "ROI_MASK_HEAD": "BRN",
    "SEM_SEG_HEAD": "BGN",
}


def _mixed(zoo: Any, **specs: str) -> nn.Module:
    """Panoptic FPN with all of our norms but CBN, at work."""
    sections = {section: zoo.NORMS[kind] for section, kind in MIXED.items()}
    return zoo.build("panoptic_fpn", "BN", sections={**sections, **specs})


def _boxes(outputs: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    found = outputs[0]["instances"]
    return found.pred_boxes.tensor, found.scores


# ---- weight decay --------------------------------------------------------------------------------


def test_weight_decay_norm_reaches_gamma_and_beta(zoo):
    from detectron2.solver import build_optimizer

    solver = [("SOLVER.WEIGHT_DECAY_NORM", 0.0), ("SOLVER.WEIGHT_DECAY", 1e-4)]
    cfg = zoo.yaml_config("mask_rcnn", solver)

    def decay(model: nn.Module) -> dict[str, float]:
        names = {id(p): n for n, p in model.named_parameters()}
        groups = build_optimizer(cfg, model).param_groups
        return {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}

    batchnorm, model = _pair(zoo, "mask_rcnn")
    assert decay(model) == decay(batchnorm)
    for target in (model, _mixed(zoo, RESNETS="KN")):
        found = decay(target)
        affine = {f"{n}.{p}" for n, m in zoo.our_layers(target).items() for p in m._parameters}
        assert {found[name] for name in affine} == {0.0}
        assert {value for name, value in found.items() if name not in affine} == {1e-4}


# ---- freezing ------------------------------------------------------------------------------------


def _input_hooks(model: nn.Module) -> dict[str, int]:
    return {n: len(m._forward_pre_hooks) for n, m in model.named_modules() if m._forward_pre_hooks}


@pytest.mark.parametrize("kind", ["CBN", "KN", "MBN", "BGN", "BRN"])
def test_freeze_at_2_freezes_and_releases(zoo, kind):
    from detectron2.layers import FrozenBatchNorm2d

    frozen_at = [("MODEL.BACKBONE.FREEZE_AT", 2)]
    model = zoo.build("mask_rcnn", zoo.NORMS[kind], frozen_at)
    oracle = zoo.build("mask_rcnn", "BN", frozen_at)

    def frozen(m: nn.Module) -> list[str]:
        return [n for n, layer in m.named_modules() if isinstance(layer, FrozenBatchNorm2d)]

    layers = zoo.cbn_layers(model)
    assert frozen(model) == frozen(oracle) and len(frozen(model)) == 11  # the stem and res2
    assert list(layers) == list(zoo.batchnorm_layers(oracle))
    assert not any(_frozen_at_2(name) for name in layers)
    # CBN has one hook on each convolution that feeds a trainable one, none on the frozen ones
    feeding = layers if kind == "CBN" else {}
    assert _input_hooks(model) == {name.removesuffix(".norm"): 1 for name in feeding}

    kept = {n: v.clone() for n, v in model.state_dict().items() if _frozen_at_2(n)}
    zoo.train(model)
    now = model.state_dict()
    assert kept and all(torch.equal(now[name], value) for name, value in kept.items())
    assert all(layer.num_batches_tracked == 2 for layer in layers.values())
    if kind in ("CBN", "MBN", "BRN"):
        assert all(layer.steps == 1 for layer in layers.values())
    if kind == "KN":  # behind the frozen part chains begin
        begins = {n for n, m in layers.items() if not hasattr(m.chain, "weight")}
        block = "backbone.bottom_up.res3.0"
        assert begins == {f"{block}.{conv}.norm" for conv in ("shortcut", "conv1")} | {
            "backbone.fpn_lateral2.norm"
        }


def test_freeze_at_2_leaves_gkn_a_groupnorm(zoo):
    """As detectron2 does with GN: its parameters are frozen, it stays what it is."""
    model = zoo.build("mask_rcnn", zoo.NORMS["GKN"], [("MODEL.BACKBONE.FREEZE_AT", 2)])
    layers = zoo.our_layers(model)
    trained = {n: any(p.requires_grad for p in m.parameters()) for n, m in layers.items()}
    assert trained == {name: not _frozen_at_2(name) for name in layers}
    assert sum(map(_frozen_at_2, layers)) == 11
    kept = {n: v.clone() for n, v in model.state_dict().items() if _frozen_at_2(n)}
    zoo.train(model)
    now = model.state_dict()
    assert kept and all(torch.equal(now[name], value) for name, value in kept.items())


def _frozen_at_2(name: str) -> bool:
    return ".stem." in name or ".res2." in name


def test_freezing_a_running_model_releases_what_it_kept(zoo):
    import gc

    model = zoo.build("faster_rcnn_fpn", zoo.CBN)
    stage = model.backbone.bottom_up.res2
    norm = stage[0].conv1.norm
    zoo.train(model, 1)
    for block in stage.children():
        block.freeze()
    assert norm.conv is None and norm._take_conv_input() is None
    assert not [n for n in _input_hooks(model) if ".res2." in n]
    conv = stage[0].conv1
    x = torch.randn(1, conv.in_channels, 8, 8)
    conv(x)
    assert not [r for r in gc.get_referrers(x) if isinstance(r, dict) and "_conv_input" in r]
    zoo.train(model, 1)


def test_no_convolution_input_is_kept_after_a_forward(zoo):
    model = zoo.build("mask_rcnn", zoo.CBN)
    zoo.train(model, 1)
    assert [
        n for n, m in zoo.cbn_layers(model).items() if m.__dict__["_conv_input"] is not None
    ] == []
    zoo.evaluate(model)
    assert [
        n for n, m in zoo.cbn_layers(model).items() if m.__dict__["_conv_input"] is not None
    ] == []


# ---- PreciseBN -----------------------------------------------------------------------------------


def _precise_bn(target: nn.Module, loader: list[Any]) -> None:
    from detectron2.engine.hooks import PreciseBN

    torch.manual_seed(5)  # proposals and RoIs are sampled
    PreciseBN(0, target, loader, len(loader)).update_stats()


def test_precise_bn_of_detectron2_gives_batchnorms_statistics(zoo):
    """While nothing is remembered, a CBN model is the BN model."""
    batchnorm, model = _pair(zoo, "mask_rcnn", norm="CBN(burn_in=100)")
    loader = [zoo.random_inputs(seed) for seed in (20, 21, 22)]
    for target in (model, batchnorm):
        _precise_bn(target, loader)
    theirs = zoo.batchnorm_layers(batchnorm)
    for key, layer in zoo.cbn_layers(model).items():
        close = {"rtol": 1e-4, "atol": 1e-5, "msg": key}
        torch.testing.assert_close(layer.running_mean, theirs[key].running_mean, **close)
        torch.testing.assert_close(layer.running_var, theirs[key].running_var, **close)


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_precise_bn_only_reads_what_is_remembered(zoo, name):
    """Each layer's statistics become those of its inputs over all batches, as this model's training
    forward makes them; the window and the step counts stay."""
    model = zoo.build(name, zoo.CBN)
    zoo.train(model, 3, lr=0.01)
    layers = zoo.cbn_layers(model)
    with torch.no_grad():  # commits the last step
        zoo.losses(model, zoo.random_inputs(19))
    memory = {n: m.memory_state_dict() for n, m in layers.items()}
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, n=n: seen[n].append(args[0].detach().transpose(0, 1).flatten(1))
        )
        for n, m in layers.items()
    ]
    _precise_bn(model, [zoo.random_inputs(seed) for seed in (20, 21, 22)])
    for hook in hooks:
        hook.remove()

    for key, layer in layers.items():
        values = torch.cat(seen[key], 1).double()
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False, "msg": key}
        torch.testing.assert_close(layer.running_mean, values.mean(1), **close)
        torch.testing.assert_close(layer.running_var, values.var(1, correction=0), **close)
        now = layer.memory_state_dict()
        assert now["steps"] == memory[key]["steps"]
        assert now["forwards"] == memory[key]["forwards"]
        assert now["pushed"] == memory[key]["pushed"] == 3
        torch.testing.assert_close(_stores(now), _stores(memory[key]), rtol=0, atol=0)
    assert {m.momentum for m in layers.values()} == {0.1}
    zoo.train(model, 1)  # the buffers that fvcore put in place are trained on
    assert {len(m.memory) for m in layers.values()} == {3}


def _stores(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a saved memory that are of iterations before the present one."""
    return {part: state[part] for part in ("rows", "stacked", "kept", "older")}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "fvcore"])
def test_precise_bn_of_all_norms_gives_the_statistics_of_their_inputs(zoo, ours):
    """GKN has none; BGN's are those of its groups."""
    from detectron2.utils.events import EventStorage

    from cbn_det.run.precise_bn import recompute_statistics

    model = _mixed(zoo)
    zoo.train(model, 2, lr=0.01)
    layers = zoo.cbn_layers(model)
    assert {type(m).__name__ for m in layers.values()} == {"KN2d", "MBN2d", "BGN2d", "BRN2d"}
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0].double()))
        for n, m in layers.items()
    ]
    batches = [zoo.random_inputs(seed) for seed in (20, 21)]
    if ours:
        with EventStorage():
            recompute_statistics(model, batches, len(batches))
    else:
        _precise_bn(model, batches)
    for hook in hooks:
        hook.remove()
    for key, layer in layers.items():
        groups = 4 if type(layer).__name__ == "BGN2d" else layer.num_features
        values = torch.cat([x.transpose(0, 1).reshape(groups, -1) for x in seen[key]], 1)
        # fvcore averages unbiased variances, and takes all batches for one of the same size
        loose = 1e-3 if ours else 0.05 if "roi" in key else 0.03
        each = layer.num_features // groups
        mean, var = (
            v.float().repeat_interleave(each) for v in (values.mean(1), values.var(1, False))
        )
        close = {"rtol": loose, "atol": loose, "msg": key}
        torch.testing.assert_close(layer.running_mean, mean, **close)
        torch.testing.assert_close(layer.running_var, var, **close)


@pytest.mark.parametrize(
    ("kind", "ours"), [("CBN", True), ("CBN", False), ("KN", True), ("MBN", True), ("BRN", True)]
)
def test_precise_bn_leaves_memory_out_of_the_normalisation(zoo, kind, ours):
    """The statistics are those of the same weights under plain BatchNorm. With the window in them,
    the same few remembered iterations would shift every batch (it cost a third of the AP)."""
    from detectron2.utils.events import EventStorage

    from cbn_det.run.precise_bn import recompute_statistics

    model = zoo.build("faster_rcnn_fpn", zoo.NORMS[kind])
    zoo.train(model, 3, lr=0.01)
    theirs = zoo.build("faster_rcnn_fpn", "BN")
    theirs.load_state_dict(model.state_dict())
    batches = [zoo.random_inputs(seed) for seed in (20, 21)]
    for target in (model, theirs):
        if ours:
            with EventStorage():
                recompute_statistics(target, batches, len(batches))
        else:
            _precise_bn(target, batches)
    plain = dict(theirs.named_modules())
    for key, layer in zoo.cbn_layers(model).items():
        if "backbone" in key:  # RoI heads see sampled, and so other, proposals
            close = {"rtol": 1e-3, "atol": 1e-4, "msg": key}
            torch.testing.assert_close(layer.running_mean, plain[key].running_mean, **close)
            torch.testing.assert_close(layer.running_var, plain[key].running_var, **close)


def test_precise_bn_takes_heads_without_a_roi(zoo):
    """fvcore divides by the zero values that a mask head without a RoI saw; ours takes it."""
    from detectron2.utils.events import EventStorage
    from fvcore.nn.precise_bn import update_bn_stats

    from cbn_det.norms import settle
    from cbn_det.run.precise_bn import recompute_statistics

    model = zoo.build("mask_rcnn", zoo.CBN)
    zoo.train(model, 2, lr=0.01)
    settle(model)  # the last step carries running statistics along
    mask_head = {n: m for n, m in zoo.cbn_layers(model).items() if "mask_head" in n}
    assert len(mask_head) == 4
    kept = {n: m.running_var.clone() for n, m in mask_head.items()}
    body = model.backbone.bottom_up.res5[0].conv1.norm
    body_kept = body.running_var.clone()
    loader = [zoo.random_inputs(seed, objects=0) for seed in (30, 31)]

    broken = copy.deepcopy(model)  # fvcore leaves its hooks and its momentum behind
    with pytest.raises(ZeroDivisionError), EventStorage():
        update_bn_stats(broken, loader, 2)

    with EventStorage():
        assert recompute_statistics(model, loader, 2) == len(zoo.cbn_layers(model))
    assert not torch.equal(body.running_var, body_kept)
    for name, layer in mask_head.items():
        assert torch.equal(layer.running_var, kept[name]), name


# ---- RetinaNet's and FCOS's head: one stack of convolutions, five levels ------------------------


# with momentum 1 and these, the running statistics are those of the latest batch
OF_ONE_BATCH = {
    "CBN": "CBN(burn_in=0, window=4, ema='batch', momentum=1.0)",
    "KN": "KN(gain=0, ema='batch', momentum=1.0)",
    "MBN": "MBN(burn_in=100, ema='batch', momentum=1.0)",
    "BGN": "BGN(groups=4, ema='batch', momentum=1.0)",
    "BRN": "BRN(burn_in=100, ema='batch', momentum=1.0)",
}


@pytest.mark.parametrize(
    ("name", "kind"), [("fcos", "CBN"), *(("retinanet", kind) for kind in OF_ONE_BATCH)]
)
def test_five_levels_keep_their_statistics_apart(zoo, name, kind):
    from detectron2.layers import CycleBatchNormList

    model = zoo.build(name, OF_ONE_BATCH[kind])
    head = model.head
    lists = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert [len(norms) for norms in lists] == [5] * 4  # two convolutions in each of two subnets
    assert all(norms.weight.shape == norms.bias.shape == (16,) for norms in lists)
    assert not any(layer.affine for norms in lists for layer in norms)

    # what each convolution of the head put out, level by level
    outputs: dict[nn.Module, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda conv, args, out: outputs.setdefault(conv, []).append(out.detach())
        )
        for subnet in (head.cls_subnet, head.bbox_subnet)
        for module in subnet
        if isinstance(module, nn.Conv2d)
    ]
    zoo.train(model, 1)
    for hook in hooks:
        hook.remove()

    assert [len(levels) for levels in outputs.values()] == [5] * 4
    for subnet in (head.cls_subnet, head.bbox_subnet):
        for conv, norms in zip(subnet[0::3], subnet[1::3], strict=True):
            sizes = [tuple(out.shape[2:]) for out in outputs[conv]]
            assert sizes[0] == (12, 16) and len(set(sizes)) == 5
            for level, layer in enumerate(norms):
                assert getattr(layer, "conv", None) is (conv if kind == "CBN" else None)
                groups = 4 if kind == "BGN" else layer.num_features
                values = outputs[conv][level].transpose(0, 1).reshape(groups, -1)
                mean, var = (
                    v.repeat_interleave(layer.num_features // groups)
                    for v in (values.mean(1), values.var(1))
                )
                torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=1e-6)
                assert int(layer.num_batches_tracked) == 1

    zoo.train(model, 1)
    for norms in lists:
        assert [int(layer.num_batches_tracked) for layer in norms] == [2] * 5
        if kind in ("CBN", "MBN", "BRN"):
            assert [layer.steps for layer in norms] == [1] * 5
        if kind == "CBN":
            assert [len(layer.memory) for layer in norms] == [1] * 5
    assert all(p.grad.count_nonzero() > 0 for norms in lists for p in (norms.weight, norms.bias))


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@pytest.mark.parametrize("kind", ["KN", "MBN", "BRN"])
def test_a_levels_norm_sees_that_level_only(zoo, name, kind):
    """Over several steps and second passes of Double Forward, which end early."""
    from detectron2.layers import CycleBatchNormList

    model = zoo.build(name, zoo.NORMS[kind])
    sizes: dict[str, set[int]] = {}
    for key, norms in model.head.named_modules():
        if isinstance(norms, CycleBatchNormList):
            for level, layer in enumerate(norms):
                seen = sizes.setdefault(f"{key}.{level}", set())
                layer.register_forward_pre_hook(
                    lambda m, args, seen=seen: seen.add(args[0].shape[2])
                )
    zoo.train(model, 3, lr=0.01)
    zoo.evaluate(model)
    assert len(sizes) == 4 * 5
    for key, seen in sizes.items():
        height = (12, 6, 3, 2, 1)[int(key[-1])]
        assert seen == {height}, key


def _train_heads(zoo, head, other, sizes):
    """Compares the gradients of two heads with the same weights on maps of these sizes, over steps:
    once levels remember, each has statistics of its own."""
    other.load_state_dict(head.state_dict())
    heads = [head.double(), other.double()]
    optimizers = [torch.optim.SGD(h.parameters(), 0.01) for h in heads]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        maps = [torch.randn(2, 16, n, n, generator=generator, dtype=torch.float64) for n in sizes]
        for h, optimizer in zip(heads, optimizers, strict=True):
            optimizer.zero_grad()
            logits, deltas = h([(x * 2**i + i).requires_grad_() for i, x in enumerate(maps)])
            sum(x.square().sum() for x in (*logits, *deltas)).sqrt().backward()
        torch.testing.assert_close(*([p.grad for p in h.parameters()] for h in heads))
        layers = [list(zoo.our_layers(h).values()) for h in heads]
        torch.testing.assert_close(*([layer.memory.pending for layer in own] for own in layers))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_each_level_changes_nothing(zoo, reentrant):
    """It recomputes the last level first."""
    from torch.utils.checkpoint import checkpoint

    plain, other = (zoo.build("retinanet", zoo.NORMS["MBN"]).head for _ in range(2))
    for subnet in (other.cls_subnet, other.bbox_subnet):
        whole = subnet.forward
        subnet.forward = lambda x, f=whole: checkpoint(f, x, use_reentrant=reentrant)
    _train_heads(zoo, plain, other, (16, 8, 4, 2, 1))


@pytest.mark.parametrize("sizes", [(16, 8, 4, 2, 1), (8, 4, 2, 1, 1)])
def test_a_checkpoint_around_all_levels_changes_nothing(zoo, sizes):
    """Of small images the last levels are alike."""
    from torch.utils.checkpoint import checkpoint

    plain, other = (zoo.build("retinanet", zoo.NORMS["MBN"]).head for _ in range(2))
    whole = other.forward  # the head's own hooks are not called when it is recomputed
    other.forward = lambda maps: checkpoint(whole, maps, use_reentrant=False)
    _train_heads(zoo, plain, other, sizes)


def test_heads_without_a_norm_of_ours_can_be_scripted(zoo):
    """TorchScript compiles the hooks of a module, too."""
    head = zoo.build("retinanet", "").head
    maps = [torch.randn(2, 16, size, size) for size in (16, 8, 4, 2, 1)]
    torch.testing.assert_close(torch.jit.script(head)(maps), head(maps))


def test_levels_of_one_size_that_a_checkpoint_recomputes_are_refused(zoo):
    from torch.utils.checkpoint import checkpoint

    norms = zoo.build("retinanet", zoo.NORMS["MBN"]).head.cls_subnet[1]
    norms.begin()
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    outputs = [checkpoint(norms, x * level, use_reentrant=False) for level in range(1, 6)]
    with pytest.raises(RuntimeError, match="5 levels have that size. Checkpoint the head"):
        outputs[-1].sum().backward()


def test_an_iteration_that_breaks_off_between_levels_does_not_shift_the_next(zoo):
    plain, other = (zoo.build("retinanet", zoo.CBN) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    zoo.train(plain, 1)
    zoo.train(other, 1)
    conv, calls = other.head.cls_subnet[0], []

    def out_of_memory(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = conv.register_forward_pre_hook(out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        zoo.train(other, 1)
    handle.remove()
    heights = []
    for layer in other.head.cls_subnet[1]:
        layer.register_forward_pre_hook(lambda m, args: heights.append((m, args[0].shape[2])))
    zoo.train(other, 1)
    levels = list(other.head.cls_subnet[1])
    assert [(levels.index(m), height) for m, height in heights] == [
        *((0, 12), (1, 6), (2, 3), (3, 2), (4, 1))
    ]


def test_gkn_is_shared_by_the_levels_as_gn_is(zoo):
    model = zoo.build("retinanet", zoo.NORMS["GKN"])
    norms = [m for n, m in zoo.our_layers(model).items() if n.startswith("head.")]
    calls: list[nn.Module] = []
    for norm in norms:
        norm.register_forward_hook(lambda m, args, out: calls.append(m))
    zoo.train(model, 1)
    assert len(norms) == 4 and all(calls.count(norm) == 5 for norm in norms)


def test_options_reach_every_level(zoo):
    model = zoo.build(
        "retinanet", "CBN(window=7, burn_in=0.5, compensation='none', positions=9, eps=0.001)"
    )
    layer = model.head.cls_subnet[1][3]
    options = layer.options()
    assert options == {
        "window": 7,
        "burn_in": 0.5,
        "compensation": "none",
        "positions": 9,
        "freeze": 1.0,
        "ema": "pooled",
        "momentum": 0.1,
        "eps": 0.001,
        "affine": False,
    }


def test_a_users_small_batch_norm_gets_five_levels_too(zoo):
    from cbn_det.norms import Estimate, SmallBatchNorm2d, register_norm, spec

    @register_norm("Plain")
    class Plain2d(SmallBatchNorm2d):
        def estimate(self, batch):
            return Estimate(batch.mean, batch.var, 1.0)

    try:
        model = zoo.build("retinanet", "Plain(ema='batch')")
        assert len(model.head.cls_subnet[1]) == 5
        oracle = zoo.build("retinanet", "BN")
        for left, right in zip(zoo.train(model, 1), zoo.train(oracle, 1), strict=True):
            assert left == pytest.approx(right, rel=1e-4)
    finally:
        del spec._NORMS["Plain"]


def test_accumulated_forwards_are_one_iteration(zoo):
    """Two forwards and backwards for one optimiser step, through heads that some images leave
    empty: one entry a layer, and read-only memory in between."""
    model = zoo.build("mask_rcnn", zoo.CBN)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        entries = []
        for seed, objects in ((2 * step, 2), (2 * step + 1, 0)):
            sum(zoo.losses(model, zoo.random_inputs(seed, objects=objects)).values()).backward()
            entries.append({len(m.memory) for m in zoo.cbn_layers(model).values()})
        assert entries == [{step}, {step}]
        optimizer.step()


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "mask_rcnn_regnet"])
def test_state_dict_is_batchnorms_both_ways(zoo, name):
    model = zoo.build(name, zoo.CBN)
    zoo.train(model)
    batchnorm = zoo.build(name, "BN", seed=1)
    batchnorm.load_state_dict(model.state_dict(), strict=True)
    back = zoo.build(name, zoo.CBN, seed=2)
    back.load_state_dict(batchnorm.state_dict(), strict=True)
    if name == "retinanet":
        for m in (model, batchnorm, back):
            m.test_score_thresh = 0.0
    outputs = [zoo.evaluate(m) for m in (model, batchnorm, back)]
    boxes, scores = _boxes(outputs[0])
    assert len(boxes) > 0
    for other in outputs[1:]:
        assert torch.equal(_boxes(other)[0], boxes) and torch.equal(_boxes(other)[1], scores)


@pytest.mark.parametrize("name", ["semantic_fpn", "deeplab_v3_plus"])
def test_window_one_trains_as_batchnorm(zoo, name):
    """The degenerate setting, through whole networks in float64: losses, weights, buffers."""
    batchnorm, model = _pair(zoo, name, norm="CBN(window=1, ema='batch')")
    found = []
    for m in (batchnorm, model):
        torch.manual_seed(3)  # dropout
        found.append(zoo.train(m.double(), 3))
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    theirs = batchnorm.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6, msg=key)


def test_burn_in_is_batchnorm(zoo):
    """Mask R-CNN's first step: losses and buffers. (Its float32 gradients are no oracle: where a
    ReLU flips they differ by percents between two runs of BN whose weights differ by 1e-7.)"""
    batchnorm, model = _pair(zoo, "mask_rcnn", norm="CBN(burn_in=100, ema='batch')")
    found = []
    for m in (batchnorm, model):
        torch.manual_seed(3)  # proposals and RoIs are sampled
        found.append(zoo.train(m, 1))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    theirs = dict(batchnorm.named_buffers())
    for key, value in model.named_buffers():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5, msg=key)
    assert all(len(layer.memory) == 0 for layer in zoo.cbn_layers(model).values())


@pytest.mark.parametrize("kind", ["CBN", "KN", "GKN", "MBN", "BGN", "BRN"])
def test_detection_checkpointer_round_trip(zoo, tmp_path, kind):
    from detectron2.checkpoint import DetectionCheckpointer

    from cbn_det.norms import find_chain_at_call

    changes = [("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)]
    ours = zoo.NORMS[kind]
    model = zoo.build("faster_rcnn_fpn", ours, changes)
    zoo.train(model)
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    for norm in (ours,) if kind == "GKN" else (ours, "BN"):
        other = zoo.build("faster_rcnn_fpn", norm, changes, seed=1)
        find_chain_at_call(other)  # GKN predicts in evaluation, too
        told = DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
        assert told == {}
        boxes, scores = _boxes(zoo.evaluate(model))
        assert torch.equal(_boxes(zoo.evaluate(other))[0], boxes) and len(boxes)
        assert torch.equal(_boxes(zoo.evaluate(other))[1], scores)


def test_regnet_is_initialised_as_with_batchnorm(zoo):
    """RegNet's init decides by isinstance; conv weights come from the same random numbers."""
    batchnorm, model = (zoo.build("mask_rcnn_regnet", norm) for norm in ("BN", zoo.CBN))
    expected = batchnorm.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    block = model.backbone.bottom_up.s1.b1
    assert block.bn.conv is block.proj and block.f.a_bn.conv is block.f.a


# ---- no region of interest -----------------------------------------------------------------------


def _states(layers: dict[str, nn.Module]) -> dict[str, Any]:
    """State and, where there is one, memory, without whether an optimiser has stepped."""
    return {
        name: (
            {k: v.clone() for k, v in m.state_dict().items()},
            (
                copy.deepcopy({**m.memory_state_dict(), "stepped": None})
                if hasattr(m, "memory")
                else {}
            ),
        )
        for name, m in layers.items()
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


@pytest.mark.parametrize(
    ("without", "box", "mask"),
    [
        ("mask", "CBN", "CBN"),
        ("box and mask", "CBN", "KN"),
        ("box and mask", "MBN", "BGN"),
        ("box and mask", "GKN", "BRN"),
        ("mask", "BN", "MBN"),
    ],
)
def test_no_roi_leaves_the_heads_norms_alone(zoo, without, box, mask):
    """Images without objects give the mask head nothing; without proposals nor the box head."""
    sections = {"ROI_BOX_HEAD": box, "ROI_MASK_HEAD": mask}
    sections = {section: zoo.NORMS.get(kind, kind) for section, kind in sections.items()}
    model = zoo.build("mask_rcnn", zoo.CBN, sections=sections)
    zoo.train(model, 2, lr=0.01)
    heads = tuple(f"roi_heads.{head}_head." for head in without.split(" and "))
    layers = {n: m for n, m in zoo.our_layers(model).items() if n.startswith(heads)}
    assert len(layers) == (6 if "box" in without else 4)
    if "box" in without:
        model.proposal_generator.min_box_size = 1e6  # no proposal is that large
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.zero_grad()
    empty = zoo.random_inputs(7, objects=0)
    sum(zoo.losses(model, empty).values()).backward()  # commits the second step, stages nothing
    before = _states(layers)
    for _ in range(2):
        terms = zoo.losses(model, empty)
        assert all(term.isfinite() for term in terms.values())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        gradients = [p.grad for m in layers.values() for p in (m.weight, m.bias)]
        assert all(g is not None and g.count_nonzero() == 0 for g in gradients)
        optimizer.step()
    now = _states(layers)
    assert [name for name in before if not _equal(now[name], before[name])] == []
    body = model.backbone.bottom_up.res5[0].conv1.norm
    assert body.steps == 3  # the clock of the rest has run on
    model.proposal_generator.min_box_size = 0
    zoo.train(model, 2)
    for name, (_, memory) in before.items():
        if memory:
            assert layers[name].steps == memory["steps"] + 1, name


# ---- counting, casting, converting ---------------------------------------------------------------


def test_flops_of_evaluation_are_batchnorms(zoo):
    from detectron2.utils.analysis import FlopCountAnalysis, flop_count_operators

    batchnorm, model = _pair(zoo, "mask_rcnn")
    image = [{k: v for k, v in zoo.random_inputs(1, 1)[0].items() if k == "image"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing
        theirs, ours = (flop_count_operators(m, image) for m in (batchnorm, model))
        counted = FlopCountAnalysis(model.eval(), image).unsupported_ops_warnings(False)
        counted.total()
        unsupported = counted.unsupported_ops()
    assert ours == theirs and ours["conv"] > 0
    assert not [op for op in unsupported if "norm" in op]


def test_bfloat16_autocast(zoo):
    """Two steps of a whole detector; statistics and all that is remembered stay in float32."""
    model = zoo.build("mask_rcnn", zoo.CBN)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for seed in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = zoo.losses(model, zoo.random_inputs(seed))
        sum(terms.values()).backward()
        optimizer.step()
        assert all(term.isfinite() for term in terms.values())
    layers = zoo.cbn_layers(model)
    assert {len(m.memory) for m in layers.values()} == {1}
    states = [m.memory_state_dict() for m in layers.values()]
    stores = [[*_stores(state).values(), state["pending"]] for state in states]
    assert {value.dtype for value in tree_leaves(stores)} == {torch.float32}
    assert {m.running_var.dtype for m in layers.values()} == {torch.float32}
    seen = []
    stem = model.backbone.bottom_up.stem.conv1
    stem.norm.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zoo.losses(model, zoo.random_inputs(5))
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("turn", range(2))
def test_bfloat16_autocast_with_the_other_norms(zoo, turn):
    """Nearly what float32 gives; statistics and memory are float32, chains the same."""
    from cbn_det.norms import DoubleForward

    kinds = list(MIXED.values())
    sections = {
        section: zoo.NORMS[kinds[(i + turn) % len(kinds)]] for i, section in enumerate(MIXED)
    }
    found = []
    for enabled in (False, True):
        model = zoo.build("panoptic_fpn", "BN", sections=sections)
        # small steps: the stem's gradient in bfloat16 is little more than rounding noise
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        double_forward = DoubleForward(model)
        for seed in range(2):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                terms = zoo.losses(model, zoo.random_inputs(seed))
            sum(terms.values()).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            with zoo.EventStorage():
                double_forward.refresh()
        found.append((model, {name: float(term.detach()) for name, term in terms.items()}))
    (exact, expected), (model, losses) = found
    assert all(np.isfinite(list(losses.values())))
    for name in ("loss_sem_seg", "loss_rpn_cls"):  # those of RoIs depend on which are sampled
        assert losses[name] == pytest.approx(expected[name], rel=0.1), name
    layers = zoo.our_layers(exact)
    for name, layer in zoo.our_layers(model).items():
        if not isinstance(layer, nn.BatchNorm2d):
            assert layer.chain.describe({}) == layers[name].chain.describe({}), name
            continue
        state = layer.state_dict()
        if hasattr(layer, "memory"):
            memory = layer.memory
            state |= memory.pending | ({} if memory.held is None else {"held": memory.held})
        del state["num_batches_tracked"]
        assert {value.dtype for value in state.values()} == {torch.float32}, name
        if re.search(r"stem|res[23]", name):  # further on, rounding errors have added up
            error = (layer.running_mean - layers[name].running_mean).norm()
            assert error < 0.2 * layers[name].running_mean.norm(), name


def test_convert_sync_batchnorm_turns_cbn_into_syncbn_and_unbinds(zoo):
    """A documented side effect: torch decides by isinstance."""
    model = zoo.build("mask_rcnn", zoo.CBN)
    zoo.train(model, 1)
    layers = zoo.cbn_layers(model)
    expected = model.state_dict()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not zoo.cbn_layers(converted)
    sync = [n for n, m in converted.named_modules() if type(m) is nn.SyncBatchNorm]
    assert sync == list(layers)
    assert _input_hooks(converted) == {}
    assert all(layer.conv is None for layer in layers.values())
    for key, value in converted.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert len(zoo.evaluate(converted)) == 1


# ---- a norm that does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "told"),
    [
        ("GKN", r"groups=32 does not divide the 16 channels: use GKN\(groups=16\)"),
        ("GKN(groups=12)", r"groups=12 does not divide the 16 channels: use GKN\(groups=8\)"),
        ("BGN(groups=64)", r"groups=64 at a layer of 16 channels: .*at most 16"),
    ],
)
def test_a_norm_that_does_not_fit_a_site_names_its_keys_and_the_remedy(zoo, norm, told):
    """The check before a model is built does not know its channels, and refuses none of these."""
    from detectron2.modeling import build_model

    from cbn_det.plugin.registry import check_config_norms

    cfg = zoo.yaml_config("mask_rcnn")
    cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = norm
    check_config_norms(cfg)
    keys = r"MODEL\.FPN\.NORM, MODEL\.ROI_MASK_HEAD\.NORM: "
    with pytest.raises(ValueError, match=rf"^{keys}norm '{re.escape(norm)}': {told}"):
        build_model(cfg)
    check_config_norms(zoo.yaml_config("mask_rcnn"))  # the keys of another config count no more
    with pytest.raises(ValueError, match=rf"^norm '{re.escape(norm)}': "):
        build_model(cfg)


# ---- the table of a run --------------------------------------------------------------------------


def test_norm_table_tells_which_layer_got_what(zoo):
    from cbn_det.norms import format_norm_table, norm_rows, resolve_burn_in

    cfg = zoo.yaml_config("mask_rcnn", [("MODEL.BACKBONE.FREEZE_AT", 2)])
    cfg.MODEL.RESNETS.NORM = "CBN(window=8, burn_in=0.5)"
    cfg.MODEL.FPN.NORM = "CBN(compensation='none', burn_in=30)"
    cfg.MODEL.ROI_BOX_HEAD.NORM = "GN"
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 32  # GN has 32 groups
    cfg.MODEL.ROI_MASK_HEAD.NORM = "BN"
    from detectron2.modeling import build_model

    model = build_model(cfg).train()
    resolve_burn_in(model, 1000)
    rows = {row.name: row for row in norm_rows(model)}
    assert len(rows) == 11 + 42 + 8 + 2 + 4

    stem = rows["backbone.bottom_up.stem.conv1.norm"]
    assert (stem.norm, stem.trainable, stem.conv) == ("FrozenBN", False, "")
    assert stem.channels == 8
    res3 = rows["backbone.bottom_up.res3.0.conv2.norm"]
    assert res3.norm == "CBN" and res3.trainable
    assert res3.conv == "backbone.bottom_up.res3.0.conv2" and res3.channels == 8
    assert "window=8" in res3.options and "burn_in=500" in res3.options
    fpn = rows["backbone.fpn_output3.norm"]
    assert fpn.norm == "CBN" and "compensation='none'" in fpn.options
    assert "burn_in=30" in fpn.options
    box = [row for name, row in rows.items() if "box_head" in name]
    assert {row.norm for row in box} == {"GN"} and all(row.trainable for row in box)
    mask = [row for name, row in rows.items() if "mask_head" in name]
    assert {row.norm for row in mask} == {"BN"}

    text = format_norm_table(list(rows.values()))
    lines = text.splitlines()
    for total in ("11 layers, 11 frozen: FrozenBN", "2 layers: GN", "4 layers: BN"):
        assert any(line.endswith(f"] {total}") for line in lines), text
    assert re.search(r"\[\w\] 42 layers: CBN\(window=8", text)
    fpn_letter = re.search(r"\[(\w)\] 8 layers: CBN\(.*compensation='none'", text)[1]
    assert re.search(rf"backbone\.fpn_output3\.norm +\[{fpn_letter}\] CBN", text)
    first_layer = next(i for i, x in enumerate(lines) if "stem.conv1.norm" in x or "fpn_" in x)
    assert all("layers" not in line for line in lines[first_layer:]), "totals come first"
    for name in rows:
        assert name in text


@pytest.mark.parametrize("norm", ["CBN", "BN"])
def test_norm_table_of_a_shared_head(zoo, norm):
    from cbn_det.norms import norm_rows

    model = zoo.build("retinanet", norm)
    rows = [row for row in norm_rows(model) if row.name.startswith("head.")]
    assert len(rows) == 4 * 5
    assert rows[0].name == "head.cls_subnet.1.0" and rows[4].name == "head.cls_subnet.1.4"
    assert {row.conv for row in rows[:5]} == {"head.cls_subnet.0" if norm == "CBN" else ""}
    # each level's norm has no parameters of its own, but statistics that move
    assert all(row.trainable for row in rows)
