"""schedulefree's optimisers, with the recipe that its README gives for BatchNorm."""

from __future__ import annotations

import itertools

import pytest
import torch
from small import (
    NORMS,
    batches,
    distance,
    inputs_of_norms,
    net,
    norms_of,
    other_batches,
    train,
    worst_distance,
)
from torch import nn

schedulefree = pytest.importorskip("schedulefree", reason="no training library: schedulefree")


def before_evaluation(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> None:
    model.train()
    optimizer.eval()
    with torch.no_grad():
        for batch in itertools.islice(data, 50):
            model(batch)
    model.eval()


@pytest.mark.parametrize("norm", ["BN", *NORMS])
def test_its_recipe_gives_the_statistics_of_what_was_shown(norm) -> None:
    model = net(norm)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02)
    optimizer.train()
    train(model, optimizer, batches(8, seed=0))
    shown = other_batches(50)
    with inputs_of_norms(model) as seen:
        before_evaluation(model, optimizer, shown)
    assert worst_distance(model, seen) < 0.1
    if norm.startswith("BGN"):
        return  # BatchNorm's statistics are others
    plain = net("BN")
    plain.load_state_dict(model.state_dict())
    with inputs_of_norms(plain) as seen:
        before_evaluation(plain, optimizer, shown)
    its_error = worst_distance(plain, seen)  # of a running average
    for ours, theirs in zip(norms_of(model), norms_of(plain), strict=True):
        mean, var = (value.double().numpy() for value in (theirs.running_mean, theirs.running_var))
        assert distance(ours, mean, var) < 0.02 + its_error


@pytest.mark.parametrize("norm", ["CBN(burn_in=0, ema='batch')", "MBN(burn_in=0)"])
def test_its_steps_are_iterations(norm) -> None:
    model = net(norm)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    train(model, optimizer, batches(5, seed=0))
    assert [layer.steps for layer in norms_of(model)] == [4, 4]  # the last one is pending
