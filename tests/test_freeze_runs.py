"""``freeze``, and SyncBN's ``start``, in the trainers of both engines, and in detectron2's own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from same_run import same, state_of
from tiny_run import evaluation_of, parsed, result_of, tiny_inputs
from torch import Tensor, nn

inputs = tiny_inputs

FROZEN = (
    *("MODEL.FPN.NORM", "MBN(window=3, burn_in=1, freeze=0.5)"),
    *("MODEL.ROI_BOX_HEAD.NORM", "BN(freeze=0.5)"),
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "()"),
    *("TEST.PRECISE_BN.NUM_ITER", "2"),
)


def detectron2_trainer(inputs: Path, output: Path, words: tuple[str, ...] = FROZEN) -> Any:
    from detectron2.utils import comm

    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, *words)
    cfg, _ = build_config(args, comm.get_world_size())
    prepare_datasets(cfg, args.coco_dataset)
    output.mkdir(exist_ok=True)
    torch.manual_seed(cfg.SEED)
    return Trainer(cfg, accumulate=2)


def standalone_trainer(inputs: Path, output: Path) -> Any:
    from test_standalone_run import make_trainer

    return make_trainer(inputs, output, "--accumulate", "2", *FROZEN)


@pytest.mark.parametrize(
    "make",
    [pytest.param(detectron2_trainer, marks=pytest.mark.detectron2), standalone_trainer],
)
def test_a_run_resumes_exactly_before_at_and_after_the_freeze(
    inputs: Path, tmp_path: Path, make: Any
) -> None:
    whole = tmp_path / "whole"
    trainer = make(inputs, whole)
    trainer.train()
    state = state_of(whole)
    training = state["trainer"] if "trainer" in state else state["training"]
    assert len(training["frozen_norms"]) == 8 + 1
    key = "backbone.fpn_lateral2.norm.running_mean"
    if key not in state["model"]:
        key = next(k for k in state["model"] if "fpn" in k and k.endswith("running_mean"))
    means = [_weights(whole, i)[key] for i in range(1, 6)]
    assert not torch.equal(means[0], means[1]) and not torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3]) and torch.equal(means[3], means[4])
    for last in (1, 2, 3):  # the first iteration after the freeze is 3
        broken = tmp_path / f"after {last}"
        broken.mkdir()
        shutil.copy(_checkpoint(whole, last), broken)
        (broken / "last_checkpoint").write_text(_checkpoint(whole, last).name)
        shutil.copy(whole / "metrics.json", broken)
        trainer = make(inputs, broken)
        trainer.resume_or_load() if hasattr(trainer, "resume_or_load") else trainer.resume()
        assert trainer.start_iter == last + 1
        trainer.train()
        assert same(state_of(broken)["model"], state["model"]), last


def _checkpoint(folder: Path, iteration: int) -> Path:
    path = folder / f"model_{iteration:07d}.pth"
    return path if path.exists() else folder / "model_final.pth"


def _weights(folder: Path, iteration: int) -> dict[str, Tensor]:
    return torch.load(_checkpoint(folder, iteration), weights_only=True)["model"]


def _statistics_of_a_rank(rank: int, world: int, inputs: Path, folder: Path) -> list[Tensor]:
    from detectron2.utils import comm

    comm.create_local_process_group(world)
    trainer = detectron2_trainer(inputs, folder)
    trainer.train()
    norms = [m for m in trainer.bare_model.modules() if getattr(m, "frozen", False)]
    assert len(norms) == 8 + 1
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


STARTED = (*FROZEN, "MODEL.FPN.NORM", "SyncBN(start=0.5)", "MODEL.ROI_BOX_HEAD.NORM", "")


def _synchronised(rank: int, world: int, inputs: Path, folder: Path) -> list[Any]:
    from detectron2.utils import comm

    comm.create_local_process_group(world)
    trainer = detectron2_trainer(inputs, folder / "whole", STARTED)
    trainer.train()
    if rank == 0:
        (folder / "broken").mkdir()
        shutil.copy(_checkpoint(folder / "whole", 2), folder / "broken")
        (folder / "broken" / "last_checkpoint").write_text("model_0000002.pth")
        shutil.copy(folder / "whole" / "metrics.json", folder / "broken")
    comm.synchronize()
    again = detectron2_trainer(inputs, folder / "broken", STARTED)
    again.resume_or_load(resume=True)
    layers = [m for m in again.bare_model.modules() if hasattr(m, "started")]
    found = [[layer.started for layer in layers]]
    again.train()
    found.append([layer.started for layer in layers])
    state = trainer.bare_model.state_dict()
    assert same(again.bare_model.state_dict(), state)
    return [*found, {key: value for key, value in state.items() if "running" in key}]


@pytest.mark.detectron2
def test_ranks_synchronise_from_the_start_on_and_resume_exactly(
    inputs: Path, tmp_path: Path
) -> None:
    first, second = run_ranks(_synchronised, 2, tmp_path / "ranks", inputs, tmp_path)
    assert first[:2] == second[:2] == [[False] * 8, [True] * 8]
    assert same(first[2], second[2])


@pytest.mark.detectron2
def test_ranks_of_a_run_end_with_the_same_statistics(inputs: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_statistics_of_a_rank, 2, tmp_path, inputs, tmp_path / "run")
    assert same(first, second)
    assert same(second[0], _weights(tmp_path / "run", 3)["backbone.fpn_lateral2.norm.running_mean"])


def test_precise_bn_leaves_a_trained_model_alone_that_was_frozen(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_standalone_run import leave_out_the_end, run_here

    leave_out_the_end(monkeypatch)
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
    words = (*(w for key in keys for w in (key, "BN(freeze=0.5)")), "SOLVER.MAX_ITER", "2")
    assert run_here(inputs, tmp_path, "--precise-bn-iters", "1", *words) == 0
    assert result_of(tmp_path)["results_precise_bn"] is None
    weights = ("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    options = ("--eval-only", "--precise-bn-iters", "1")
    assert run_here(inputs, tmp_path, *options, *words, *weights) == 0
    found = evaluation_of(tmp_path)
    assert found["results"] == result_of(tmp_path)["results"]
    assert found["results_precise_bn"] is None


@pytest.mark.detectron2
def test_norm_hook_freezes_in_detectron2s_own_trainer(inputs: Path, tmp_path: Path) -> None:
    from test_norm_hook import config_of, stock_trainer

    trainer = stock_trainer(config_of(inputs, tmp_path, *FROZEN))
    trainer.train()
    key = "backbone.fpn_lateral2.norm.running_mean"
    means = [_weights(tmp_path, i)[key] for i in range(1, 6)]
    assert not torch.equal(means[0], means[1]) and not torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3]) and torch.equal(means[3], means[4])
    assert trainer.model.backbone.fpn_lateral2.norm.frozen
    # the statistics are of the weights of the iteration before
    model = copy.deepcopy(trainer.model).train()
    model.load_state_dict(_weights(tmp_path, 2))
    conv, seen = model.backbone.fpn_lateral5, []
    conv.norm = nn.BatchNorm2d(16).requires_grad_(False)
    conv.norm.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    loader = iter(trainer.data_loader)
    with torch.no_grad():
        for _ in range(2):
            model.backbone(model.preprocess_image(next(loader)).tensor)
    y = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)
    key = "backbone.fpn_lateral5.norm.running_mean"
    torch.testing.assert_close(_weights(tmp_path, 3)[key], y.mean(1), rtol=1e-4, atol=1e-5)

    again = stock_trainer(config_of(inputs, tmp_path, *FROZEN, "SOLVER.MAX_ITER", "8"))
    again.resume_or_load(resume=True)
    again.train()
    assert again.model.backbone.fpn_lateral2.norm.frozen
