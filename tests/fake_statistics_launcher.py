"""Stands in for tools/train_net.py with --statistics-error: leaves the files of a run at once.

Every error is 0.1, times the images per GPU, times the place of the norm in the request. The first
line is there twice, as after a resume. With a reference, BN's error of the variance has a part of
60 % that all mini-batches share, and norms are 0.008 times the sampling error, times their place,
from the reference; in the second layer not at all. The environment's FAKE_FAILS names a number of
images per GPU whose run fails, FAKE_DIVERGES one whose run diverges after its second line."""

import argparse
import json
import os
import sys
from pathlib import Path

KEYS = ("mean", "var", "var_fixed", "running_mean", "running_var")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file")
    parser.add_argument("--engine")
    parser.add_argument("--num-gpus", type=int)
    parser.add_argument("--statistics-error")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    cfg = dict(zip(args.options[::2], args.options[1::2], strict=True))
    out, images = Path(cfg["OUTPUT_DIR"]), int(cfg["SOLVER.IMS_PER_BATCH"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "attempts", "a") as file:
        file.write("start\n")
    request = json.loads(args.statistics_error)
    diverges = os.environ.get("FAKE_DIVERGES") == str(images)
    points = [point(at, images, request) for at in request["at"][: 2 if diverges else None]]
    twice = json.loads(json.dumps(points[0]).replace("0.", "7."))
    text = "\n".join(map(json.dumps, [twice, *points])) + '\n{"iteration": 99, "la'
    (out / "statistics_error.jsonl").write_text(text)
    if os.environ.get("FAKE_FAILS") == str(images):
        sys.exit("RuntimeError: it broke")
    result = {
        "status": "finished",
        "message": None,
        "results": {},
        "iterations": int(cfg["SOLVER.MAX_ITER"]),
        "engine": args.engine,
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None},
        "versions": {"python": "3.11"},
        "test_sets": cfg["DATASETS.TEST"],
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if diverges:
        result |= {"status": "diverged", "message": "loss is nan", "iterations": 12}
    (out / "result.json").write_text(json.dumps(result))


def point(at: int, images: int, request: dict) -> dict:
    layers = {}
    for name in ("backbone.stem.norm", "roi_heads.box_head.conv1.norm"):
        norms = {
            norm: dict.fromkeys(KEYS, 0.1 * images * (place + 1))
            for place, norm in enumerate(request["norms"])
        }
        layers[name] = {"channels": 4, "values": 9, "norms": norms}
        if request.get("reference"):
            norms["BN"] |= {"var": 0.1 * images, "var_fixed": 0.06 * images}
            for place, norm in enumerate(request["norms"]):
                first = name.startswith("backbone")
                norms[norm]["apart_var"] = 0.008 * 0.08 * images * place * first
    if "KN" in request["norms"]:
        layers["backbone.stem.norm"]["norms"]["KN"]["mean"] = 0.05 * images
    used = {"images": request["images"], "images_per_batch": images}
    return {"iteration": at, **used, "layers": layers}


if __name__ == "__main__":
    main()
