"""fastai's Learner, whose optimisers are no ``torch.optim.Optimizer``."""

from __future__ import annotations

import warnings

import pytest
import torch
from small import batches, net
from torch import Tensor, nn

import cbn_det.norms
from cbn_det.norms import memory_state_dict

fastai_learner = pytest.importorskip("fastai.learner", reason="no training library: fastai")

NORMS = {
    "BRN": "BRN(burn_in=0, ramp=1, ema='batch', momentum=0.1)",
    "CBN": "CBN(burn_in=0, ema='batch')",
    "MBN": "MBN(burn_in=0, double_forward=False)",
}


def fitted(norm: str, epochs: int = 2, callbacks: list | None = None) -> nn.Module:
    import fastai.callback.progress  # noqa: F401  # no_bar
    from fastai.data.core import DataLoaders

    torch.manual_seed(0)
    model = net(norm)
    data = [(x, x.mean((2, 3)).sum(1)) for x in batches(6, seed=0)]
    learner = fastai_learner.Learner(
        DataLoaders(data, data[:1]),
        model,
        loss_func=lambda out, target: (out - target[:, None]).square().mean(),
        lr=0.05,
        cbs=callbacks,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs)
    return model


def remembered(model: nn.Module) -> int:
    """Bytes of what the norms remember."""

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value.values())) if isinstance(value, dict) else 0

    return size(memory_state_dict(model))


@pytest.mark.parametrize("kind", NORMS)
def test_the_clock_that_stands_still_is_told_once(kind) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(NORMS[kind], epochs=6)
    told = [str(w.message) for w in caught if "tick" in str(w.message)]
    assert len(told) == 1
    assert kind in told[0] and "cbn_det.norms.tick" in told[0]
    assert issubclass(next(w.category for w in caught if "tick" in str(w.message)), UserWarning)


@pytest.mark.filterwarnings("ignore:.*tick")
def test_what_is_remembered_does_not_grow_with_the_forwards() -> None:
    """It goes up and down within a bound; without one it is four times as much."""
    cbn = NORMS["CBN"]
    assert remembered(fitted(cbn, epochs=160)) <= 2 * remembered(fitted(cbn, epochs=40))


def ticking() -> object:
    """What docs/integrate.md has a user write."""
    from fastai.callback.core import Callback

    class Tick(Callback):
        def after_step(self) -> None:
            cbn_det.norms.tick()

    return Tick()


@pytest.mark.parametrize("kind", NORMS)
def test_with_tick_a_learner_trains_the_norm_and_not_batchnorm(kind) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, plain = (fitted(norm, callbacks=[ticking()]) for norm in (NORMS[kind], "BN"))
    assert not [w for w in caught if "tick" in str(w.message)]
    assert all(layer.steps == 11 for layer in (model.layers[1], model.layers[4]))  # one is pending
    assert not torch.equal(model.layers[0].weight, plain.layers[0].weight)
