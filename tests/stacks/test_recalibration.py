"""Running statistics computed anew after training, in all the ways that are in use.

Each recipe is written as its authors write it. The right values are numpy's moments of what the
layer was shown, and BatchNorm's result under the same recipe with the same weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small import (
    NORMS,
    Net,
    batches,
    distance,
    inputs_of_norms,
    net,
    norms_of,
    other_batches,
    train,
    worst_distance,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

SHOWN = 50


def usual_idiom(model: nn.Module, data: list[Tensor]) -> None:
    """Reset, training mode, forwards without gradient; the momentum as it is."""
    for norm in norms_of(model):
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x in data:
            model(x)


def without_reset(model: nn.Module, data: list[Tensor]) -> None:
    """The same from the statistics that training left: 0.9**50 of them remain."""
    model.train()
    with torch.no_grad():
        for x in data:
            model(x)


def original_swa(model: nn.Module, data: list[Tensor]) -> None:
    """``bn_update`` of the authors of SWA, later torchcontrib's: momentum b / (n + b), and the
    gradient is not switched off."""
    model.train()
    own = {}
    for norm in norms_of(model):
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.ones_like(norm.running_var)
        own[norm] = norm.momentum
    seen = 0
    for x in data:
        for norm in own:
            norm.momentum = len(x) / (seen + len(x))
        model(x)
        seen += len(x)
    for norm, momentum in own.items():
        norm.momentum = momentum


def torch_update_bn(model: nn.Module, data: list[Tensor]) -> None:
    update_bn(data, model)


RECIPES = [usual_idiom, without_reset, original_swa, torch_update_bn]


def trained(norm: str) -> Net:
    model = net(norm)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(8, seed=0))
    return model


def as_batchnorm(model: Net) -> Net:
    plain = Net("BN")
    plain.load_state_dict(model.state_dict())
    return plain


CASES = [(norm, recipe) for norm in ["BN", *NORMS] for recipe in RECIPES]
# a cumulative average; without a reset it keeps what training left
CASES += [("MBN(burn_in=0, momentum=None)", r) for r in RECIPES if r is not without_reset]


@pytest.mark.parametrize(("norm", "recipe"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_running_statistics_are_those_of_what_was_shown(norm, recipe) -> None:
    model = trained(norm)
    with inputs_of_norms(model) as seen:
        recipe(model, other_batches(SHOWN))
    assert worst_distance(model, seen) < 0.1  # a running average of momentum 0.1 has that noise
    if norm.startswith("BGN"):
        return  # BatchNorm's statistics are others
    plain = as_batchnorm(trained(norm))
    with inputs_of_norms(plain) as seen:
        recipe(plain, other_batches(SHOWN))
    its_error = worst_distance(plain, seen)  # of a running average that began at 0 and 1
    for ours, theirs in zip(norms_of(model), norms_of(plain), strict=True):
        mean, var = (value.double().numpy() for value in (theirs.running_mean, theirs.running_var))
        assert distance(ours, mean, var) < 0.02 + its_error


@pytest.mark.parametrize("norm", ["CBN(burn_in=0)", "MBN(burn_in=0)"])
def test_training_goes_on_as_if_statistics_had_not_been_computed_anew(norm) -> None:
    """What a layer remembers is the same after a recalibration: it is done before every
    evaluation."""
    model = trained(norm)
    again = copy.deepcopy(model)
    torch_update_bn(again, other_batches(5))
    for one in (model, again):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1), batches(3, seed=5))
    for (key, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("norm", NORMS)
def test_the_weights_average_of_torch(norm) -> None:
    """AveragedModel copies the model, and its statistics are then computed with update_bn."""
    model = net(norm)
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches(8, seed=0):
        train(model, optimizer, [x])
        average.update_parameters(model)
    with inputs_of_norms(average) as seen:
        update_bn(other_batches(SHOWN), average)
    assert worst_distance(average, seen) < 0.05
