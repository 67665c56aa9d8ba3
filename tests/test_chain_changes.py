"""Predictions after a model's parameters became others while it trains: those of a fresh model with
the same weights, changed in the same way before its first forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

from cbn_det.norms import build_norm, find_chain, kn_chain

NORMS = {"KN": "KN(gain=0.5)", "GKN": "GKN(groups=2, gain=0.5)"}


class Net(nn.Module):
    """A norm, a convolution without one, and a convolution with one."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), build_norm(norm, 4)
        self.free = nn.Conv2d(4, 4, 1)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), build_norm(norm, 6)
        nn.init.uniform_(self.norm1.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm1.bias, -0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(torch.relu(self.free(x))))


def images(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(norm: str) -> Net:
    model = Net(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(images(step)).pow(3).mean().backward()
        optimizer.step()
    assert kn_chain(model)[1].follows == "relu(free(relu(norm1)))"
    optimizer.zero_grad()
    return model


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2.0 * weight


def assigned(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(2.0 * conv.weight.detach())


def put_in_the_dictionary(conv: nn.Conv2d) -> None:
    """As FSDP does, past every hook of torch."""
    conv._parameters["weight"] = nn.Parameter(2.0 * conv.weight.detach())


CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight_norm of old": lambda conv: old_weight_norm(conv),
    "weight_norm": parametrizations.weight_norm,
    "parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
    "assigned": assigned,
    "put in the dictionary": put_in_the_dictionary,
}


def fresh(norm: str, model: Net, change: Callable[[nn.Conv2d], object], where: str) -> Net:
    """Of the weights that ``model`` has before the change."""
    other = Net(norm)
    other.load_state_dict(model.state_dict())
    change(getattr(other, where))
    return other


def assert_same_training(ours: nn.Module, theirs: nn.Module) -> None:
    for step in (2, 3):
        outs = [model(images(step)) for model in (ours, theirs)]
        torch.testing.assert_close(*outs)
        for out in outs:
            out.pow(3).mean().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("where", ["conv2", "free"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm", NORMS)
def test_training_goes_on_with_the_parameters_that_there_are(norm, change, where):
    model = trained(NORMS[norm])
    other = fresh(NORMS[norm], model, CHANGES[change], where)
    CHANGES[change](getattr(model, where))
    assert_same_training(model, other)
    assert kn_chain(model)[1].follows == kn_chain(other)[1].follows


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("where", ["conv2", "free"])
@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_goes_on_with_the_parameters_that_there_are(change, where):
    model = trained(NORMS["GKN"])
    other = fresh(NORMS["GKN"], model, CHANGES[change], where).eval()
    find_chain(other, images(0))
    CHANGES[change](getattr(model.eval(), where))
    with torch.no_grad():
        torch.testing.assert_close(model(images(3)), other(images(3)))


def test_pruning_that_was_made_permanent_is_predicted_with_again():
    model = trained(NORMS["KN"])
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    model(images(2))
    assert kn_chain(model)[1].follows.startswith("- (a convolution whose weight is")
    prune.remove(model.conv2, "weight")
    model(images(2))
    assert kn_chain(model)[1].follows == "relu(free(relu(norm1)))"
    assert model.norm2.chain.weight.now() is model.conv2.weight


def test_layers_that_no_module_calls_follow_assignments():
    """A script that calls every layer itself: who holds a parameter cannot be told."""
    model = trained(NORMS["KN"])
    other = fresh(NORMS["KN"], model, assigned, "free")

    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.norm1(m.conv1(x)))
        return m.norm2(m.conv2(torch.relu(m.free(x))))

    again = copy.deepcopy(model)
    forward(again, images(1))
    assigned(again.free)
    torch.testing.assert_close(forward(again, images(2)), other(images(2)))


def test_functional_calls_predict_with_what_they_are_given():
    model = trained(NORMS["KN"])
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.free.weight *= 3.0
        other.norm1.bias += 1.0
        given = dict(other.named_parameters())
        out = torch.func.functional_call(model, given, (images(2),))
        torch.testing.assert_close(out, other(images(2)))
        assert not torch.allclose(model(images(2)), out, atol=1e-2)


@pytest.fixture
def one_process(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("norm", NORMS)
def test_sharded_after_the_chain_was_found(norm, one_process):
    from torch.distributed.fsdp import fully_shard

    model = trained(NORMS[norm])
    other = copy.deepcopy(model)
    plain = Net(NORMS[norm])
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=one_process)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain, other)]
    for step in (2, 3):
        outs = [m(images(step)) for m in (model, plain, other)]
        for out, optimizer in zip(outs, optimizers, strict=True):
            torch.testing.assert_close(out, outs[1])
            optimizer.zero_grad()
            out.pow(3).mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)
    assert kn_chain(model)[1].follows == "relu(free(relu(norm1)))"
    fresh_one = fully_shard(Net(NORMS[norm]), mesh=one_process)
    find_chain(fresh_one, images(0))
    assert kn_chain(fresh_one) == kn_chain(model)


def test_blocks_sharded_one_by_one_end_chains_and_say_why(one_process):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), build_norm(NORMS["KN"], 4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), build_norm(NORMS["KN"], 4)),
    )
    model(images(0))
    plain = copy.deepcopy(model)
    plain[1][1].gain = 0.0
    for block in model:
        fully_shard(block, mesh=one_process)
    fully_shard(model, mesh=one_process)
    torch.testing.assert_close(model(images(1)), plain(images(1)))
    assert kn_chain(model)[1].follows == "- (the border of a block of fully_shard)"
