"""The training loop's parts: checks of numbers, PreciseBN, memory in checkpoints, run folder."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import parsed, tiny_inputs
from torch import nn

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs


def make_trainer(inputs: Path, output: Path, *words: str):
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, *words)
    output.mkdir(exist_ok=True)
    cfg, _ = build_config(args, 1)
    prepare_datasets(cfg, args.coco_dataset)
    return Trainer(cfg)


def break_step(trainer, at: int, change) -> None:
    """Lets ``change(model)`` happen before iteration ``at``."""
    run_step = trainer._trainer.run_step

    def broken() -> None:
        if trainer.iter == at:
            with torch.no_grad():
                change(trainer.bare_model)
        run_step()

    trainer._trainer.run_step = broken


def test_memory_returns_with_the_checkpoint(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.norms import memory_state_dict

    words = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=1)", "DATASETS.TEST", "()")
    first = make_trainer(inputs, tmp_path, *words)
    first.train()
    again = make_trainer(inputs, tmp_path, *words)
    again.resume_or_load(resume=True)
    assert again.start_iter == 4
    saved, loaded = memory_state_dict(first.bare_model), memory_state_dict(again.bare_model)

    def same(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    assert any(torch.is_tensor(t) for t in tensors_of(saved))
    assert same(saved, loaded)
    assert again.clock.timed_iterations == first.clock.timed_iterations > 0


def tensors_of(value) -> list:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return [value]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("backbone.fpn_lateral3.weight", "backbone.fpn_lateral3 (Conv2d): output not finite"),
        ("roi_heads.box_head.fc1.bias", "roi_heads.box_head.fc1 (Linear): output not finite"),
        (
            "backbone.bottom_up.res3.0.conv1.norm.running_var",
            "backbone.bottom_up.res3.0.conv1.norm (BatchNorm2d): running_var not finite",
        ),
    ],
)
def test_divergence_names_the_first_bad_layer(
    inputs: Path, tmp_path: Path, layer: str, expected: str
) -> None:
    from detectron2.utils.events import EventStorage

    from cbn_det.run.nonfinite import Diverged, first_bad_layer

    trainer = make_trainer(inputs, tmp_path, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()")
    tensors = {
        **dict(trainer.bare_model.named_parameters()),
        **dict(trainer.bare_model.named_buffers()),
    }
    break_step(trainer, 1, lambda model: tensors[layer].fill_(float("nan")))
    with pytest.raises(Diverged):
        trainer.train()
    assert trainer.iter == 1
    model, batch = trainer.bare_model, trainer.step.last_batch
    with EventStorage():
        found = first_bad_layer(model, lambda: model(batch))
    assert found.startswith(expected)


def test_weights_that_break_in_the_last_step_are_not_saved(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.run.nonfinite import Diverged

    words = ("SOLVER.BASE_LR", "1e999", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    trainer = make_trainer(inputs, tmp_path, *words)
    with pytest.raises(Diverged):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


def test_no_evaluation_after_a_failure_in_the_last_iteration(inputs: Path, tmp_path: Path) -> None:
    trainer = make_trainer(inputs, tmp_path, "SOLVER.MAX_ITER", "1")

    def fail() -> None:
        raise RuntimeError("in the last iteration")

    trainer._trainer.run_step = fail
    with pytest.raises(RuntimeError, match="last iteration"):
        trainer.train()
    assert trainer.results == {}


def test_unused_norms_are_reported(
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NORM", "CBN(window=7)")
    trainer_log = logging.getLogger("cbn_det.plugin.trainer")
    monkeypatch.setattr(trainer_log, "handlers", [caplog.handler])  # it may not propagate
    make_trainer(inputs, tmp_path, *words)
    assert "MODEL.ROI_BOX_HEAD.NORM: the model has no layer of this norm" in caplog.text


class TwiceAndEmpty(nn.Module):
    """A norm called twice in a forward and one that sees no data in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.BatchNorm2d(3)
        self.sometimes = nn.BatchNorm2d(3)
        self.never = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.twice(x)
        self.twice(x[:1] * 3)
        return self.sometimes(x[x[:, 0, 0, 0] > 0])


def test_precise_statistics_are_those_of_all_inputs() -> None:
    from cbn_det.run.precise_bn import recompute_statistics

    batches = [torch.randn(n, 3, 4, 5) * 2 + 100 for n in (2, 1, 5)]
    batches[1] = batches[1] - 200  # nothing passes there
    model = TwiceAndEmpty()
    assert recompute_statistics(model, iter(batches), 3) == 3
    for norm, inputs in (
        (model.twice, torch.cat([t for b in batches for t in (b, b[:1] * 3)])),
        (model.sometimes, torch.cat([batches[0], batches[2]])),
    ):
        var, mean = torch.var_mean(inputs.double(), dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert model.twice.num_batches_tracked == 0  # PreciseBN is not training
    assert torch.equal(model.never.running_var, torch.ones(3))
    with pytest.raises(ValueError, match="2 of 3"):
        recompute_statistics(model, iter(batches[:2]), 3)


def make_job(inputs: Path, output: Path, *words: str):
    """A job whose data is there, and a model for it."""
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.job import Detectron2Job
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, *words)
    cfg, _ = build_config(args, 1)
    job = Detectron2Job(cfg, args)
    job.prepare(eval_only=False)
    return job, Trainer.build_model(cfg)


def test_precise_evaluation_takes_its_statistics_back(inputs: Path, tmp_path: Path) -> None:
    job, model = make_job(inputs, tmp_path, "MODEL.FPN.NORM", "CBN")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    results = job.evaluate_precise(model, 2)
    assert set(results["bbox"]) >= {"AP", "AP50"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not (tmp_path / "coco_instances_results.json").exists()  # that is the run's own


def test_precise_evaluation_without_batch_norm(inputs: Path, tmp_path: Path) -> None:
    norms = ("MODEL.FPN.NORM", "", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.ROI_BOX_HEAD.NORM", "")
    job, model = make_job(inputs, tmp_path, *norms)
    assert job.evaluate_precise(model, 2) is None


def test_a_second_sigint_stops_at_once() -> None:
    from cbn_det.run.signals import stop_requests

    handler = signal.getsignal(signal.SIGINT)
    with stop_requests() as request:
        assert not request.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    from cbn_det.run.files import replace_file

    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def break_off(file) -> None:
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, break_off)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pth"]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    from cbn_det.run.files import remove_parts

    left = [".model_0000199.pth.4711", ".result.json.12", ".last_checkpoint.12"]
    kept = [".lock", "model_final.pth", ".notes.txt.1", ".hidden.pth"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_results_are_plain_json(tmp_path: Path) -> None:
    import numpy as np

    from cbn_det.run.files import read_result
    from cbn_det.run.folder import write_result

    assert read_result(tmp_path) is None
    write_result(tmp_path, {"AP": np.float64(1.5), "APl": float("nan"), "names": ("ü", None, 3)})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {
        "AP": 1.5,
        "APl": None,
        "names": ["ü", None, 3],
    }


def test_kalman_norms_find_what_precedes_them(inputs: Path, tmp_path: Path) -> None:
    """Behind the frozen stem and res2, in the first training step and, of GKN, in an evaluation
    without any."""
    from detectron2.layers import FrozenBatchNorm2d

    from cbn_det.norms import kn_chain

    for norm, training in (("KN", True), ("GKN(groups=4)", False)):
        words = (
            "MODEL.FPN.NORM",
            norm,
            "MODEL.RESNETS.NORM",
            norm,
            "MODEL.BACKBONE.FREEZE_AT",
            "2",
        )
        trainer = make_trainer(inputs, tmp_path / str(training), *words, "SOLVER.MAX_ITER", "1")
        model = trainer.bare_model
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
        if training:
            trainer.train()
        else:
            trainer.evaluate()
        rows = {row.name: row.follows for row in kn_chain(model)}
        body = "backbone.bottom_up.res"
        assert rows[f"{body}3.0.conv1.norm"].startswith(f"relu({body}2.")
        assert rows["backbone.fpn_lateral3.norm"].startswith(f"relu({body}3.")
        assert "?" not in rows.values()
