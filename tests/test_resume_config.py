"""A resumed training makes its steps as the config says, with what the checkpoint remembers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from both_engines import ENGINES, make_trainer
from tiny_run import tiny_inputs

inputs = tiny_inputs

INEXACT = "the checkpoint cannot be resumed exactly"
TWO = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2")
CHANGED = {"BASE_LR": 0.002, "MOMENTUM": 0.6, "WEIGHT_DECAY": 0.03, "WEIGHT_DECAY_NORM": 0.01}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(
    engine: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of two iterations, and the momentum of each parameter afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(engine, inputs, folder, *TWO)
    trainer.train()
    return folder, momenta(trainer)


def momenta(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        name: trainer.optimizer.state[parameter]["momentum_buffer"].clone()
        for name, parameter in trainer.bare_model.named_parameters()
        if parameter.requires_grad
    }


def resumed(engine: str, inputs: Path, folder: Path, trained: Path, *words: str) -> Any:
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    trainer = make_trainer(engine, inputs, folder, "DATASETS.TEST", "()", *words)
    trainer.resume_or_load(resume=True) if engine == "detectron2" else trainer.resume()
    return trainer


def warning(caplog: pytest.LogCaptureFixture) -> str:
    (said,) = [r.getMessage() for r in caplog.records if INEXACT in r.getMessage()]
    return said


def test_changed_solver_keys_are_applied_and_named(
    engine: str,
    inputs: Path,
    trained: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, before = trained
    new = dict(CHANGED)
    if engine == "detectron2":  # which groups parameters otherwise
        new["WEIGHT_DECAY_BIAS"] = 0.07
    words = [word for key, value in new.items() for word in (f"SOLVER.{key}", str(value))]
    trainer = resumed(engine, inputs, tmp_path, folder, *words, "SOLVER.MAX_ITER", "3")
    said = warning(caplog)
    assert said.count(" was ") == len(new) + 1 and "SOLVER.MAX_ITER was 2, now it is 3" in said
    assert all(f"SOLVER.{key} was " in said for key in new)
    assert "SOLVER.WEIGHT_DECAY was 0.0001, now it is 0.03" in said

    # the step, by SGD's formula
    norms = [m for m in trainer.bare_model.modules() if "Norm" in type(m).__name__]
    of_norms = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    expected: dict[str, torch.Tensor] = {}

    def predict(*args: Any) -> None:
        for name, p in trainer.bare_model.named_parameters():
            decay = new["WEIGHT_DECAY_NORM" if id(p) in of_norms else "WEIGHT_DECAY"]
            if name.endswith(".bias"):
                decay = new.get("WEIGHT_DECAY_BIAS", decay)
            step = new["MOMENTUM"] * before[name] + p.grad + decay * p
            expected[name] = (p - new["BASE_LR"] * step).detach().clone()

    trainer.optimizer.register_step_pre_hook(predict)
    trainer.train()
    assert expected
    for name, parameter in trainer.bare_model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_the_rate_is_that_of_the_new_schedule_at_once(
    engine: str, inputs: Path, trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    words = ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(2, 3)", "SOLVER.GAMMA", "0.5")
    trainer = resumed(engine, inputs, tmp_path, trained[0], *words)
    rates = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *args: rates.extend({g["lr"] for g in optimizer.param_groups})
    )
    trainer.train()
    assert rates == pytest.approx([0.005, 0.0025])


def test_what_is_not_to_be_compared_is_not_named(
    engine: str,
    inputs: Path,
    trained: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ("SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "7")
    trainer = resumed(engine, inputs, tmp_path, trained[0], *words)
    assert INEXACT not in caplog.text
    now = momenta(trainer)
    assert now.keys() == trained[1].keys()
    assert all(torch.equal(now[name], value) for name, value in trained[1].items())


def test_parameters_that_were_frozen_start_without_momentum(
    engine: str, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = ("MODEL.BACKBONE.FREEZE_AT", "1", "MODEL.RESNETS.NORM", "FrozenBN")
    first = make_trainer(engine, inputs, tmp_path / "first", *TWO, *frozen)
    first.train()
    before = momenta(first)
    thawed = ("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "FrozenBN")
    again = resumed(engine, inputs, tmp_path / "again", tmp_path / "first", *TWO[2:], *thawed)
    assert "the optimizer remembers nothing of 1 parameters, the first backbone." in warning(caplog)
    parameters = dict(again.bare_model.named_parameters())
    assert len(parameters) > len(before)
    for name, parameter in parameters.items():
        memory = again.optimizer.state[parameter].get("momentum_buffer")
        if name in before:
            assert torch.equal(memory, before[name]), name
        elif parameter.requires_grad:
            assert memory is None, name


@pytest.mark.detectron2
def test_mixed_precision_goes_on_from_full_precision() -> None:
    from cbn_det.plugin.step import CheckedStep

    def step(mixed: bool) -> Any:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        return CheckedStep(model, [], optimizer, mixed_precision=mixed)

    full, mixed = step(False), step(True)
    full.model(torch.ones(1, 2)).sum().backward()
    full.optimizer.step()
    mixed.load_state_dict(full.state_dict())
    memories = [[s["momentum_buffer"] for s in k.optimizer.state.values()] for k in (full, mixed)]
    assert len(memories[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))


def test_groups_that_only_their_place_can_tell() -> None:
    """A checkpoint of detectron2's own trainer does not name its parameters."""
    from cbn_det.run.checkpoint import fit_optimizer_state

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    first = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    first.step()
    saved = first.state_dict()
    same = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.1)
    fitted, change = fit_optimizer_state(same, model, saved, None)
    same.load_state_dict(fitted)
    assert not change and same.param_groups[0]["lr"] == 0.5
    for parameter in model.parameters():
        memory = first.state[parameter]["momentum_buffer"]
        assert torch.equal(same.state[parameter]["momentum_buffer"], memory)
    groups = [{"params": layer.parameters()} for layer in model]
    with pytest.raises(ValueError, match=r"groups of \[4\] parameters.* of \[2, 2\].*FREEZE_AT"):
        fit_optimizer_state(torch.optim.SGD(groups, lr=1.0), model, saved, None)
