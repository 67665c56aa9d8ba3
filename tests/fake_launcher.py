"""Stands in for tools/train_net.py: leaves the files of a run at once. The norm's name decides how
it ends; the file "attempts" counts starts."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

AP = {"GN": 40.0, "BN": 20.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file")
    parser.add_argument("--engine", choices=["detectron2", "standalone"], required=True)
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--coco-dataset", nargs=3, action="append")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url")
    parser.add_argument("--precise-bn-iters", type=int, default=0)
    parser.add_argument("--image-share")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    cfg = dict(zip(args.options[::2], args.options[1::2], strict=True))
    out = Path(cfg["OUTPUT_DIR"])
    out.mkdir(parents=True, exist_ok=True)
    norm, seed = cfg.get("MODEL.FPN.NORM", "pretrain"), int(cfg.get("SEED", 0))
    world = int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))
    images = int(cfg.get("SOLVER.IMS_PER_BATCH", 8)) // world
    if int(os.environ.get("RANK", args.machine_rank)) > 0:
        return  # the first speaks for all
    with open(out / "attempts", "a") as file:
        file.write("resume\n" if args.resume else "start\n")
    (out / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 40\n")
    with open(out / "metrics.json", "a") as file:
        for i in (19, 39):
            line = {"iteration": i, "total_loss": 2.0 - i / 40, "time": 0.1}
            if "TEST.EVAL_PERIOD" in cfg:
                line["bbox/AP"] = i / 2
            file.write(json.dumps(line) + "\n")
    if norm == "CRASH":
        sys.exit("Traceback ...\nRuntimeError: it broke")
    if norm == "FULL":
        sys.exit("Traceback ...\nOSError: [Errno 28] No space left on device")
    if norm == "KILLED":
        os.kill(os.getpid(), 9)
    if norm == "HANG":
        hang(out, args.resume)
    if norm == "SLOW":
        wait_to_be_told(out)
    if norm == "OTHER":  # than asked for
        images *= 2
    if norm == "DIVERGE":
        result = {"status": "diverged", "message": "loss is nan at fpn_output2"}
        (out / "result.json").write_text(json.dumps(result))
        sys.exit(3)
    if norm == "pretrain":
        write_checkpoint(out / "model_final.pth", args.engine)
    (out / "pictures").mkdir(exist_ok=True)
    picture = Image.fromarray(np.full((40, 80, 3), 127, np.uint8))
    picture.save(out / "pictures" / "000001.png")
    ap = AP.get(norm, 30.0) + seed
    result = {
        "status": "finished",
        "message": None,
        "results": {"bbox": {"AP": ap, "AP50": ap + 10}},
        "results_precise_bn": None if norm == "GN" else {"bbox": {"AP": ap + 1}},
        "results_image_share": (
            {"bbox": {"AP": ap + 3}} if args.image_share and norm != "GN" else None
        ),
        "dataset": {"train": ["shapes_train"], "test": ["shapes_val"]},
        "iterations": 40,
        "sec_per_iter": 0.1,
        "peak_memory_mb": 500.0,
        "weights": cfg.get("MODEL.WEIGHTS"),
        "engine": args.engine,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "world_size": world,
        "images_per_gpu": images,
        "machines": [args.num_machines, args.machine_rank, args.dist_url],
    }
    (out / "result.json").write_text(json.dumps(result))


def wait_to_be_told(out: Path) -> None:
    """Train until there is a file "go"; leave a checkpoint and stop when asked to."""

    def stop(number: int, frame: object) -> None:
        (out / "last_checkpoint").write_text("model_0000019.pth")
        (out / "result.json").write_text('{"status": "failed", "message": "interrupted"}')
        sys.exit(130)

    signal.signal(signal.SIGTERM, stop)
    (out / "pid").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not (out / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def hang(out: Path, resumed: bool) -> None:
    child = os.fork()
    if child == 0:  # a rank that hangs
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    (out / "pids").write_text(f"{os.getpid()} {child}")
    (out / "last_checkpoint").write_text("model_0000019.pth")
    if not resumed:
        time.sleep(60)


def write_checkpoint(path: Path, engine: str) -> None:
    import torch

    below = {"detectron2": "bottom_up", "standalone": "body"}[engine]
    weights = {f"backbone.{below}.stem.w": torch.ones(1), "roi_heads.w": torch.ones(1)}
    torch.save({"model": weights}, path)


if __name__ == "__main__":
    main()
