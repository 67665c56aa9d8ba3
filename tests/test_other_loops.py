"""The norms in training loops that are not ours: statistics recomputed in other ways, optimisers
that the clock does not see, weights that are loaded, a second pass that nobody runs."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import (
    DoubleForward,
    MBN2d,
    build_norm,
    clock,
    convert_norm,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    resolve_burn_in,
    settle,
    tick,
)

SPECS = [
    "CBN(burn_in=2)",
    "CBN(burn_in=2, positions=None)",
    "CBN(burn_in=2, compensation='none')",
    "MBN(burn_in=2)",
    "MBN(burn_in=2, momentum=None)",
    "BRN(burn_in=2, ramp=2)",
    "KN",
    "BGN(groups=8)",
]
REMEMBERING = ["CBN(burn_in=2)", "MBN(burn_in=2)", "BRN(burn_in=2, ramp=2)"]


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(clock, "_warned", set())


def model_of(spec):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), build_norm(spec, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def images(seed, n=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 9, 9, generator=generator)
    return x * (1 + torch.rand(n, 1, 1, 1, generator=generator)) + torch.randn(
        n, 1, 1, 1, generator=generator
    )


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        (model(images(seed)) - 1.0).square().mean().backward()
        optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.02, **{"momentum": 0.9, **options})


def by_hand(model):
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data - 0.02 * p.grad  # bumps no version counter either
            p.grad = None


# ---- statistics recomputed in other ways -----------------------------------------------------

SHOWN = [images(100 + k) for k in range(60)]


def reset_and_show(model):
    model[1].reset_running_stats()
    model.train()
    with torch.no_grad():
        for x in SHOWN:
            model(x)


def show(model):
    """As schedulefree's users are told to."""
    with torch.no_grad():
        for x in SHOWN:
            model(x)


def average_with_gradients(model):
    """As Lightning's StochasticWeightAveraging does."""
    model[1].reset_running_stats()
    own, model[1].momentum = model[1].momentum, None
    for x in SHOWN:
        model(x)
    model[1].momentum = own


def moving_momentum(model):
    """As the first ``bn_update`` functions did: the momentum passes the layer's own on its way."""
    norm, seen = model[1], 0
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.ones_like(norm.running_var)
    own = norm.momentum
    for x in SHOWN:
        norm.momentum = len(x) / (seen + len(x))
        model(x)
        seen += len(x)
    norm.momentum = own


def update_bn(model):
    torch.optim.swa_utils.update_bn(SHOWN, model)


RECIPES = [reset_and_show, show, average_with_gradients, moving_momentum, update_bn]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_recomputed_statistics_are_of_what_was_shown(spec, recipe):
    """Against the moments of the shown inputs in numpy, and BatchNorm under the same recipe."""
    if recipe is show and ("BRN" in spec or "None)" in spec):
        pytest.skip("its own momentum is too small to leave what was before behind, as BatchNorm's")
    ours = model_of(spec)
    train(ours, sgd(ours), range(12))
    plain = copy.deepcopy(ours)
    plain[1] = nn.BatchNorm2d(8)
    plain[1].load_state_dict(ours[1].state_dict())
    memory = copy.deepcopy(getattr(ours[1], "memory", None))
    for model in (ours, plain):
        recipe(model)
    y = ours[0](torch.cat(SHOWN)).detach().double().numpy()
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))

    def off(norm):
        return (
            np.abs((norm.running_mean.numpy() - mean) / var**0.5).max(),
            np.abs(np.log(norm.running_var.numpy() / var)).max(),
        )

    if not (spec.startswith("BGN") and ours[1].groups_used != 8):
        assert off(ours[1])[0] < off(plain[1])[0] + 0.01
        assert off(ours[1])[1] < max(off(plain[1])[1], 0.05)
    if memory is not None:
        if memory.pushed > 1:  # the last iteration is committed meanwhile
            assert ours[1].memory.pushed == memory.pushed + 1
        assert ours[1].memory.pending == {} and ours[1].memory.forwards == 0


@pytest.mark.parametrize("spec", REMEMBERING)
def test_training_goes_on_with_memory_after_a_recomputation(spec):
    """One iteration later, even where gradients were enabled."""
    model = model_of(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(8))
    average_with_gradients(model)
    train(model, optimizer, range(20, 22))
    model(images(30))
    assert not model[1].recomputing_statistics
    show(model)
    model(images(31))
    assert not model[1].recomputing_statistics


def test_a_momentum_that_a_user_sets_is_no_recomputation():
    model = model_of("MBN(burn_in=0)")
    for momentum in (0.03, None):
        model[1].momentum = momentum
        optimizer = sgd(model)
        train(model, optimizer, range(3))
        model(images(3))
        assert not model[1].recomputing_statistics


@pytest.mark.parametrize("spec", REMEMBERING + ["KN"])
def test_a_mean_teacher_in_training_mode_is_batchnorm(spec):
    student = model_of(spec)
    train(student, sgd(student), range(8))
    teacher = copy.deepcopy(student)
    plain = copy.deepcopy(student)
    plain[1] = nn.BatchNorm2d(8)
    plain[1].load_state_dict(student[1].state_dict())
    for seed in range(50, 53):
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), plain.parameters(), strict=True):
                q.copy_(p.mul_(1.01))
            torch.testing.assert_close(teacher(images(seed)), plain(images(seed)))


@pytest.mark.parametrize("spec", REMEMBERING)
def test_a_reentrant_checkpoint_is_part_of_training(spec):
    """Its first pass has no gradients either."""
    plain = model_of(spec)
    train(plain, sgd(plain), range(6))
    other = copy.deepcopy(plain)
    x = images(9).requires_grad_()
    expected = plain(x)
    got = checkpoint(other, x, use_reentrant=True)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert other[1].memory.forwards == plain[1].memory.forwards == 1


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=True)


@pytest.mark.parametrize("spec", [*REMEMBERING, "KN"])
def test_a_reentrant_checkpoint_without_gradient_recomputes_statistics(spec):
    """Nothing is repeated then. Against the same forwards without the checkpoint."""
    plain = model_of(spec)
    train(plain, sgd(plain), range(8))
    other = copy.deepcopy(plain)
    before = plain[1].running_mean.clone()
    show(plain)
    with torch.no_grad():
        for x in SHOWN:
            Checkpointed(other)(x)
    assert not torch.allclose(before, plain[1].running_mean, rtol=1e-2)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(other[1], name), getattr(plain[1], name))


@pytest.mark.parametrize("spec", ["MBN(burn_in=2)", "BRN(burn_in=2, ramp=0)"])
def test_a_reentrant_checkpoint_repeats_the_forward_after_a_reset(spec):
    """The gradients are those of what the first pass put out."""
    plain = model_of(spec)
    train(plain, sgd(plain), range(8))
    plain[1].reset_running_stats()
    other = copy.deepcopy(plain)
    gradients = []
    for model in (plain, other):
        model.zero_grad()
        run = Checkpointed(model) if model is other else model
        (run(images(9).requires_grad_()) - 1.0).square().mean().backward()
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_running_statistics_follow_a_parametrised_weight():
    """Of one mini-batch, against its moments with the weight after the step."""
    model = model_of("CBN(burn_in=1, momentum=1.0, positions=None)")
    torch.nn.utils.parametrizations.weight_norm(model[0])
    x, norm = images(0), model[1]
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def off():
        y = model[0](x)
        return torch.cat(
            [
                norm.running_mean - y.mean((0, 2, 3)),
                norm.running_var - y.var((0, 2, 3)),
            ]
        ).norm()

    before = off()
    norm.momentum = 0.0  # the next forward takes them along, and adds nothing
    model(x)
    assert off() < 0.1 * before
    norm.momentum = 1.0
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    before = off()
    settle(model)
    assert off() < 0.1 * before


def digits_net():
    layers, width = [], 1
    for channels, stride in ((16, 1), (32, 2), (32, 2)):
        layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU()]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize("spec", ["CBN(burn_in=0)", "CBN(ema='batch')"])
def test_fine_tuned_at_a_constant_rate_a_layer_predicts_as_with_recomputed_statistics(spec):
    """A classifier of handwritten digits trained with BatchNorm, then 200 iterations of 4 images.
    Running statistics of older weights lost 10 points here, and 60 in deeper networks."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    held_out = slice(1200, None)

    def fit(model, iterations, size, rate):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for _ in range(iterations):
            batch = torch.randint(1200, (size,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x[batch]), y[batch]).backward()
            optimizer.step()

    def accuracy(model):
        return 100.0 * (model.eval()(x[held_out]).argmax(1) == y[held_out]).float().mean().item()

    gaps = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = digits_net()
        fit(model, 120, 64, 0.05)
        convert_norm(model, spec, max_iter=200)
        fit(model, 200, 4, 0.01)
        own = accuracy(model)
        torch.optim.swa_utils.update_bn(x[:1200].split(4), model)
        gaps.append(accuracy(model) - own)
    assert sum(gaps) / len(gaps) < 2.0


# ---- optimisers that the clock does not see --------------------------------------------------


@pytest.mark.parametrize("spec", REMEMBERING)
def test_weights_that_change_while_the_clock_stands_still_are_told_of(spec):
    model = model_of(spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(40):
            model(images(seed)).square().mean().backward()
            by_hand(model)
    (message,) = [str(w.message) for w in caught]
    assert type(model[1]).__name__ in message and "cbn_det.norms.tick()" in message


def test_a_long_accumulation_is_no_silent_clock():
    model = model_of("CBN(burn_in=2)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(40):
            model(images(seed)).square().mean().backward()


def test_tick_counts_what_no_optimiser_of_torch_does():
    seen, told = (model_of("CBN(burn_in=2)") for _ in range(2))
    optimizer = sgd(seen, momentum=0.0)
    for seed in range(8):
        optimizer.zero_grad()
        seen(images(seed)).square().mean().backward()
        optimizer.step()
    for seed in range(8):
        told(images(seed)).square().mean().backward()
        by_hand(told)
        tick()
    torch.testing.assert_close(told(images(9)), seen(images(9)))
    assert told[1].steps == 8 and len(told[1].memory) == 3


@pytest.mark.parametrize("positions", [64, 8, None])
def test_what_an_iteration_stages_is_bounded(positions):
    """After burn-in, though the clock stands still; and what it adds up to is still the average."""
    model = model_of(f"CBN(burn_in=1, positions={positions})")
    train(model, sgd(model), range(8))  # the next one estimates the averaged derivative, too
    norm, sizes = model[1], []
    for seed in range(200):
        model(images(seed % 4))
        sizes.append(sum(t.numel() for t in norm.memory.pending.values()))
    assert norm.memory.pending.keys() >= {"patch", "gradient"}
    assert max(sizes) == min(sizes) < model[0].weight.numel() + 100


def test_a_long_accumulation_keeps_the_derivative():
    """Of all forwards together; against autograd's of the variance over all of their inputs."""
    model = model_of("CBN(burn_in=0, positions=1000)")  # all of each forward's
    for seed in range(30):
        model(images(seed))
    tick()
    model(images(99))
    weight = model[0].weight
    var = model[0](torch.cat([images(seed) for seed in range(30)])).var((0, 2, 3), correction=0)
    (expected,) = torch.autograd.grad(var.sum(), weight)
    gradient = model[1].memory.kept["gradient"]
    torch.testing.assert_close(gradient, expected.flatten(1), rtol=1e-4, atol=1e-5)


# ---- parameters restored, memory not ---------------------------------------------------------


@pytest.mark.parametrize("spec", REMEMBERING)
def test_a_resumed_run_takes_its_place_from_the_optimiser(spec):
    """Weights and optimiser state alone, in a new model: burn-in is not done again."""
    first = model_of(spec.replace("burn_in=2", "burn_in=6"))
    optimizer = torch.optim.Adam(first.parameters(), lr=1e-3)
    train(first, optimizer, range(10))
    second = model_of(spec.replace("burn_in=2", "burn_in=6"))
    resumed = torch.optim.Adam(second.parameters(), lr=1e-3)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(10, 12))
    second(images(12))
    assert second[1].steps == 12 and not second[1].in_burn_in


def test_a_new_run_with_pretrained_weights_begins_at_the_beginning():
    first = model_of("CBN(burn_in=6)")
    train(first, torch.optim.Adam(first.parameters()), range(10))
    second = model_of("CBN(burn_in=6)")
    second.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, torch.optim.Adam(second.parameters()), range(3))
        third = model_of("CBN(burn_in=6)")
        third.load_state_dict(first.state_dict())
        optimizer = sgd(third)
        for p in third.parameters():
            optimizer.state[p]  # as schedulefree's optimisers look for what is not there yet
        train(third, optimizer, range(3))
        second(images(3)), third(images(3))
    assert second[1].steps == third[1].steps == 3


def test_a_resumed_run_whose_optimiser_does_not_count_is_told_of():
    first = model_of("MBN(burn_in=6)")
    optimizer = sgd(first)
    train(first, optimizer, range(10))

    def resume():
        model = model_of("MBN(burn_in=6)")
        model.load_state_dict(first.state_dict())
        resumed = sgd(model)
        resumed.load_state_dict(optimizer.state_dict())
        return model, resumed

    model, resumed = resume()
    with pytest.warns(UserWarning, match="MBN2d.*resolve_burn_in.*start_iter"):
        train(model, resumed, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clock._warned.clear()
        told, resumed = resume()
        resolve_burn_in(told, 100, start_iter=10)
        train(told, resumed, range(2))
        whole, resumed = resume()
        load_memory_state_dict(whole, memory_state_dict(first))
        train(whole, resumed, range(2))
    assert told[1].steps == 11 and not told[1].in_burn_in


def test_a_place_that_is_told_beside_the_memory_is_the_memorys():
    first = model_of("MBN(burn_in=6)")
    train(first, sgd(first), range(10))
    second = model_of("MBN(burn_in=6)")
    load_memory_state_dict(second, memory_state_dict(first))
    resolve_burn_in(second, 100, start_iter=10)
    for model in (first, second):
        model(images(10))
    assert second[1].steps == first[1].steps == 10


@pytest.mark.parametrize("order", ["weights first", "memory first"])
def test_memory_that_is_loaded_with_its_weights_stays(order):
    """Lightning loads a callback's or module's own part before the weights."""
    first = model_of("CBN(burn_in=2)")
    train(first, sgd(first), range(8))
    second = model_of("CBN(burn_in=2)")
    train(second, sgd(second), range(5))
    loads = [
        lambda: second.load_state_dict(first.state_dict()),
        lambda: load_memory_state_dict(second, memory_state_dict(first)),
    ]
    for load in loads if order == "weights first" else reversed(loads):
        load()
    torch.testing.assert_close(second(images(50)), first(images(50)))


@pytest.mark.parametrize("spec", REMEMBERING)
def test_other_weights_end_the_memory_of_those_before(spec):
    """Between folds, or after a search for the learning rate."""
    model = model_of(spec)
    fresh = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    train(model, sgd(model), range(8))
    model.load_state_dict(start)
    for m in (model, fresh):
        train(m, sgd(m), range(20, 26))
    torch.testing.assert_close(model(images(50)), fresh(images(50)))
    assert model[1].steps == fresh[1].steps


@pytest.mark.parametrize("spec", REMEMBERING)
def test_weights_that_are_swapped_and_come_back_keep_their_memory(spec):
    """An evaluation with averaged weights in mid-training."""
    model = model_of(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(8))
    reference = copy.deepcopy(model)
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({key: value * 0.9 for key, value in own.items()})
    model.eval()(images(60))
    model.load_state_dict(own)
    torch.testing.assert_close(model.train()(images(50)), reference(images(50)))
    assert model[1].steps == reference[1].steps


def test_statistics_recomputed_for_swapped_weights_leave_memory_alone():
    """As BatchNorm's are for a moving average, between two iterations."""
    model = model_of("MBN(burn_in=2)")
    optimizer = sgd(model)
    train(model, optimizer, range(8))
    reference = copy.deepcopy(model)
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({key: value * 0.9 for key, value in own.items()})
    update_bn(model)
    settle(model)
    model.load_state_dict(own)
    update_bn(model)  # memory is its weights', whatever their running statistics are now
    torch.testing.assert_close(model(images(50)), reference(images(50)))
    assert model[1].steps == reference[1].steps


def test_an_iteration_is_committed_with_its_own_weights():
    """Not with those that were swapped in before the next one."""
    model = model_of("CBN(burn_in=2)")
    train(model, sgd(model), range(8))
    reference = copy.deepcopy(model)
    own = copy.deepcopy(model.state_dict())
    others = {key: value * 0.9 for key, value in own.items()}
    model.load_state_dict(others)
    settle(model)
    torch.testing.assert_close(model[1].running_mean, others["1.running_mean"])
    model.load_state_dict(own)
    for m in (model, reference):
        settle(m)
    assert not torch.equal(reference[1].running_mean, own["1.running_mean"])
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_an_optimiser_that_is_put_back_to_its_start_begins_at_the_beginning(kind):
    """As Lightning's search for a learning rate does."""
    model = model_of("MBN(burn_in=6, double_forward=False)")
    optimizer = sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters())
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(10))
    for part, state in zip((model, optimizer), start, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, range(3))
    model(images(3))
    assert model[1].steps == 3


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_the_best_weights_read_back_do_not_begin_the_schedule_anew(kind):
    """The optimiser goes on; a new one begins at the beginning, be the old one there or not."""
    model = model_of("MBN(burn_in=6, double_forward=False)")
    start = copy.deepcopy(model.state_dict())

    def new_optimizer():
        return sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters())

    optimizers = [new_optimizer()]
    train(model, optimizers[0], range(10))
    best = copy.deepcopy(model.state_dict())
    train(model, optimizers[0], range(10, 13))
    model.load_state_dict(best)
    train(model, optimizers[0], range(13, 15))
    model(images(15))
    assert model[1].steps == 15 and len(model[1].memory) == 1
    for count in range(2, 6):
        model.load_state_dict(start)
        optimizers.append(new_optimizer())
        train(model, optimizers[-1], range(count))
        model(images(15))
        assert model[1].steps == count


@pytest.mark.parametrize("spec", REMEMBERING)
def test_weights_of_a_sharded_model_are_loaded_and_settled(spec, tmp_path, monkeypatch):
    """FSDP2: they are whole in forwards only. A rank may load alone: others are not waited for."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs FSDP2")
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain = model_of(spec)
        sharded = fsdp.fully_shard(copy.deepcopy(plain), mesh=mesh)
        for model in (plain, sharded):
            optimizer = sgd(model)
            train(model, optimizer, range(6))
            settle(model)
            own = copy.deepcopy(model.state_dict())
            swapped = {key: value * 0.9 for key, value in own.items()}
            with monkeypatch.context() as patch:
                patch.delattr(distributed, "all_reduce")
                model.load_state_dict(swapped)
                model.load_state_dict(own)
            train(model, optimizer, range(6, 8))
        torch.testing.assert_close(sharded(images(9)), plain(images(9)))
        assert sharded[1].steps == plain[1].steps == 8
    finally:
        distributed.destroy_process_group()


# ---- a second pass that nobody runs ----------------------------------------------------------


def test_mbn_without_its_second_pass_says_so():
    model = model_of("MBN(burn_in=2)")
    with pytest.warns(UserWarning, match="double_forward=True.*DoubleForward") as caught:
        train(model, sgd(model), range(20))
        model(images(20))
    assert len(caught) == 1
    assert norm_diagnostics(model)["norm/second_pass"] == 0.0


def test_a_second_pass_of_another_module_is_none():
    """DoubleForward of a wrapper whose training step calls what is inside."""

    class Wrapper(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

    model = model_of("MBN(burn_in=2)")
    second = DoubleForward(Wrapper(model))
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="the module that the training loop calls"):
        for seed in range(20):
            train(model, optimizer, [seed])
            second.refresh()


def test_mbn_with_its_second_pass_says_nothing():
    model = model_of("MBN(burn_in=2)")
    second, optimizer = DoubleForward(model), sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            train(model, optimizer, [seed])
            second.refresh()
        once = model_of("MBN(burn_in=2, double_forward=False)")
        train(once, sgd(once), range(20))
    assert norm_diagnostics(model)["norm/second_pass"] == 1.0
    assert norm_diagnostics(once) == {}


# ---- small -----------------------------------------------------------------------------------


def test_a_layer_in_training_mode_is_not_exported():
    model = model_of("CBN(burn_in=0)")
    train(model, sgd(model), range(3))
    before = copy.deepcopy(memory_state_dict(model))
    for export in (
        lambda: torch.export.export(model, (images(0),), strict=False),
        lambda: torch.jit.trace(model, images(0)),
    ):
        with pytest.raises(RuntimeError, match=r"CBN2d in training mode.*model\.eval\(\)"):
            export()
    after = memory_state_dict(model)
    assert after["1"]["forwards"] == before["1"]["forwards"]
    exported = torch.export.export(copy.deepcopy(model).eval(), (images(0),)).module()
    torch.testing.assert_close(exported(images(1)), model.eval()(images(1)))


@pytest.mark.parametrize("spec", ["CBN", "MBN", "BGN", "BRN", "KN"])
def test_device_and_dtype_are_batchnorms(spec):
    """timm's models give them to every norm layer."""
    cls = type(build_norm(spec, 8))
    layer = cls(8, device="meta", dtype=torch.float64)
    plain = nn.BatchNorm2d(8, device="meta", dtype=torch.float64)
    for ours, theirs in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True):
        assert (ours.device, ours.dtype, ours.shape) == (theirs.device, theirs.dtype, theirs.shape)
    with pytest.raises(ValueError, match="no option 'device'"):
        build_norm(f"{spec}(device='cpu')", 8)
    with pytest.raises(TypeError, match="windoww"):
        MBN2d(8, windoww=3)


@pytest.mark.parametrize("bare", [False, True])
def test_a_second_pass_compiles_the_model_once_more_and_not_with_every_step(bare):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = model_of("MBN(burn_in=1)")
    compiled = torch.compile(model, backend="eager")
    second, optimizer = DoubleForward(model if bare else compiled), sgd(model)
    counts = []
    for seed in range(8):
        train(compiled, optimizer, [seed])
        second.refresh()
        counts.append(counters["frames"]["total"])
    assert model[1].diagnostics["second_pass"] == 1.0
    assert counts[-1] == counts[3]
