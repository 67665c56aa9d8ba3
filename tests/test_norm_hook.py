"""cbn_det.NormHook in trainers that know nothing of us, beside this package's own trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_run import parsed, tiny_inputs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

inputs = tiny_inputs

MBN = ("MODEL.FPN.NORM", "MBN(window=3, burn_in=1)")
SHORT = ("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3", "DATASETS.TEST", "()")


def config_of(inputs: Path, output: Path, *words: str) -> Any:
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets

    args = parsed(inputs, output, *words)
    output.mkdir(exist_ok=True)
    cfg, _ = build_config(args, 1)
    prepare_datasets(cfg, args.coco_dataset)
    return cfg


def stock_trainer(cfg: Any, with_hook: bool = True) -> Any:
    """detectron2's DefaultTrainer, as a user extends it, on the images and random numbers that this
    package's trainer has."""
    from detectron2.engine import DefaultTrainer

    import cbn_det
    from cbn_det.plugin.loading import build_loader, place, seed_step

    class Users(DefaultTrainer):
        def build_hooks(self) -> list[Any]:
            return [cbn_det.NormHook(self.model)] * with_hook + super().build_hooks()

        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            loader = build_loader(cfg)
            place(loader, cfg.SEED)
            return loader

        def train(self) -> Any:
            place(self._trainer.data_loader, cfg.SEED, self.start_iter)
            return super().train()

        def run_step(self) -> None:
            seed_step(cfg.SEED, 0, self.iter)
            super().run_step()

    torch.manual_seed(0)  # the weights
    return Users(cfg)


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def statistics_differ(some: dict[str, Any], others: dict[str, Any]) -> float:
    keys = [key for key in some if "running_" in key]
    assert keys and some.keys() == others.keys()
    return max(((some[k] - others[k]).abs() / (1e-3 + others[k].abs())).max().item() for k in keys)


@pytest.mark.detectron2
def test_it_saves_what_this_packages_trainer_saves(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.plugin.trainer import Trainer

    cfg = config_of(inputs, tmp_path / "ours", *MBN, *SHORT)
    torch.manual_seed(0)
    Trainer(cfg).train()
    trainer = stock_trainer(config_of(inputs, tmp_path / "theirs", *MBN, *SHORT))
    trainer.train()
    for name in ("model_0000002.pth", "model_final.pth"):
        expected, found = saved(tmp_path / "ours", name), saved(tmp_path / "theirs", name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{name}: {key}"

    def late() -> list[Any]:
        hooks = type(trainer).build_hooks(trainer)
        return [*hooks[1:], hooks[0]]

    trainer._hooks.clear()
    trainer.register_hooks(late())
    with pytest.raises(
        ValueError, match="PeriodicCheckpointer saves .* put NormHook first, return"
    ):
        trainer.train()


@pytest.mark.detectron2
def test_without_it_the_saved_statistics_are_off(inputs: Path, tmp_path: Path) -> None:
    """What it is for: the second pass comes before the hook that saves."""
    words = (*SHORT, "MODEL.FPN.NORM", "MBN(window=3, burn_in=1)")
    for folder, with_hook in (("with", True), ("without", False)):
        stock_trainer(config_of(inputs, tmp_path / folder, *words), with_hook).train()
    off = statistics_differ(
        saved(tmp_path / "without", "model_final.pth"), saved(tmp_path / "with", "model_final.pth")
    )
    assert off > 0.02


@pytest.mark.detectron2
def test_a_resumed_training_is_the_one_that_never_stopped(inputs: Path, tmp_path: Path) -> None:
    norms = ("MODEL.FPN.NORM", "CBN(window=3)", "MODEL.ROI_BOX_HEAD.NORM", "MBN(burn_in=2)")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer = stock_trainer(config_of(inputs, whole, *norms, *SHORT))
    trainer.train()
    layer = trainer.model.backbone.fpn_lateral2.norm
    assert (layer.burn_in_steps, layer.steps) == (4, 5)  # 2/3 of 6; the last one is pending
    broken.mkdir()
    (broken / "model_0000002.pth").write_bytes((whole / "model_0000002.pth").read_bytes())
    (broken / "last_checkpoint").write_text("model_0000002.pth")
    again = stock_trainer(config_of(inputs, broken, *norms, *SHORT))
    again.resume_or_load(resume=True)
    assert again.start_iter == 3
    again.train()
    expected, found = saved(whole, "model_final.pth"), saved(broken, "model_final.pth")
    assert all(torch.equal(found[key], value) for key, value in expected.items())

    stock_trainer(config_of(inputs, tmp_path / "bare", *norms, *SHORT), with_hook=False).train()
    other = ("MODEL.FPN.NORM", "CBN(window=2)")
    for folder, words in ((broken, other), (tmp_path / "bare", norms[:2])):
        (folder / "last_checkpoint").write_text("model_0000002.pth")
        again = stock_trainer(config_of(inputs, folder, *words, *norms[2:], *SHORT))
        again.resume_or_load(resume=True)
        again.before_train()
        assert again.model.backbone.fpn_lateral2.norm.steps == 3, "its burn-in began anew"


class Net(nn.Module):
    """A detector in the eyes of a trainer: losses in training."""

    def __init__(self) -> None:
        from cbn_det.norms import BGN2d, CBN2d

        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), CBN2d(8, burn_in=1), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), BGN2d(8, groups=8), nn.ReLU()),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.body(images) - 1).square().mean()}


def _train_two_ranks(rank: int, world: int, folder: Path) -> list[dict[str, np.ndarray]]:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import HookBase, SimpleTrainer, hooks
    from detectron2.utils import comm

    import cbn_det

    comm.create_local_process_group(world)
    torch.manual_seed(0)
    model = Net()
    generator = torch.Generator().manual_seed(rank)
    images = [torch.rand(2, 3, 12, 12, generator=generator) + rank for _ in range(7)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    trainer = SimpleTrainer(parallel, images, optimizer)
    seen: list[dict[str, np.ndarray]] = []

    class Look(HookBase):
        def after_step(self) -> None:
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            named = [(f"{i}.{n}", b) for i, m in enumerate(norms) for n, b in m.named_buffers()]
            seen.append({name: b.detach().clone().numpy() for name, b in named})

    save = hooks.PeriodicCheckpointer(DetectionCheckpointer(model, str(folder)), 3)
    trainer.register_hooks(
        [
            Look(),
            cbn_det.NormHook(trainer.model),
            save if rank == 0 else None,
            hooks.EvalHook(2, lambda: {}),
            Look(),
        ]
    )
    trainer.train(0, 7)
    return seen


@pytest.mark.detectron2
def test_statistics_are_pooled_whenever_some_rank_saves_or_evaluates(tmp_path: Path) -> None:
    """Oracle: the law of total variance over two ranks, in numpy."""
    ranks = run_ranks(_train_two_ranks, 2, tmp_path / "ranks", tmp_path)
    due = {2, 3, 4, 6, 7}
    for done in range(1, 8):
        before, after = ([seen[2 * done - 2 + i] for seen in ranks] for i in (0, 1))
        for layer in ("0", "1"):
            mean, var = (
                np.stack([of_rank[f"{layer}.running_{what}"] for of_rank in before])
                for what in ("mean", "var")
            )
            assert np.abs(mean[0] - mean[1]).max() > 1e-3 or done - 1 in due
            for rank in (0, 1):
                expected = {"mean": mean[rank], "var": var[rank]}
                if done in due:
                    expected = {"mean": mean.mean(0), "var": var.mean(0) + mean.var(0)}
                for what, value in expected.items():
                    np.testing.assert_allclose(
                        after[rank][f"{layer}.running_{what}"], value, rtol=1e-4, atol=1e-6
                    )
    # what was saved after 3 iterations is the pooled one
    state = saved(tmp_path, "model_0000002.pth")
    np.testing.assert_array_equal(state["body.1.running_var"].numpy(), ranks[1][5]["0.running_var"])


def test_the_decorator_of_a_norm_of_ones_own(source_env: dict[str, str]) -> None:
    """With ``import cbn_det`` alone, which imports no torch."""
    code = """
import sys, cbn_det
assert "torch" not in sys.modules
from torch import nn
@cbn_det.norms.register_norm("MyNorm")
class MyNorm2d(nn.BatchNorm2d):
    def __init__(self, num_features, *, strength=1.0):
        super().__init__(num_features)
        self.strength = strength
print(cbn_det.norms.build_norm("MyNorm(strength=0.5)", 8).strength)
print(cbn_det.deploy.fold.__name__)
try:
    cbn_det.nroms
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_env, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines == ["0.5", "fold", "module 'cbn_det' has no attribute 'nroms'"], done.stderr
