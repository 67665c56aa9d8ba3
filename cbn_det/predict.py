"""Trained runs as functions of an image; ``cbn-det predict`` draws what they find."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data.pictures import Lettering, Mark, color_of, draw
from .run.detector import Detector, Predictions, read_rgb, without_notices_of_torch
from .run.errors import ConfigError, one_line
from .run.folder import CONFIG


def load_run(
    run: str | Path, weights: str | Path | None = None, opts: Sequence[str] = ()
) -> Detector:
    """The trained detector of a run's folder, whichever engine trained it.

        predictor = cbn_det.load_run("output/run")
        predictions = predictor("photo.jpg")

    Args:
        run: the folder, with its ``config.yaml``.
        weights: a checkpoint; None for the run's last one.
        opts: KEY VALUE words that change the config, such as ``["MODEL.DEVICE", "cpu"]``.

    Returns:
        Called with an image, it gives :class:`~cbn_det.run.detector.Predictions`.

    Raises:
        ConfigError: a file is missing, or they do not fit each other; names it.
        ImportError: the engine of the run does not work here.
    """
    run = Path(run)
    config = run / CONFIG
    if not config.is_file():
        raise ConfigError(f"{run}: not the folder of a run, it has no {CONFIG}")
    if "_target_:" in config.read_text(encoding="utf-8"):
        raise ConfigError(
            f"{config}: a LazyConfig; build its model with detectron2's instantiate(cfg.model),"
            " load the checkpoint, and call cbn_det.deploy.to_batchnorm or fold on it"
        )
    path = _last_checkpoint(run) if weights is None else Path(weights)
    if not path.is_file():
        raise ConfigError(f"--weights {path}: no such file")
    if _is_of_detectron2(path):
        try:
            from .plugin.detector import Detectron2Detector as Kind
        except ImportError as error:
            raise ImportError(f"{path} is a detectron2 model: install detectron2") from error
    else:
        from .standalone.detector import StandaloneDetector as Kind
    return Kind.load(run, path, opts)


def _last_checkpoint(run: Path) -> Path:
    tag = run / "last_checkpoint"
    if not tag.is_file():
        raise ConfigError(f"{run}: no checkpoint in it; name one with --weights")
    return run / tag.read_text(encoding="utf-8").strip()


def _is_of_detectron2(path: Path) -> bool:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return not any(key.startswith("backbone.body.") for key in content["model"])
    except Exception as error:  # whatever the bytes of another kind of file make it do
        raise ConfigError(
            f"--weights {path}: not a checkpoint ({one_line(error)[:200]})"
        ) from error


def draw_predictions(image: np.ndarray, found: Predictions) -> Image.Image:
    """A picture of what was found, the best on top.

    Args:
        image: RGB values, uint8 [H, W, 3].
    """
    lettering = Lettering(sorted(set(found.names)))
    masks = [None] * len(found) if found.masks is None else found.masks
    marks = [
        Mark(box, f"{name} {score:.0%}", color_of(int(label)), mask)
        for box, name, score, label, mask in zip(
            found.boxes.tolist(), found.names, found.scores, found.labels, masks, strict=True
        )
    ]
    return draw(Image.fromarray(image), marks[::-1], lettering)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cbn-det predict", description="Draws what the trained model of a run finds on images."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a training run")
    add("images", type=Path, nargs="+", metavar="IMAGE")
    add("--output", type=Path, help="folder for the pictures (RUN/predictions)")
    add("--score", type=float, default=0.5, help="leave out predictions below it (%(default)s)")
    add("--weights", type=Path, metavar="PTH", help="another checkpoint than the run's last")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """``cbn-det predict``; returns the exit code: 0, or 2 where something cannot be read."""
    args = make_parser().parse_args(arguments)
    output = args.output or args.run / "predictions"
    try:
        with without_notices_of_torch():
            detector = load_run(args.run, args.weights)
            output.mkdir(parents=True, exist_ok=True)
            written: set[Path] = set()
            for path in args.images:
                image = read_rgb(path)
                found = detector(image).best(args.score)
                target = output / f"{path.stem}.png"
                if target in written:  # another folder's image of the same name
                    target = output / f"{path.stem}-{len(written) + 1}.png"
                draw_predictions(image, found).save(target)
                written.add(target)
                print(f"{target}: {len(found)} found")
    except (ValueError, ImportError, OSError) as error:  # ConfigError is one
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
