"""accelerate's checkpoints, as docs/integrate.md says to use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import batches, loss_of, net, norms_of
from torch import nn

from cbn_det.norms import (
    DoubleForward,
    load_memory_state_dict,
    memory_state_dict,
    resolve_burn_in,
)

accelerate = pytest.importorskip("accelerate", reason="no training library: accelerate")

STEPS, STOP = 16, 12


class NormMemory:
    """What docs/integrate.md has a user register for checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return memory_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_memory_state_dict(self.model, state)


class Run:
    """A model prepared by an Accelerator of its own, with gradients of two forwards a step."""

    def __init__(self, norm: str, with_memory: bool = True) -> None:
        accelerate.state.AcceleratorState._reset_state(True)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net(norm)
        resolve_burn_in(model, STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.second = DoubleForward(self.accelerator.unwrap_model(self.model))
        if with_memory:
            self.accelerator.register_for_checkpointing(NormMemory(self.model))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for x in batches(2, seed=step):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, x))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    if self.accelerator.sync_gradients:
                        self.second.refresh()


NORMS = ["BRN(burn_in=0.25, ramp=0.5)", "CBN(burn_in=0.25)", "MBN(burn_in=0.25)"]


@pytest.mark.parametrize("norm", NORMS)
def test_load_state_goes_on_as_the_uninterrupted_run(tmp_path, norm) -> None:
    whole = Run(norm)
    whole.steps(0, STEPS)

    interrupted = Run(norm)
    interrupted.steps(0, STOP)
    interrupted.accelerator.save_state(tmp_path / "state")

    resumed = Run(norm)
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.steps(STOP, STEPS)
    for (key, one), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("norm", NORMS)
def test_load_state_without_memory_is_past_its_burn_in(tmp_path, norm) -> None:
    interrupted = Run(norm, with_memory=False)
    interrupted.steps(0, STOP)
    interrupted.accelerator.save_state(tmp_path / "state")
    resumed, plain = Run(norm, with_memory=False), Run("BN", with_memory=False)
    for run in (resumed, plain):
        run.accelerator.load_state(tmp_path / "state")
    resolve_burn_in(resumed.model, STEPS, start_iter=STOP)
    for run in (resumed, plain):
        run.steps(STOP, STEPS)
    assert [layer.steps for layer in norms_of(resumed.model)] == [STEPS - 1, STEPS - 1]
    assert not torch.equal(resumed.model.layers[0].weight, plain.model.layers[0].weight)
