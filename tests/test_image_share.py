"""Evaluation with a share of the test image in its statistics: against training-mode forwards,
numpy, and runs of both engines."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_run import arguments, evaluation_of, result_of, run_loggers_removed
from tiny_run import tiny_inputs as inputs  # noqa: F401
from torch import nn

from cbn_det.norms import build_norm, image_share

NORMS = ["BN", "BGN(groups=2)", "CBN(burn_in=0)", "MBN(burn_in=0)", "KN", "BRN(burn_in=0)"]


def layer_of(spec, channels=4, seed=0):
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(channels) if spec == "BN" else build_norm(spec, channels)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 3.0)
    return layer.eval()


def images(count, channels=4, size=5, seed=0):
    return 2.0 * torch.randn(count, channels, size, size, generator=_seeded(seed)) + 1.0


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def mixed(layer, x, share):
    """In numpy, an image at a time."""
    x = x.double().numpy()
    mu, sigma2 = (b.double().numpy() for b in (layer.running_mean, layer.running_var))
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    out = []
    for image in x:
        first = share * image.mean((1, 2)) + (1 - share) * mu
        second = share * (image**2).mean((1, 2)) + (1 - share) * (sigma2 + mu**2)
        std = np.sqrt(second - first**2 + layer.eps)
        scaled = (image - first[:, None, None]) / std[:, None, None]
        out.append(scaled * weight[:, None, None] + bias[:, None, None])
    return np.stack(out)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("spec", ["BN", "CBN", "KN", "MBN"])
def test_mixes_each_image_with_the_running_statistics(spec, share):
    layer, x = layer_of(spec), images(3)
    before = layer(x)
    with image_share(nn.Sequential(layer), share) as names:
        out = layer(x)
        alone = torch.cat([layer(image) for image in x.split(1)])
    assert names == (["0"] if share else [])
    np.testing.assert_allclose(out.detach().numpy(), mixed(layer, x, share), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, alone)
    assert torch.equal(layer(x), before), "afterwards all is as it was"


@pytest.mark.parametrize("spec", ["BN", "BGN(groups=2)", "BGN(groups=1)"])
def test_all_of_it_is_training_at_one_image(spec):
    layer, x = layer_of(spec), images(1)
    with image_share(layer, images_per_gpu=1):
        out = layer(x)
    expected = copy.deepcopy(layer).train()(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_without_a_share_it_is_that_of_training():
    """Images of one mini-batch, normalised together, against each with the others' expectation."""
    layer, x = layer_of("BN").double(), images(4).double()
    with image_share(layer, images_per_gpu=4):
        out = layer(x[:1]).detach().numpy()
    np.testing.assert_allclose(out, mixed(layer, x[:1], 0.25), rtol=1e-9, atol=1e-9)
    with image_share(layer, images_per_gpu=2, world_size=8):
        out = layer(x[:1]).detach().numpy()
    np.testing.assert_allclose(out, mixed(layer, x[:1], 0.5), rtol=1e-9, atol=1e-9)
    for synced in (nn.SyncBatchNorm(4), build_norm("SyncBN(start=0.5)", 4)):
        synced = synced.eval().double()
        synced.load_state_dict(layer.state_dict())
        with image_share(synced, images_per_gpu=2, world_size=8) as names:
            assert names == [""]
            out = synced(x[:1]).detach().numpy()
        np.testing.assert_allclose(out, mixed(layer, x[:1], 1 / 16), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", NORMS[1:4] + ["MBN(burn_in=0, window=3, decay=1.0)"])
def test_a_layers_share_is_what_its_estimate_declares(spec, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layer_of(spec)).train()
    declared, estimate = [], type(model[1]).estimate
    monkeypatch.setattr(
        type(model[1]),
        "estimate",
        lambda layer, batch: declared.append(estimate(layer, batch)) or declared[-1],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for t in range(10):
        model(images(2, 3, seed=t)).square().mean().backward()
        optimizer.step()
    share = torch.as_tensor(declared[-1].share)
    torch.testing.assert_close(share, torch.full_like(share, model[1].batch_share))
    assert 0.0 < model[1].batch_share <= 1.0


def test_kns_share_is_what_its_estimate_declares(monkeypatch):
    norms = [layer_of("KN(gain=0.3)", seed=s).train() for s in (0, 1)]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1]
    )  # fmt: skip
    declared, estimate = [], type(norms[1]).estimate
    monkeypatch.setattr(
        type(norms[1]),
        "estimate",
        lambda layer, batch: declared.append(estimate(layer, batch)) or declared[-1],
    )
    model(images(2, 3))
    assert float(declared[1].share) == pytest.approx(norms[1].batch_share)
    assert norms[1].batch_share < 1.0


def test_who_takes_part():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleList([layer_of(spec) for spec in NORMS])
            self.frozen = layer_of("BN").requires_grad_(False)
            self.bare = nn.BatchNorm2d(4, affine=False).eval()
            self.group = nn.GroupNorm(2, 4)
            self.roi_heads = nn.ModuleDict({"box": layer_of("BN")})

    model = Detector()
    body = [f"backbone.{i}" for i in range(len(NORMS))]
    with image_share(model, images_per_gpu=1) as names:
        assert names == [*body[:-1], "bare"]  # BRN's training is its evaluation
    with image_share(model, 0.5) as names:
        assert names == [*body, "bare"]
    with image_share(model, 0.0) as names:
        assert names == []
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(KeyError), image_share(model, 0.5):
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_in_training_and_empty_inputs_are_left_alone():
    layer, x = layer_of("BN"), images(2)
    empty = layer(x[:0])
    expected = copy.deepcopy(layer).train()(x)
    with image_share(layer, 0.5):
        assert torch.equal(layer(x[:0]), empty)
        assert torch.equal(layer.train()(x), expected)


def test_half_precision_is_kept():
    layer, x = layer_of("BN"), images(2)
    with image_share(layer, 0.5):
        exact = layer(x)
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["BN", "CBN", "BN without affine"])
def test_models_of_half_precision(spec, dtype):
    """Weights of that dtype too; against float32 with weights and images rounded alike."""
    layer = nn.BatchNorm2d(4, affine=False).eval() if "without" in spec else layer_of(spec)
    layer, x = layer.to(dtype), images(2).to(dtype)
    with image_share(layer, 0.5):
        half = layer(x)
    assert half.dtype == dtype
    with image_share(layer.float(), 0.5):
        exact = layer(x.float())
    torch.testing.assert_close(half.float(), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("share, images_per_gpu", [(1.5, None), (-0.1, 1), (None, None), (None, 0)])
def test_wrong_shares(share, images_per_gpu):
    with pytest.raises(ValueError, match="share"):
        with image_share(layer_of("BN"), share, images_per_gpu=images_per_gpu):
            pass


# ---- the launcher ----------------------------------------------------------------------------

ENGINES = [
    pytest.param("standalone", "standalone.yaml"),
    pytest.param("detectron2", "tiny.yaml", marks=pytest.mark.detectron2),
]


def run_here(inputs, output, engine, config, *words):  # noqa: F811
    from cbn_det.launch import main

    with run_loggers_removed():
        return main(["--engine", engine, *arguments(inputs, output, *words, config=config)])


@pytest.mark.parametrize("engine, config", ENGINES)
def test_a_run_evaluates_once_more(inputs, tmp_path, engine, config, capsys):  # noqa: F811
    run = (inputs, tmp_path, engine, config)
    train = ("SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER", "3")
    assert run_here(*run, "--image-share", "auto", *train) == 0
    result = result_of(tmp_path)
    shared = result["results_image_share"]["bbox"]
    assert result["image_share"] == "auto" and set(shared) == set(result["results"]["bbox"])
    plain, mixed = (
        json.loads((folder / "coco_instances_results.json").read_text())
        for folder in (tmp_path, tmp_path / "inference_image_share")
    )
    assert mixed and mixed != plain, "after three steps running statistics are far off"
    # the images per GPU of the training count, not those of this config
    weights = ("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "SOLVER.IMS_PER_BATCH", "4")
    assert run_here(*run, "--eval-only", "--image-share", "auto", *weights) == 0
    again = evaluation_of(tmp_path)
    assert again["results_image_share"]["bbox"] == shared
    assert again["images_per_gpu"] == 2
    assert run_here(*run, "--eval-only", "--image-share", "0.5", *weights) == 0
    assert evaluation_of(tmp_path)["results_image_share"]["bbox"] == shared
    assert run_here(*run, "--eval-only", "--image-share", "0", *weights) == 0
    assert evaluation_of(tmp_path)["results_image_share"] is None
    assert run_here(*run, "--eval-only", *weights) == 0
    assert evaluation_of(tmp_path)["results_image_share"] is None
    assert result_of(tmp_path) == result
    # weights of nobody knows which training
    elsewhere = (inputs, tmp_path / "elsewhere", engine, config)
    capsys.readouterr()
    assert run_here(*elsewhere, "--eval-only", "--image-share", "auto", *weights) == 2
    assert "give a number" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1.5", "-1", "half"])
def test_a_wrong_share_is_refused(text, capsys):
    from cbn_det.run.arguments import argument_parser

    with pytest.raises(SystemExit) as error:
        argument_parser().parse_args(["--config-file", "x", "--image-share", text])
    assert error.value.code == 2 and "--image-share" in capsys.readouterr().err
