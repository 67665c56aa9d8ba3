"""A config on more or fewer GPUs than it was written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import REPOSITORY, arguments, parsed, run_loggers_removed, tiny_inputs

pytestmark = pytest.mark.detectron2
inputs = tiny_inputs

COCO = REPOSITORY / "configs" / "coco"

# GPUs -> images a step, learning rate, iterations, steps, warm-up
TWO_IMAGES = {
    1: (2, 0.0025, 720_000, (480_000, 640_000), 8000),
    2: (4, 0.005, 360_000, (240_000, 320_000), 4000),
    8: (16, 0.02, 90_000, (60_000, 80_000), 1000),
    16: (32, 0.04, 45_000, (30_000, 40_000), 1000),
    64: (128, 0.16, 11_250, (7500, 10_000), 1000),
}
ONE_IMAGE = {
    1: (1, 0.00125, 1_440_000, (960_000, 1_280_000), 16_000),
    2: (2, 0.0025, 720_000, (480_000, 640_000), 8000),
    8: (8, 0.01, 180_000, (120_000, 160_000), 2000),
    16: (16, 0.02, 90_000, (60_000, 80_000), 1000),
    64: (64, 0.08, 22_500, (15_000, 20_000), 1000),
}
LAYOUTS = {1: [], 2: ["--num-gpus", "2"], 8: ["--num-gpus", "8"]}
MACHINES = ["--num-gpus", "8", "--dist-url", "tcp://10.0.0.1:29500", "--num-machines"]
LAYOUTS |= {8 * n: [*MACHINES, str(n), "--machine-rank", "1"] for n in (2, 8)}


def launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple:
    """The number of processes and the config that the launcher would start a job with."""
    from cbn_det.launch import main
    from cbn_det.plugin import launch

    seen = []

    def start(layout, device, job, args):
        seen.append((layout.world_size, args[0]))
        return 0, None

    monkeypatch.setattr(launch, "run_processes", start)
    assert main(["--engine", "detectron2", *words]) == 0
    return seen[0]


@pytest.mark.parametrize("gpus", LAYOUTS)
@pytest.mark.parametrize(
    ("row", "expected"), [("cbn_2img", TWO_IMAGES), ("cbn_1img", ONE_IMAGE)], ids=["2img", "1img"]
)
def test_gpus_and_machines_keep_images_per_gpu(
    row: str, expected: dict, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LAYOUTS[gpus], "--config-file", str(COCO / "mask_rcnn_R_50_FPN_1x" / f"{row}.yaml")]
    world_size, cfg = launched([*words, "MODEL.WEIGHTS", ""], monkeypatch)
    solver = cfg.SOLVER
    assert world_size == solver.REFERENCE_WORLD_SIZE == gpus
    images, rate, iterations, steps, warmup = expected[gpus]
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS) == (images, iterations, steps)
    assert solver.BASE_LR == pytest.approx(rate, rel=1e-12)
    assert solver.WARMUP_ITERS == warmup
    assert solver.CHECKPOINT_PERIOD == round(5000 * 16 / images)
    assert round(15_000 * 16 / images) == cfg.TEST.EVAL_PERIOD


@pytest.mark.parametrize("gpus", [1, 3, 7, 64])
def test_the_images_of_a_training_and_their_rate_stay(gpus: int) -> None:
    from detectron2.config import get_cfg

    from cbn_det.plugin.config import scale_schedule

    for row in sorted(COCO.glob("*/*img.yaml")):
        if row.parent.name == "base":
            continue
        cfg = get_cfg()
        cfg.merge_from_file(str(row))
        scaled = scale_schedule(cfg, gpus).SOLVER
        per_gpu = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.REFERENCE_WORLD_SIZE
        assert scaled.IMS_PER_BATCH == per_gpu * gpus
        was = cfg.SOLVER.IMS_PER_BATCH
        assert scaled.BASE_LR / scaled.IMS_PER_BATCH == pytest.approx(cfg.SOLVER.BASE_LR / was)
        pairs = [
            (cfg.SOLVER.MAX_ITER, scaled.MAX_ITER),
            *zip(cfg.SOLVER.STEPS, scaled.STEPS, strict=True),
        ]
        for before, after in pairs:  # to half an iteration
            assert abs(before * was - after * scaled.IMS_PER_BATCH) <= scaled.IMS_PER_BATCH / 2
        assert scale_schedule(scale_schedule(cfg, gpus), gpus).SOLVER == scaled


def test_accumulated_mini_batches_count_like_gpus(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.plugin.config import build_config, scale_schedule

    words = ("SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "16")
    words = ("--accumulate", "4", *words, "SOLVER.MAX_ITER", "900", "SOLVER.BASE_LR", "0.02")
    cfg, notes = build_config(parsed(inputs, tmp_path, *words), 2)
    # 2 processes x 4 mini-batches x 2 images are the 16 of the file
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (4, 900)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.02)
    assert scale_schedule(cfg, 2, 4) == cfg
    assert len(notes) == 1 and "IMS_PER_BATCH 4" in notes[0] and "MAX_ITER 900" in notes[0]


def test_without_a_reference_nothing_is_scaled(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.plugin.config import build_config

    for accumulate in ("1", "3"):
        words = ("--accumulate", accumulate, "SOLVER.IMS_PER_BATCH", "6", "SOLVER.MAX_ITER", "100")
        cfg, notes = build_config(parsed(inputs, tmp_path, *words), 2)
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (6, 100)
        assert cfg.SOLVER.BASE_LR == 0.01 and not notes


def test_a_run_is_of_the_scaled_config_and_writes_it_down(inputs: Path, tmp_path: Path) -> None:
    from cbn_det.launch import main
    from cbn_det.plugin.trainer import Trainer

    resolved = []

    class Watched(Trainer):
        def train(self):
            resolved.append(self.bare_model.backbone.fpn_lateral2.norm.burn_in_steps)
            return super().train()

    words = ("MODEL.FPN.NORM", "CBN(burn_in=0.5)", "SOLVER.REFERENCE_WORLD_SIZE", "2")
    words += ("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "DATASETS.TEST", "()")
    with pytest.MonkeyPatch.context() as patch, run_loggers_removed():
        patch.setattr("cbn_det.plugin.job.Trainer", Watched)
        assert main(arguments(inputs, tmp_path, *words)) == 0
    solver = yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]
    assert (solver["IMS_PER_BATCH"], solver["MAX_ITER"], solver["STEPS"]) == (1, 6, [4])
    assert solver["BASE_LR"] == 0.005
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["images_per_gpu"], result["iterations"]) == (1, 6)
    assert resolved == [3]  # half of six
    assert "MAX_ITER 6" in (tmp_path / "log.txt").read_text()
