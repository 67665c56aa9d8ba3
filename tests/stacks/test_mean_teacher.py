"""Mean teachers and several branches a step, as in unbiased-teacher: a second model whose weights
follow the student's, called in training mode without gradient; and a student that is called twice
before each step, on labelled and on pseudo-labelled images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import Net, batches, loss_of, net, norms_of, other_batches
from torch import Tensor, nn

from cbn_det.norms import DoubleForward, memory_state_dict

NORMS = ["CBN(burn_in=0)", "MBN(burn_in=0)"]


def follow(teacher: nn.Module, student: nn.Module, keep: float) -> None:
    """Every entry of the state, buffers too, moves towards the student's."""
    state = student.state_dict()
    mixed = {
        key: keep * value + (1 - keep) * state[key] if value.is_floating_point() else state[key]
        for key, value in teacher.state_dict().items()
    }
    teacher.load_state_dict(mixed)


def train(student: nn.Module, teacher: nn.Module | None, steps: int) -> list[Tensor]:
    """Losses of both branches; without a teacher the pseudo-labels are those of the images."""
    optimizer, second = torch.optim.SGD(student.parameters(), lr=0.1), DoubleForward(student)
    pseudo = []
    for labelled, unlabelled in zip(batches(steps, 0), other_batches(steps), strict=True):
        if teacher is not None:
            follow(teacher, student, keep=0.9)
            with torch.no_grad():
                pseudo.append(teacher(unlabelled))
        optimizer.zero_grad()
        (loss_of(student, labelled) + loss_of(student, unlabelled)).backward()
        optimizer.step()
        second.refresh()
    second.remove()
    return pseudo


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("copied", [False, True], ids=["built", "copied"])
def test_a_teacher_in_training_mode_is_batchnorm(norm, copied) -> None:
    """It takes its statistics from its own images, not from a window that nobody moves on."""
    student = net(norm)
    train(student, None, steps=6)
    teacher = copy.deepcopy(student) if copied else net(norm)
    teacher.requires_grad_(False)
    train(student, teacher, steps=4)
    plain = Net("BN")
    plain.load_state_dict(teacher.state_dict())
    shown = other_batches(50)
    with torch.no_grad():
        for x in shown:
            torch.testing.assert_close(teacher(x), plain(x))
    for ours, theirs in zip(norms_of(teacher), norms_of(plain), strict=True):
        mean_off = (ours.running_mean - theirs.running_mean) / theirs.running_var.sqrt()
        assert mean_off.abs().max() < 0.02
        assert (ours.running_var / theirs.running_var).log().abs().max() < 0.02


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("copied", [False, True], ids=["built", "copied"])
def test_a_teacher_leaves_the_student_as_it_is(norm, copied) -> None:
    alone, student = net(norm), net(norm)
    teacher = copy.deepcopy(student) if copied else net(norm, seed=1)
    train(alone, None, steps=6)
    train(student, teacher, steps=6)
    for (key, one), other in zip(
        alone.state_dict().items(), student.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
    assert str(memory_state_dict(alone)) == str(memory_state_dict(student))


@pytest.mark.parametrize(
    ("norm", "weights"),
    [("CBN(window=2, burn_in=0)", (1, 1)), ("MBN(window=2, burn_in=0)", (1, 0.8))],
)
def test_the_branches_of_a_step_are_one_iteration(norm, weights) -> None:
    """What is remembered of a step is what both branches showed, taken together; each forward adds
    its own mini-batch to that. The weights stand still, so numpy knows all of it."""
    model = net(norm)
    optimizer, second = torch.optim.SGD(model.parameters(), lr=0.0), DoubleForward(model)
    conv, layer = model.layers[0], model.layers[1]
    weak, strong, third = batches(1, 0)[0], *other_batches(2)
    (loss_of(model, weak) + loss_of(model, strong)).backward()
    optimizer.step()
    second.refresh()
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out.detach())))
    loss_of(model, third)

    def channels(*images: Tensor) -> np.ndarray:
        with torch.no_grad():
            return conv(torch.cat(images)).double().transpose(0, 1).flatten(1).numpy()

    shares = np.array(weights) / sum(weights)
    parts = [channels(third), channels(weak, strong)]
    mean = sum(share * part.mean(1) for share, part in zip(shares, parts, strict=True))
    second_moment = sum(s * (part**2).mean(1) for s, part in zip(shares, parts, strict=True))
    y, out = (v.detach().double().transpose(0, 1).flatten(1).numpy() for v in seen[0])
    expected = (y - mean[:, None]) / np.sqrt(second_moment - mean**2 + layer.eps)[:, None]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
