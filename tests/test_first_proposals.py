"""Double Forward of two-stage detectors: the second pass has the RoIs of the first."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from both_engines import ENGINES, make_trainer
from tiny_run import tiny_inputs
from torch import nn

from cbn_det.norms import DoubleForward, build_norm

inputs = tiny_inputs
MBN = "MBN(window=3, decay=0.6, burn_in=0)"


def images(seed, n=2, size=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator)


class Generator(nn.Module):
    """Proposes the pixels that score best, as many as score above zero, and says what they lost."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 3, padding=1)
        self.norm = build_norm(norm, 1) if norm else nn.Identity()
        self.calls = []  # a list: the second pass leaves numbers as they were

    def forward(self, features):
        self.calls.append(1)
        torch.rand(3)  # which anchors the loss samples
        scores = self.norm(self.conv(features)).flatten()
        order = scores.detach().argsort(descending=True)
        return [order[: int((scores > 0).sum())]], {"loss": scores.pow(2).mean()}


class Detector(nn.Module):
    """Backbone, proposals, and a head on a random sample of them."""

    def __init__(self, norm=None, proposing=1):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), build_norm(MBN, 4))
        self.generator = Generator(norm)
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), build_norm(MBN, 5))
        self.proposing = proposing
        self.rois = []

    def forward(self, x):
        features = F.relu(self.backbone(x))
        for _ in range(self.proposing):
            (pixels,), losses = self.generator(features)
        sampled = pixels[torch.randperm(len(pixels))[:40]]
        self.rois.append(sampled)
        rois = features.permute(0, 2, 3, 1).reshape(-1, 4)[sampled]
        return (self.head(rois[:, :, None, None]) - 1).pow(2).mean() + losses["loss"]


def train(model, proposals, steps=3, parts=2):
    """The RoIs of both passes of each step, and what the generator was called for in the second."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    double_forward = DoubleForward(model, proposals)
    found = []
    for t in range(steps):
        optimizer.zero_grad()
        for k in range(parts):
            model(images(10 * t + k)).backward()
        optimizer.step()
        first, calls = model.rois, len(model.generator.calls)
        model.rois = []
        state = torch.get_rng_state()
        assert double_forward.refresh() is True
        assert torch.equal(torch.get_rng_state(), state)
        found.append((first, model.rois, len(model.generator.calls) - calls))
        model.rois = []
    double_forward.remove()
    return found


def test_the_second_pass_has_the_rois_of_the_first():
    """Of each mini-batch its own; and without that, it would not."""
    model = Detector()
    for first, second, calls in train(model, model.generator):
        assert len(first) == 2 and not torch.equal(*first)
        assert all(map(torch.equal, first, second)) and calls == 0
    model = Detector()
    for first, second, calls in train(model, None):
        assert not any(map(torch.equal, first, second)) and calls == 2


def test_statistics_are_those_of_the_first_rois_under_the_new_weights():
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    double_forward = DoubleForward(model, model.generator)
    x = images(1)
    model(x).backward()
    optimizer.step()
    double_forward.refresh()
    other = copy.deepcopy(model)
    with torch.no_grad():
        y = other.backbone[0](x)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        norm = model.backbone[1]  # the first iteration: the memory has one entry
        y = F.batch_norm(y, mean, var, norm.weight, norm.bias, eps=norm.eps)
        rois = F.relu(y).permute(0, 2, 3, 1).reshape(-1, 4)[model.rois[0]]
        expected = other.head[0](rois[:, :, None, None]).mean((0, 2, 3))
    torch.testing.assert_close(model.head[1].memory.pending["mean"], expected)


@pytest.mark.parametrize("options", [{"norm": MBN}, {"proposing": 2}])
def test_a_generator_that_is_run_again(options):
    """One with a layer to refresh, and one called twice."""
    model = Detector(**options)
    for _, _, calls in train(model, model.generator):
        assert calls == 2 * options.get("proposing", 1)


def test_a_compiled_generator_is_run_again():
    model = Detector()
    model.generator.compile(backend="eager")
    for _, _, calls in train(model, model.generator, steps=2):
        assert calls == 2


@pytest.mark.parametrize("own", [False, True])
def test_the_generator_is_left_as_it_was(own):
    model = Detector()
    if own:  # somebody else's
        model.generator.forward = forward = model.generator.forward
    train(model, model.generator)
    assert not model.generator._forward_hooks and not model.generator._forward_pre_hooks
    assert vars(model.generator).get("forward") is (forward if own else None)


def test_activations_are_let_go_of():
    """Nothing is kept of a graph that nobody goes back through."""
    model = Detector()
    double_forward = DoubleForward(model, model.generator)
    seen = []
    model.generator.conv.register_forward_hook(
        lambda module, args, out: seen.append(weakref.ref(out))
    )
    model(images(0))
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    double_forward.remove()


@pytest.mark.parametrize("engine", ENGINES)
def test_trainers_name_them(engine, inputs, tmp_path):
    norms = ("MODEL.FPN.NORM", MBN, "MODEL.ROI_BOX_HEAD.NORM", MBN)
    more = ("SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1000", "DATASETS.TEST", "()")
    trainer = make_trainer(engine, inputs, tmp_path, *norms, *more)
    model = trainer.bare_model
    rois, proposed = [], []
    heads = model.roi_heads
    pooler = heads.box_pooler if engine == "detectron2" else heads.box_roi_pool
    generator = model.proposal_generator if engine == "detectron2" else model.rpn
    pooler.register_forward_pre_hook(
        lambda module, args: rois.append(torch.cat([getattr(b, "tensor", b) for b in args[1]]))
    )
    conv = next(m for m in generator.modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda *args: proposed.append(torch.is_grad_enabled()))
    trainer.train()
    assert len(rois) == 6 and proposed and all(proposed)
    assert all(map(torch.equal, rois[::2], rois[1::2]))
    assert not torch.equal(rois[0], rois[2])
