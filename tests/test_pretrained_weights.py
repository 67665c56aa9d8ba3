"""Which pretrained weights a training may start from, told by what is in the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import arguments, parsed, run_loggers_removed, tiny_inputs

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs

SHORT = ("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
# GN wants channels in 32s
WIDER = ("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64")
WIDER += ("MODEL.RESNETS.WIDTH_PER_GROUP", "32")


def backbone(inputs: Path, norm: str, *words: str) -> Any:
    """A ResNet-50 with random norms, as if it had been trained on ImageNet."""
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.trainer import Trainer

    words = (*WIDER, "MODEL.RESNETS.NORM", norm, *words)
    cfg, _ = build_config(parsed(inputs, "unused", *words), 1)
    model = Trainer.build_model(cfg).backbone.bottom_up.eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.2)
    return model


def converted(model: Any) -> dict[str, np.ndarray]:
    return {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if "num_batches" not in name
    }


def write(path: Path, weights: dict[str, np.ndarray], author: str | None) -> str:
    content: dict[str, Any] = weights
    if author:  # the format of detectron2's zoo; without, it is Caffe2's, whose names it translates
        content = {"model": weights, "__author__": author, "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}


def caffe2_name(name: str) -> str:
    """``res2.0.conv1.norm.weight`` to ``res2_0_branch2a_bn_s``."""
    layer, _, end = name.rpartition(".")
    is_norm = layer.endswith(".norm")
    block, _, conv = layer.removesuffix(".norm").rpartition(".")
    if block == "stem":
        layer = "res_conv1" if is_norm else "conv1"
    else:
        layer = f"{block}.{BRANCHES[conv]}"
    end = {"weight": "bn_s", "bias": "bn_b"}[end] if is_norm else "w"
    return f"{layer}.{end}".replace(".", "_")


def folded(model: Any) -> dict[str, np.ndarray]:
    """Caffe2's weights of the same function: statistics taken into scale and bias."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    weights = {}
    for name, value in state.items():
        if ".norm." not in name:
            weights[caffe2_name(name)] = value.float().numpy()
        elif name.endswith("norm.weight"):
            layer = name.removesuffix("weight")
            scale = value / (state[f"{layer}running_var"] + 1e-5).sqrt()
            bias = state[f"{layer}bias"] - state[f"{layer}running_mean"] * scale
            weights[caffe2_name(name)] = scale.float().numpy()
            weights[caffe2_name(f"{layer}bias")] = bias.float().numpy()
    return weights


@pytest.fixture(scope="module")
def files(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One network with its statistics and without; and another, with GroupNorm."""
    folder = tmp_path_factory.mktemp("weights")
    batchnorm = backbone(inputs, "FrozenBN")
    groupnorm = backbone(inputs, "GN")
    plain = {f"layer1.0.{name}": value for name, value in batchnorm.res2[0].state_dict().items()}
    torch.save(plain, folder / "torchvision.pth")
    return {
        "whole": write(folder / "whole.pkl", converted(batchnorm), "someone"),
        "folded": write(folder / "folded.pkl", folded(batchnorm), None),
        "GN": write(folder / "gn.pkl", converted(groupnorm), "someone"),
        "torchvision": str(folder / "torchvision.pth"),
    }


def load(inputs: Path, output: Path, *words: str) -> Any:
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, *WIDER, *SHORT, *words)
    cfg, _ = build_config(args, 1)
    prepare_datasets(cfg, args.coco_dataset)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def test_the_folded_weights_of_this_test_are_the_same_network(
    inputs: Path, files: dict[str, str], tmp_path: Path
) -> None:
    image = torch.randn(1, 3, 64, 64)
    outputs = []
    for kind in ("whole", "folded"):
        words = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.WEIGHTS", files[kind])
        model = load(inputs, tmp_path, *words).bare_model.backbone.bottom_up.eval()
        with torch.no_grad():
            outputs.append(model(image)["res5"])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-3 * outputs[0].std()


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN", "CBN", "KN", "MBN", "BGN", "BRN"])
def test_a_trainable_norm_refuses_folded_statistics(
    inputs: Path, files: dict[str, str], tmp_path: Path, norm: str
) -> None:
    words = ("MODEL.RESNETS.NORM", norm, "MODEL.WEIGHTS")
    with pytest.raises(ValueError, match="running mean 0 and variance 1") as refused:
        load(inputs, tmp_path, *words, files["folded"])
    for part in (files["folded"], f"MODEL.RESNETS.NORM {norm}", "FrozenBN", "all 53", "MSRA/R-50"):
        assert part in str(refused.value), part
    with pytest.raises(ValueError, match="GroupNorm's"):
        load(inputs, tmp_path, *words, files["GN"])
    load(inputs, tmp_path, *words, files["whole"])


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "CBN"),
        ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "5"),
    ],
    ids=["FrozenBN", "frozen BN"],
)
def test_frozen_norms_take_folded_statistics(
    inputs: Path, files: dict[str, str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    load(inputs, tmp_path, *words, "MODEL.WEIGHTS", files["folded"])


def test_stages_that_are_frozen_do_not_count(
    inputs: Path, files: dict[str, str], tmp_path: Path
) -> None:
    words = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "2")
    with pytest.raises(ValueError, match=r"all 42 .* backbone\.bottom_up\.res3\.0"):
        load(inputs, tmp_path, *words, "MODEL.WEIGHTS", files["folded"])


def test_a_detector_trained_on_folded_weights_cannot_be_unfrozen(
    inputs: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """FrozenBN saves the statistics that folded weights lack, and FPN and head have real ones."""
    words = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.WEIGHTS", files["folded"])
    load(inputs, tmp_path / "one", *words).train()
    trained = str(tmp_path / "one" / "model_final.pth")
    load(inputs, tmp_path, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.WEIGHTS", trained)
    with pytest.raises(ValueError, match="all 53"):
        load(inputs, tmp_path, "MODEL.RESNETS.NORM", "CBN", "MODEL.WEIGHTS", trained)


@pytest.mark.parametrize("norm", ["GN", "GKN"])
def test_group_norms_want_their_own_weights(
    inputs: Path, files: dict[str, str], tmp_path: Path, norm: str
) -> None:
    words = ("MODEL.RESNETS.NORM", norm, "MODEL.WEIGHTS")
    load(inputs, tmp_path, *words, files["GN"])
    with pytest.raises(ValueError, match="trained with GroupNorm.*FAIR/R-50-GN") as refused:
        load(inputs, tmp_path, *words, files["whole"])
    assert "backbone.bottom_up." in str(refused.value) and norm in str(refused.value)


def test_what_a_run_saved_may_be_trained_on(inputs: Path, tmp_path: Path) -> None:
    words = ("MODEL.RESNETS.NORM", "CBN")
    load(inputs, tmp_path / "one", *words).train()
    for norm in ("CBN", "BN", "FrozenBN"):
        weights = str(tmp_path / "one" / "model_final.pth")
        load(inputs, tmp_path, "MODEL.RESNETS.NORM", norm, "MODEL.WEIGHTS", weights)


def test_weights_of_an_untrained_network_are_no_folded_ones(inputs: Path, tmp_path: Path) -> None:
    trainer = load(inputs, tmp_path, "MODEL.RESNETS.NORM", "BN")
    torch.save({"model": trainer.bare_model.state_dict()}, tmp_path / "untrained.pth")
    words = ("MODEL.RESNETS.NORM", "CBN", "MODEL.WEIGHTS", str(tmp_path / "untrained.pth"))
    load(inputs, tmp_path, *words)


def test_a_layer_without_use_does_not_count(inputs: Path, tmp_path: Path) -> None:
    """Weight decay has changed its scale, and nothing its statistics."""
    weights = converted(backbone(inputs, "FrozenBN"))
    for part, value in (("running_mean", 0.0), ("running_var", 1.0)):
        weights[f"res5.2.conv3.norm.{part}"].fill(value)
    file = write(tmp_path / "unused.pkl", weights, "someone")
    load(inputs, tmp_path, "MODEL.RESNETS.NORM", "BN", "MODEL.WEIGHTS", file)


def test_weights_that_fit_nothing_are_refused(
    inputs: Path, files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="none of its tensors.*convert-torchvision-to-d2"):
        load(inputs, tmp_path, "MODEL.WEIGHTS", files["torchvision"])


def test_the_launcher_refuses_in_one_line_and_resumes_without_looking(
    inputs: Path,
    files: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cbn_det.launch import main

    words = ("MODEL.RESNETS.NORM", "BN", *WIDER, *SHORT)
    with run_loggers_removed():
        code = main(arguments(inputs, tmp_path, *words, "MODEL.WEIGHTS", files["folded"]))
    assert code == 2
    said = capfd.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("error: MODEL.WEIGHTS")]) == 1
    assert "Traceback" not in said

    # a checkpoint of the run's own is what its training left, whatever MODEL.WEIGHTS names
    with run_loggers_removed():
        assert main(arguments(inputs, tmp_path, *words)) == 0
        checked = []
        monkeypatch.setattr("cbn_det.plugin.resume.check_weights", lambda *_: checked.append(1))
        again = ("--resume", *words, "MODEL.WEIGHTS", files["folded"])
        assert main(arguments(inputs, tmp_path, *again)) == 0
        assert not checked
        assert main(arguments(inputs, tmp_path / "empty", *again)) == 0
        assert checked  # there was nothing to resume
