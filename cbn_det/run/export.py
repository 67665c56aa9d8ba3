"""Writes the model of a trained detector as files that load without this package."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..deploy import Deployment, fold
from .detector import Detector, read_rgb
from .errors import ConfigError, one_line
from .files import replace_file, write_text
from .folder import PREDICTIONS

#: largest difference of an output: of boxes relative to the image's longest side, else absolute
TOLERANCE = 1e-4
#: the first with RoIAlign's aligned=True, which detectron2's poolers need, is 16
OPSET = 17
OUTPUTS = ("boxes", "scores", "labels", "masks")
_IMAGES = 3  # of the run's test set, to try a model on


def export(
    detector: Detector, format: str, output: Path, images: Sequence[Path] | None = None
) -> tuple[Deployment, list[Path]]:
    """
    Writes the model and ``model.json``, which says what goes in and what comes out.

    Args:
        detector: its model is changed: norms become BatchNorm or are folded.
        format: ``torch`` (the engine's own terms), ``torchscript`` or ``onnx``.
        output: a new or an empty folder.
        images: to try the written model on; None: those of the run's first test set with the
            surest predictions.

    Returns:
        What became of the norms, and the files.

    Raises:
        ConfigError: the folder, a norm or an image does not allow it, the model finds nothing on
            the images, or a library is missing.
        RuntimeError: the written model puts out something else than the trained one. Nothing is
            left in the folder then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: expected a new or an empty folder")
    if format == "onnx" and importlib.util.find_spec("onnx") is None:
        raise ConfigError("--format onnx needs the onnx package: pip install onnx onnxruntime")
    paths = _surest_images(detector) if images is None else images
    inputs = [detector.model_input(read_rgb(path)) for path in paths] or [_noise(detector)]
    output.mkdir(parents=True, exist_ok=True)
    try:
        if format == "torch":
            report, files = detector.write_plain(output, inputs)
        else:
            report, files = _write_graph(detector, format, output, inputs)
        described = output / "model.json"
        text = json.dumps(_describe(detector, format), indent=2, ensure_ascii=False) + "\n"
        write_text(described, text)
    except BaseException:
        shutil.rmtree(output)
        raise
    return report, [*files, described]


def _write_graph(
    detector: Detector, format: str, output: Path, inputs: list[Tensor]
) -> tuple[Deployment, list[Path]]:
    folded = copy.deepcopy(detector.model)
    report = fold(folded)
    with torch.no_grad():
        traced = detector.traceable(inputs[0])
        trained = [traced(image) for image in inputs]
        found = [len(scores) for _, scores, *_ in trained]
        if not max(found):
            raise ConfigError(
                f"--format {format}: the model finds nothing on the images it is tried on, so a"
                " trace would not see it all; name one with --image on which it finds objects"
            )
        detector.model = folded
        example = inputs[int(np.argmax(found))]
        traced = detector.traceable(example)
        expected = [traced(image) for image in inputs]
        check_same(trained, expected, inputs, "folded")
        path = output / {"torchscript": "model.ts", "onnx": "model.onnx"}[format]
        write = _write_torchscript if format == "torchscript" else _write_onnx
        read = write(traced, example, len(expected[0]), path)
        if read is not None:
            check_same(expected, [read(image) for image in inputs], inputs, "written")
    return report, [path]


Reader = Callable[[Tensor], Sequence[Tensor]]


def _write_torchscript(model: torch.nn.Module, example: Tensor, outputs: int, path: Path) -> Reader:
    traced = torch.jit.trace(model, (example,), check_trace=False)
    replace_file(path, lambda file: torch.jit.save(traced, file))
    return torch.jit.load(str(path))


def _write_onnx(model: torch.nn.Module, example: Tensor, outputs: int, path: Path) -> Reader | None:
    """None where there is no onnxruntime to read it."""
    names = OUTPUTS[:outputs]
    # torch.export, which the newer exporter starts with, stops at non-maximum suppression: how many
    # boxes it leaves depends on the data
    older = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with open(path, "wb") as file:
        torch.onnx.export(
            model,
            (example,),
            file,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(names),
            dynamic_axes={"image": {1: "height", 2: "width"}, **{n: {0: "n"} for n in names}},
            **older,
        )
    if importlib.util.find_spec("onnxruntime") is None:
        print("note: onnxruntime is not installed, so model.onnx was written but not tried")
        return None
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: [
        torch.from_numpy(array) for array in session.run(None, {"image": image.cpu().numpy()})
    ]


def check_same(
    expected: Sequence[Sequence[Tensor]],
    found: Sequence[Sequence[Tensor]],
    inputs: Sequence[Tensor],
    what: str,
) -> None:
    """Compares detections, see :func:`difference`.

    Args:
        what: the model that ``found`` is of, for the error.

    Raises:
        RuntimeError: an output differs by more than `TOLERANCE`.
    """
    for one, other, image in zip(expected, found, inputs, strict=True):
        error = difference(one, other, max(image.shape[-2:]))
        if error > TOLERANCE:
            raise RuntimeError(
                f"the {what} model puts out something else than the trained one: it differs by"
                f" {error:.1e}. Nothing was written; please report this config"
            )


def difference(expected: Sequence[Tensor], found: Sequence[Tensor], side: int) -> float:
    """The largest difference of two detections of one image, each one beside the nearest of its
    label: those of equal score may change places.

    Args:
        expected, found: boxes, scores, labels and maybe masks.
        side: that differences of boxes are relative to, in pixels.

    Returns:
        infinity where they are not as many.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    boxes, scores, labels, *masks = (t.detach().cpu().double() for t in expected)
    others = [t.detach().cpu().double() for t in found]
    if not len(scores):
        return 0.0
    gaps = (boxes[:, None] - others[0]).abs().amax(2) / side
    gaps = torch.maximum(gaps, (scores[:, None] - others[1]).abs())
    gaps[labels[:, None] != others[2]] = float("inf")
    gap, nearest = gaps.min(dim=1)
    if len(set(nearest.tolist())) < len(nearest):  # one stands for two: those are not the same
        return float("inf")
    worst = [
        gap.max(),
        *((m - o[nearest]).abs().max() for m, o in zip(masks, others[3:], strict=True)),
    ]
    return float(torch.stack(worst).max())


def _surest_images(detector: Detector) -> list[Path]:
    """The test images with the surest predictions; none where the run left no predictions."""
    data, predictions = detector.result.get("test_set"), detector.run / PREDICTIONS
    if not (data and predictions.exists()):
        return []
    best: dict[Any, float] = {}
    for one in json.loads(predictions.read_text(encoding="utf-8")):
        best[one["image_id"]] = max(one["score"], best.get(one["image_id"], 0.0))
    try:
        records = json.loads(Path(data["annotations"]).read_text(encoding="utf-8"))["images"]
    except OSError as error:
        raise ConfigError(
            f"the run's test set cannot be read ({one_line(error)}): name images with --image"
        ) from error
    records = sorted(records, key=lambda record: -best.get(record["id"], 0.0))
    return [Path(data["images"], record["file_name"]) for record in records[:_IMAGES]]


def _noise(detector: Detector) -> Tensor:
    """Blurred noise, for a run whose test images are not known."""
    coarse = np.random.default_rng(0).random((20, 20, 3)).astype(np.float32)
    tensor = torch.from_numpy(coarse).permute(2, 0, 1)[None]
    smooth = torch.nn.functional.interpolate(tensor, (320, 320), mode="bilinear")[0]
    return detector.model_input((255 * smooth).byte().permute(1, 2, 0).numpy())


def _describe(detector: Detector, format: str) -> dict[str, Any]:
    sizes = detector.cfg.INPUT
    return {
        "format": format,
        "input": {
            "image": "float32 [3, height, width], 0 to 255, resized with antialiasing",
            "channels": sizes.FORMAT,
            "shortest_side": sizes.MIN_SIZE_TEST,
            "longest_side_at_most": sizes.MAX_SIZE_TEST,
        },
        "output": {
            "boxes": "float32 [n, 4], x1 y1 x2 y2 in pixels of the input",
            "scores": "float32 [n]",
            "labels": "int64 [n]",
            "masks": "float32 [n, 1, s, s], probabilities on a grid over each box; if it has masks",
        },
        "first_label": 0 if format != "torch" else detector.first_label,
        "classes": detector.class_names,
    }
