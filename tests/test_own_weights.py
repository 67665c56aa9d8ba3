"""Weights that are meant to be this run's own, to evaluate or to resume, fit to the last tensor."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from both_engines import ENGINES, make_trainer, words_for
from tiny_run import evaluation_of, run_loggers_removed, tiny_inputs

from cbn_det.launch import main

inputs = tiny_inputs

NO_TEST = ("DATASETS.TEST", "()")
# change of the model: words, the tensors that do not fit, the key to look at
CHANGES = {
    "classes": ((), r"roi_heads\.box_predictor\.\w+\.(weight|bias)", "MODEL.ROI_HEADS.NUM_CLASSES"),
    "without norm": (("MODEL.FPN.NORM", ""), r"backbone\.fpn\S+", "MODEL.FPN.NORM"),
    "one layer more": (
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", "2"),
        r"roi_heads\.box_head\S+",
        "MODEL.ROI_BOX_HEAD",
    ),
    "a mask head": (("MODEL.MASK_ON", "True"), r"roi_heads\.mask_\S+", "MODEL.MASK_ON"),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(engine: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are not the initial ones."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(engine, inputs, folder, *NO_TEST, "SOLVER.MAX_ITER", "1").train()
    return folder


def other_classes(folder: Path) -> None:
    """Makes the checkpoint one of a detector of three classes."""
    path = folder / "model_final.pth"
    content = torch.load(path, weights_only=True)
    for name, tensor in content["model"].items():
        if "box_predictor" in name:
            more = tensor[:1] if "cls" in name else tensor[:4]
            content["model"][name] = torch.cat([tensor, more])
    torch.save(content, path)


@pytest.mark.parametrize(
    "use, change",
    [
        *(("evaluate", change) for change in CHANGES),
        ("evaluate the last", "classes"),
        *(("resume", change) for change in CHANGES),
    ],
)
def test_those_of_another_model_are_refused(
    engine: str,
    inputs: Path,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    use: str,
    change: str,
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model_final.pth"
    words, tensor, key = CHANGES[change]
    if change == "classes":
        other_classes(tmp_path)
    flags = {
        "evaluate": ("--eval-only", "MODEL.WEIGHTS", str(weights)),
        "evaluate the last": ("--eval-only", "--resume"),
        "resume": ("--resume", "SOLVER.MAX_ITER", "3"),
    }[use]
    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path, *flags, *words)) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line[:7] == "error: "]
    assert str(weights) in error and ("--resume" in error or use == "evaluate"), error
    assert re.search(tensor, error) and key in error, error
    assert not (tmp_path / "evaluation" / "result.json").exists()


def test_its_own_are_evaluated(engine: str, inputs: Path, trained: Path, tmp_path: Path) -> None:
    words = ("--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path, *words)) == 0
    assert "AP" in evaluation_of(tmp_path)["results"]["bbox"]


@pytest.mark.parametrize("resume", [(), ("--resume",)])  # without a checkpoint to resume
def test_a_training_starts_from_a_backbone_alone(
    engine: str, inputs: Path, trained: Path, tmp_path: Path, resume: tuple[str, ...]
) -> None:
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    backbone = {k: v for k, v in weights.items() if k.startswith(("backbone.b", "backbone.body"))}
    assert 0 < len(backbone) < len(weights)
    path = tmp_path / "backbone.pth"
    torch.save({"model": backbone}, path)
    more = ("MODEL.WEIGHTS", str(path), "MODEL.FPN.NORM", "", "SOLVER.MAX_ITER", "1", *NO_TEST)
    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path / "out", *resume, *more)) == 0


@pytest.mark.detectron2
def test_what_a_file_may_have_or_lack() -> None:
    """Counters, and what the config sets, which old files of detectron2's zoo hold."""
    from torch import nn

    from cbn_det.plugin.checkpointer import AtomicCheckpointer
    from cbn_det.run.errors import ConfigError

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)
            self.one = nn.Linear(2, 2)
            self.two = self.one

    state = Shared().state_dict()
    lean = {k: v for k, v in state.items() if "two" not in k and "tracked" not in k}
    old = lean | {
        "pixel_mean": torch.zeros(3),
        "head.anchor_generator.cell_anchors.0": state["norm.bias"],
    }
    for content, wrong in (
        (lean, ""),
        (old, ""),
        (lean | {"teacher.weight": torch.zeros(1)}, r"teacher\.weight is not in the model"),
        ({k: v for k, v in lean.items() if k != "norm.running_var"}, r"norm\.running_var is not"),
        ({k: v for k, v in lean.items() if "one" not in k}, r"one\.weight is not in the file"),
    ):
        checkpointer = AtomicCheckpointer(Shared())
        checkpointer._load_file = lambda path, content=content: {"model": dict(content)}
        path = __file__  # any file that is there
        if wrong:
            with pytest.raises(ConfigError, match=f"^it is of another model: {wrong}"):
                checkpointer.load_complete(path, "it")
        else:
            checkpointer.load_complete(path, "it")
