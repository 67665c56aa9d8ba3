"""Gradient accumulation: several mini-batches an optimiser step, on both engines."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from both_engines import ENGINES, make_trainer, words_for
from ranks import in_order, run_ranks
from tiny_run import result_of, run_loggers_removed, tiny_inputs
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

inputs = tiny_inputs
NO_TEST = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1000")
# of these a mini-batch is normalised as its images are in any other
FROZEN = (
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN"),
    *("MODEL.ROI_BOX_HEAD.NORM", "FrozenBN"),
)


def start(trainer: Any) -> None:
    if hasattr(trainer, "resume_or_load"):
        trainer.resume_or_load(resume=True)
    elif trainer.checkpointer.has_checkpoint():
        trainer.resume()


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Of ``metrics.json``, without what a clock measured."""
    clocks = ("time", "data_time", "rank_data_time", "eta_seconds")
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@pytest.fixture
def first_come_first_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors and proposals are sampled in order, so that it does not matter when."""
    monkeypatch.setattr(torch, "randperm", in_order)


# two steps; without norms larger ones diverge
TWO_STEPS = (*FROZEN, *NO_TEST, "SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.0001")


def changes(engine: str, inputs: Path, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """What training does to each parameter."""
    trainer = make_trainer(engine, inputs, folder, *words[:-1], *TWO_STEPS, IMAGES, words[-1])
    before = weights(trainer.bare_model)
    trainer.train()
    return {key: value - before[key] for key, value in weights(trainer.bare_model).items()}


IMAGES = "SOLVER.IMS_PER_BATCH"


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        size = float(value.abs().max())
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0.01 * size + 1e-7, msg=key)


@pytest.mark.parametrize("engine", ENGINES)
def test_mini_batches_train_as_one_batch_of_their_images(
    engine: str, inputs: Path, tmp_path: Path, first_come_first_sampled: None
) -> None:
    whole = changes(engine, inputs, tmp_path / "whole", "4")
    parts = changes(engine, inputs, tmp_path / "parts", "--accumulate", "2", "2")
    assert_close(parts, whole)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3
    ours, expected = (lines_of(tmp_path / name)[-1] for name in ("parts", "whole"))
    losses = {k for k in expected if "loss" in k}
    assert len(losses) == 5
    for key in losses | {"lr"}:
        assert ours[key] == pytest.approx(expected[key], rel=1e-4), key
    assert ours["iteration"] == expected["iteration"] == 1


def _one_rank(rank: int, world: int, inputs: Path, folder: Path) -> Any:
    """A job: one of two ranks of an image each."""
    from detectron2.utils import comm

    import cbn_det

    cbn_det.register()
    torch.randperm = in_order
    comm.create_local_process_group(world)
    trainer = make_trainer(
        *("detectron2", inputs, folder, "--accumulate", "2", *TWO_STEPS, IMAGES, "2")
    )
    exchanged = []

    def exchange(state, bucket):  # torch checks the annotations, and takes none for good ones
        exchanged.append(trainer.iter)
        return default_hooks.allreduce_hook(None, bucket)

    trainer.step.model.register_comm_hook(None, exchange)
    before = weights(trainer.bare_model)
    trainer.train()
    after = weights(trainer.bare_model)
    return {key: (after[key] - before[key]).numpy() for key in after}, exchanged


@pytest.mark.detectron2
def test_ranks_exchange_gradients_once_a_step(
    inputs: Path, tmp_path: Path, first_come_first_sampled: None
) -> None:
    whole = changes("detectron2", inputs, tmp_path / "whole", "4")
    for ours, exchanged in run_ranks(_one_rank, 2, tmp_path, inputs, tmp_path / "ranks"):
        assert_close({key: torch.from_numpy(value) for key, value in ours.items()}, whole)
        assert exchanged == [0, 1]  # all gradients of this model fit into one bucket


class Killed(BaseException):
    pass


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_broken_off_between_mini_batches_resumes_exactly(
    engine: str, inputs: Path, tmp_path: Path
) -> None:
    from cbn_det.norms import memory_state_dict

    norms = ("MODEL.FPN.NORM", "MBN(burn_in=1)", "MODEL.ROI_BOX_HEAD.NORM", "CBN(burn_in=0)")
    length = ("SOLVER.MAX_ITER", "5", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2")
    words = ("--accumulate", "2", *norms, *length)
    found = []
    for name in ("whole", "broken"):
        trainer = make_trainer(engine, inputs, tmp_path / name, *words)
        if name == "broken":
            forwards = iter(range(100))

            def forward(*args: Any, trainer: Any = trainer, forwards: Any = forwards) -> None:
                if (
                    next(forwards) >= 10 and trainer.iter == 3
                ):  # the second of iteration 3, or later
                    raise Killed

            trainer.bare_model.register_forward_pre_hook(forward)
            with pytest.raises(Killed):
                trainer.after_train = lambda: None
                trainer.train()
            trainer = make_trainer(engine, inputs, tmp_path / name, *words)
            start(trainer)
            assert trainer.start_iter == 2
        trainer.train()
        found.append((weights(trainer.bare_model), memory_state_dict(trainer.bare_model)))
    (expected, memory), (ours, our_memory) = found
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert _same(our_memory, memory)
    # one optimiser step is one iteration: four were committed when the fifth began
    assert {state["steps"] for state in memory.values()} == {4}
    staged = {name: state["forwards"] for name, state in memory.items()}
    assert set(staged.values()) == {2}, "both mini-batches, and both refreshed where that is due"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("engine", ENGINES)
def test_another_number_of_mini_batches_is_told_at_resume(
    engine: str, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = (*FROZEN, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1")
    make_trainer(engine, inputs, tmp_path, "--accumulate", "2", *words).train()
    trainer = make_trainer(engine, inputs, tmp_path, "--accumulate", "3", *words)
    caplog.clear()
    start(trainer)
    told = [text for text in caplog.messages if "--accumulate" in text]
    assert len(told) == 1 and "2" in told[0] and "3" in told[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_mini_batch_is_checked(
    engine: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbn_det.run.nonfinite import Diverged

    trainer = make_trainer(engine, inputs, tmp_path, "--accumulate", "3", *FROZEN, *NO_TEST)
    before = weights(trainer.bare_model)
    forwards = []

    def spoil(model: nn.Module, args: Any, losses: dict[str, torch.Tensor]) -> Any:
        forwards.append(1)
        if len(forwards) == 2:
            return {name: loss * float("nan") for name, loss in losses.items()}
        return losses

    trainer.bare_model.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="not finite"):
        trainer.train()
    assert len(forwards) == 2 and trainer.iter == 0
    assert all(torch.equal(value, before[k]) for k, value in weights(trainer.bare_model).items())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_launcher_takes_and_records_it(
    engine: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from cbn_det.launch import main

    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path, "--accumulate", "0")) == 2
        assert "--accumulate must be 1 or more" in capfd.readouterr().err
        words = (*NO_TEST, "SOLVER.MAX_ITER", "1")
        assert main(words_for(engine, inputs, tmp_path, "--accumulate", "3", *words)) == 0
    result = result_of(tmp_path)
    assert (result["images_per_gpu"], result["accumulate"], result["total_batch"]) == (2, 3, 6)
    assert result["iterations"] == 1


def test_an_evaluation_keeps_what_training_was_done_with(tmp_path: Path) -> None:
    from cbn_det.run.folder import keep_training_facts, write_result

    write_result(tmp_path, {"iterations": 7, "accumulate": 4, "total_batch": 8})
    result = {"accumulate": 1, "total_batch": 2, "machine": "this"}
    keep_training_facts(result, tmp_path)
    assert result == {"accumulate": 4, "total_batch": 8, "machine": "this", "iterations": 7}


# ------------------------------------------------------------------ detectron2's step


class Losses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 6).view(2, 3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = x @ self.weight.t()
        return {"loss_a": out.square().mean(), "loss_b": out.float().sigmoid().mean()}


def numbers() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(4, 3, generator=generator)


@pytest.mark.detectron2
def test_in_mixed_precision_an_overflow_skips_the_whole_step() -> None:
    """On CPU: bfloat16, and a scaler that works there."""
    from detectron2.utils.events import EventStorage

    from cbn_det.plugin.step import CheckedStep

    model, twin = Losses(), Losses()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    step = CheckedStep(model, numbers(), optimizers[0], accumulate=3, mixed_precision=True)
    scaler = step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step.precision = torch.bfloat16
    batches, expected = numbers(), []
    overflow = iter([False] * 3 + [False, True, False] + [False] * 3)
    model.weight.register_hook(lambda g: g * float("inf") if next(overflow) else g)
    with EventStorage():
        for iteration in range(3):
            step.iter = iteration
            step.run_step()
            parts = []
            for _ in range(3):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    parts.append(sum(twin(next(batches)).values()))
            if iteration != 1:
                optimizers[1].zero_grad()
                torch.stack(parts).mean().backward()
                optimizers[1].step()
            expected.append(twin.weight.detach().clone())
            torch.testing.assert_close(model.weight, expected[-1], rtol=1e-2, atol=2e-3)
    assert torch.equal(expected[1], expected[0]) and not torch.equal(expected[2], expected[1])
    assert scaler.get_scale() == 32.0  # halved once: mini-batches of a step have one scale


@pytest.mark.detectron2
def test_one_mini_batch_at_a_time_is_detectron2s_own_step() -> None:
    from detectron2.engine import SimpleTrainer
    from detectron2.utils.events import EventStorage

    from cbn_det.plugin.step import CheckedStep

    found = []
    for kind in (SimpleTrainer, CheckedStep):
        model = Losses()
        step = kind(model, numbers(), torch.optim.SGD(model.parameters(), 0.1))
        with EventStorage() as storage:
            for step.iter in range(3):
                step.run_step()
            values = {k: v for k, (v, _) in storage.latest().items() if "loss" in k}
        found.append((copy.deepcopy(model.weight.data), values))
    (theirs, their_values), (ours, our_values) = found
    assert torch.equal(ours, theirs)
    assert our_values == their_values and len(our_values) == 3


class Troubled(Losses):
    """Something happens in its second forward pass."""

    forwards, trouble = 0, ""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.forwards += 1
        losses = super().forward(x)
        if self.forwards == 2 and self.trouble == "fails":
            raise RuntimeError("out of memory")
        if self.forwards == 2 and self.trouble == "refuses":
            raise FloatingPointError("proposals are not finite")
        if self.forwards == 2 and self.trouble == "diverges":
            losses["loss_b"] = losses["loss_b"] * float("nan")
        return losses


def _one_of_two(rank: int, world: int, trouble: str) -> tuple[int, str, str, bool]:
    """How three steps of a rank end where the other one, 1, is in trouble in the second."""
    from detectron2.utils.events import EventStorage

    from cbn_det.plugin.step import CheckedStep
    from cbn_det.run.signals import StopRequest

    model = Troubled()
    model.trouble = trouble if rank else ""
    step = CheckedStep(model, numbers(), torch.optim.SGD(model.parameters(), 0.1))
    step.stop_request = StopRequest()
    with EventStorage():
        for step.iter in range(3):
            step.stop_request.requested = bool(rank) and trouble == "stops" and step.iter == 1
            try:
                step.run_step()
            except Exception as error:
                return step.iter, type(error).__name__, str(error), step.stop_agreed
            if step.stop_agreed:
                break
    return step.iter, "", "", step.stop_agreed


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("trouble", "there", "here"),
    [
        ("fails", ("RuntimeError", "out of memory"), ("PeerFailed", "another rank failed")),
        ("refuses", ("Diverged", "proposals are not finite"), ("Diverged", "")),
        ("diverges", ("Diverged", "losses not finite: loss_b"), ("Diverged", "")),
        ("stops", ("", ""), ("", "")),
    ],
)
def test_all_ranks_learn_of_one_in_the_same_step(
    tmp_path: Path, trouble: str, there: tuple[str, str], here: tuple[str, str]
) -> None:
    for found, (error, message) in zip(
        run_ranks(_one_of_two, 2, tmp_path, trouble), (here, there), strict=True
    ):
        assert found[:2] == (1, error) and found[3] == (trouble == "stops")
        assert found[2].endswith(message) and bool(found[2]) == bool(message)
