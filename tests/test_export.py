"""cbn-det deploy: what it writes loads without this package and puts out the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from test_deploy import norm_layers, with_history

import cbn_det
from cbn_det import deploy
from cbn_det.predict import load_run
from cbn_det.run import export as export_module
from cbn_det.run.detector import Detector

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = ((96, 120), (130, 77), (64, 64))
STANDALONE = "standalone"
DETECTRON2 = pytest.param("detectron2", marks=pytest.mark.detectron2)
ENGINES = [STANDALONE, DETECTRON2]
MASKS = {"MASK_ON": True, "ROI_MASK_HEAD": {"NUM_CONV": 1, "CONV_DIM": 32, "POOLER_RESOLUTION": 4}}
NORMS = {"RESNETS": "KN", "FPN": "CBN(window=2, burn_in=0)", "ROI_BOX_HEAD": "MBN(window=2)"}


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    yield
    if "cbn_det.plugin.registry" in sys.modules:
        cbn_det.unregister()


def build(folder: Path, engine: str, norms: dict[str, str], arch: str = "rcnn") -> Path:
    """The folder of a run: a config, a checkpoint, images of its test set and what it found."""
    if engine == "standalone":
        from cbn_det.standalone.config import get_cfg
        from cbn_det.standalone.model import build_model
    else:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model

        cbn_det.register()
    text = tiny_run.STANDALONE_CONFIG if engine == "standalone" else tiny_run.CONFIG
    (folder / "run").mkdir()
    (folder / "source.yaml").write_text(text if arch == "rcnn" else retinanet(text))
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "source.yaml"))
    if arch == "rcnn":
        cfg.MODEL.MASK_ON = True
        for key, value in MASKS["ROI_MASK_HEAD"].items():
            cfg.MODEL.ROI_MASK_HEAD[key] = value
    for key, norm in norms.items():
        cfg.MODEL[key].NORM = norm
    torch.manual_seed(0)
    model = with_history(build_model(cfg)).eval()
    for layer in norm_layers(model):
        if layer.weight is not None:
            layer.weight.data *= 0.3
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "predictor.2.weight", "predictor.weight")):
            parameter.data *= 40  # else all scores are alike, and rounding orders them
        if name.startswith("head.") and parameter.ndim == 4:  # RetinaNet's
            torch.nn.init.kaiming_normal_(parameter)
    run = folder / "run"
    torch.save({"model": model.state_dict()}, run / "model_final.pth")
    (run / "last_checkpoint").write_text("model_final.pth")
    (run / "config.yaml").write_text(cfg.dump())
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(folder / f"{i}.png")
    records = [{"id": i, "file_name": f"{i}.png"} for i in range(len(SIZES))]
    (folder / "set.json").write_text(json.dumps({"images": records}))
    made = [{"image_id": i, "score": 0.5} for i in range(2)]
    (run / "coco_instances_results.json").write_text(json.dumps(made))
    test_set = {"annotations": str(folder / "set.json"), "images": str(folder)}
    test_set["classes"] = ["orange", "blue"]
    (run / "result.json").write_text(json.dumps({"test_set": test_set}))
    return run


def retinanet(text: str) -> str:
    return (
        text.replace(
            "GeneralizedRCNN",
            "RetinaNet\n  RETINANET: {NUM_CLASSES: 2, NUM_CONVS: 2, SCORE_THRESH_TEST: 0.0}",
        )
        .replace("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
        .replace("OUT_FEATURES: [res2,", "OUT_FEATURES: [")
        .replace("FPN: {IN_FEATURES: [res2,", "FPN: {IN_FEATURES: [")
    )


@pytest.fixture(scope="module", params=ENGINES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each engine, with norms of ours."""
    folder = tmp_path_factory.mktemp(request.param)
    found = build(folder, request.param, NORMS)
    cbn_det.unregister() if request.param == "detectron2" else None
    return found


def stranger(code: str, words: list[Any], cwd: Path) -> None:
    """Runs code in a python that has none of this package."""
    blocked = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cbn_det":
            raise ImportError("cbn_det is blocked")
sys.meta_path.insert(0, Blocker())
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", blocked + code, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def inputs_of(detector: Detector) -> list[torch.Tensor]:
    """Images of a real camera's kind, of three sizes."""
    folder = detector.run.parent
    return [
        detector.model_input(np.array(Image.open(folder / f"{i}.png").convert("RGB")))
        for i in range(len(SIZES))
    ]


def trained_outputs(detector: Detector) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    images = inputs_of(detector)
    with torch.no_grad():
        return images, [list(detector.traceable(image)(image)) for image in images]


def assert_same(found: list[Any], expected: list[torch.Tensor]) -> None:
    """In order and to 1e-4; boxes relative to 100 pixels."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = np.asarray(torch.as_tensor(one).detach()), other.numpy()
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2 if number == 0 else 1e-4)


# ---- the engines' own terms ------------------------------------------------------------------

STOCK = """
import numpy as np, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from PIL import Image
config, output, *images = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config)
predictor = DefaultPredictor(cfg)
found = [predictor(np.array(Image.open(i).convert("RGB"))[:, :, ::-1])["instances"] for i in images]
torch.save([(f.pred_boxes.tensor, f.scores, f.pred_classes) for f in found], output)
"""


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("arch", "norms"),
    [
        ("rcnn", NORMS),
        ("retinanet", {"RESNETS": "BRN", "FPN": "BGN(groups=4)", "RETINANET": "CBN"}),
    ],
    ids=["rcnn", "retinanet"],
)
def test_stock_detectron2_loads_it_from_any_folder(
    arch: str, norms: dict[str, str], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    run = build(tmp_path, "detectron2", norms, arch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert deploy.main(["run", "--output", "deployed"]) == 0
    printed = capfd.readouterr()
    assert "became plain BatchNorm" in printed.out and printed.err == ""
    paths = [tmp_path / f"{i}.png" for i in range(len(SIZES))]
    stranger(STOCK, ["../deployed/config.yaml", "found.pth", *paths], elsewhere)
    detector = load_run(run)
    for path, found in zip(paths, torch.load(elsewhere / "found.pth"), strict=True):
        expected = detector(path)
        assert len(expected) >= 4
        np.testing.assert_array_equal(found[1], expected.scores)
        np.testing.assert_array_equal(found[0], expected.boxes)
    state = torch.load(tmp_path / "deployed" / "model.pth")["model"]
    assert not [key for key in state if "gain" in key]
    text = (tmp_path / "deployed" / "config.yaml").read_text()
    assert not [name for name in ("CBN", "KN", "MBN", "BGN", "BRN") if name in text]


PLAIN = """
import torch
model = torch.load("model.pth", weights_only=False)
assert type(model).__module__.startswith("torchvision.")
with torch.no_grad():
    found = [model([image])[0] for image in torch.load(sys.argv[1])]
torch.save(found, sys.argv[2])
"""


def test_a_standalone_run_loads_with_torchvision_alone(tmp_path: Path, capsys: Any) -> None:
    run = build(tmp_path, "standalone", NORMS | {"FPN": "GN"})
    output = tmp_path / "deployed"
    assert deploy.main([str(run), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "folded into their convolution" in printed.out and "8 GroupNorm" in printed.out
    assert printed.err == ""
    detector = load_run(run)
    images = inputs_of(detector)
    torch.save(images, tmp_path / "images.pth")
    stranger(PLAIN, [tmp_path / "images.pth", tmp_path / "found.pth"], output)
    for image, found in zip(images, torch.load(tmp_path / "found.pth"), strict=True):
        with torch.no_grad():
            (expected,) = detector.model([image])
        assert len(expected["scores"]) >= 4
        names = ("boxes", "scores", "labels", "masks")
        assert_same([found[n] for n in names], [expected[n] for n in names])
    described = json.loads((output / "model.json").read_text())
    assert described["classes"] == ["orange", "blue"] and described["first_label"] == 1


# ---- graphs ----------------------------------------------------------------------------------

SCRIPTED = """
import torch, torchvision
model = torch.jit.load("model.ts")
torch.save([model(image) for image in torch.load(sys.argv[1])], sys.argv[2])
"""


def test_torchscript_loads_without_this_package(run: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "deployed"
    words = [str(run), "--format", "torchscript", "--output", str(output)]
    assert deploy.main(words) == 0
    printed = capsys.readouterr()
    assert "folded into their convolution" in printed.out and printed.err == ""
    images, expected = trained_outputs(load_run(run))
    torch.save(images, tmp_path / "images.pth")
    stranger(SCRIPTED, [tmp_path / "images.pth", tmp_path / "found.pth"], output)
    for found, want in zip(torch.load(tmp_path / "found.pth"), expected, strict=True):
        assert len(want) == 4 and len(want[1]) >= 4
        assert_same(found, want)
    detector = load_run(run)
    for i, (_, scores, labels, _) in enumerate(torch.load(tmp_path / "found.pth")):
        ready = detector(run.parent / f"{i}.png")  # test_predict compares it with an evaluation
        keep = ready.scores > 0.1
        np.testing.assert_allclose(scores[scores > 0.1].detach(), ready.scores[keep], atol=1e-4)
        assert labels[scores > 0.1].tolist() == ready.labels[keep].tolist() and keep.sum() >= 2
    graph = str(torch.jit.load(str(output / "model.ts")).inlined_graph)
    assert "aten::batch_norm" not in graph and "aten::_convolution" in graph


def test_onnx_puts_out_what_torch_does_at_any_size(run: Path, tmp_path: Path, onnx: None) -> None:
    """At two sizes besides that of the image that it was traced and tried on."""
    from onnxruntime import InferenceSession

    output = tmp_path / "deployed"
    words = [str(run), "--format", "onnx", "--output", str(output)]
    assert deploy.main([*words, "--image", str(run.parent / "0.png")]) == 0
    session = InferenceSession(str(output / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["boxes", "scores", "labels", "masks"]
    images, expected = trained_outputs(load_run(run))
    assert len({tuple(image.shape) for image in images}) == 3
    for one, want in zip(images, expected, strict=True):
        assert len(want[1]) >= 4
        assert_same(session.run(None, {"image": one.numpy()}), want)


def test_onnx_on_photographs(run: Path, tmp_path: Path, shared_data: Path, onnx: None) -> None:
    """Of two sizes, neither the one that it was traced with."""
    from onnxruntime import InferenceSession

    words = [str(run), "--format", "onnx", "--output", str(tmp_path / "deployed")]
    assert deploy.main([*words, "--image", str(run.parent / "0.png")]) == 0
    path = str(tmp_path / "deployed" / "model.onnx")
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    detector, shapes = load_run(run), set()
    for photo in sorted((shared_data / "balloon" / "images").iterdir())[:6]:
        image = detector.model_input(np.array(Image.open(photo).convert("RGB")))
        with torch.no_grad():
            want = list(detector.traceable(image)(image))
        assert len(want[1]) >= 4
        assert_same(session.run(None, {"image": image.numpy()}), want)
        shapes.add(tuple(image.shape))
    assert len(shapes) >= 2


@pytest.mark.detectron2
def test_onnx_of_retinanet_with_a_norm_for_each_level(tmp_path: Path, onnx: None) -> None:
    run = build(tmp_path, "detectron2", {"RETINANET": "CBN", "FPN": "KN"}, "retinanet")
    assert deploy.main([str(run), "--format", "onnx"]) == 0
    assert (run / "deployed-onnx" / "model.onnx").exists()


# ---- what is refused -------------------------------------------------------------------------


def refused(capsys: Any, *words: Any) -> str:
    assert deploy.main(list(map(str, words))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    return printed


def test_what_cannot_be_deployed_is_one_error(run: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "deployed"
    assert "no config.yaml" in refused(capsys, tmp_path, "--output", output)
    assert "no such file" in refused(capsys, run, "--weights", "nowhere.pth", "--output", output)
    assert "not a checkpoint" in refused(
        capsys, run, "--weights", run / "config.yaml", "--output", output
    )
    few = ("--output", output, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9999999)
    assert "finds nothing" in refused(capsys, run, "--format", "torchscript", *few)
    assert "not an image" in refused(capsys, run, "--image", run / "config.yaml", *few[:2])
    assert not output.exists(), "nothing is left"
    output.mkdir()
    (output / "mine.txt").touch()
    assert "new or an empty folder" in refused(capsys, run, "--output", output)
    assert (output / "mine.txt").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", ["torch", "torchscript"])
def test_gkn_is_refused_by_name(engine: str, format: str, tmp_path: Path, capsys: Any) -> None:
    run = build(tmp_path, engine, {"FPN": "GKN(groups=4)"})
    said = refused(capsys, run, "--format", format)
    assert "GKN" in said and "statistics from its own input" in said.replace("\n", " ")
    assert not (run / "deployed-torch").exists()


def test_onnx_without_onnx_is_one_line(run: Path, monkeypatch: Any, capsys: Any) -> None:
    find = export_module.importlib.util.find_spec
    monkeypatch.setattr(
        export_module.importlib.util, "find_spec", lambda n, *a: None if n == "onnx" else find(n)
    )
    assert "pip install onnx onnxruntime" in refused(capsys, run, "--format", "onnx")


def test_a_model_that_became_another_one_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def wrong(model: torch.nn.Module, **options: Any) -> str:
        for parameter in model.backbone.parameters():
            parameter.data *= 1.01
        return "done"

    monkeypatch.setattr(export_module, "fold", wrong)
    output = tmp_path / "deployed"
    assert deploy.main([str(run), "--format", "torchscript", "--output", str(output)]) == 1
    assert "puts out something else" in capsys.readouterr().err and not output.exists()


def test_a_standalone_model_that_became_another_one_is_not_written(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """By folding, which a comparison of the folded model with the one that is read would miss."""
    from cbn_det.standalone import detector

    run, fold = build(tmp_path, "standalone", {"FPN": "CBN"}), detector.fold

    def wrong(model: torch.nn.Module, **options: Any) -> Any:
        report = fold(model, **options)
        for parameter in model.backbone.parameters():
            parameter.data *= 1.01
        return report

    monkeypatch.setattr(detector, "fold", wrong)
    output = tmp_path / "deployed"
    assert deploy.main([str(run), "--output", str(output)]) == 1
    assert "puts out something else" in capsys.readouterr().err and not output.exists()


def test_differences_are_between_detections_of_the_same_label() -> None:
    """Those of equal score may change places; one may not stand for two."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    one = [boxes, torch.tensor([0.5, 0.5]), torch.tensor([1, 1])]
    swapped = [boxes.flip(0), *one[1:]]
    assert export_module.difference(one, swapped, 100) == 0
    moved = [boxes + torch.tensor([1.0, 0, 0, 0]), *one[1:]]
    assert export_module.difference(one, moved, 100) == pytest.approx(0.01)
    assert export_module.difference(one, [*one[:2], torch.tensor([1, 2])], 100) == float("inf")
    assert export_module.difference(one, [boxes[[0, 0]], *one[1:]], 100) > 0.1
    assert export_module.difference(one, [t[:1] for t in one], 100) == float("inf")
