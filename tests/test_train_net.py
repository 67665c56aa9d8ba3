"""The launcher from the command line to the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import (
    REPOSITORY,
    arguments,
    contents,
    dataset_name,
    evaluation_of,
    result_of,
    run_loggers_removed,
    write_inputs,
)

pytestmark = pytest.mark.detectron2

TRAIN_NET = str(REPOSITORY / "tools" / "train_net.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with CBN in the FPN."""
    output = tmp_path_factory.mktemp("trained")
    words = ("--precise-bn-iters", "2", "MODEL.FPN.NORM", "CBN(window=3, burn_in=2)")
    more = ("SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "4", "SOLVER.CHECKPOINT_PERIOD", "2")
    assert run_here(inputs, output, *words, *more) == 0
    return output


def run_here(inputs: Path, output: Path, *words: str) -> int:
    from cbn_det.launch import main

    with run_loggers_removed():
        return main(arguments(inputs, output, *words))


def start(command: list[str], *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env.pop("PYTHONPATH", None)  # the launcher must find the package of its own clone
    return subprocess.run(
        [sys.executable, *command, *args], env=env, capture_output=True, text=True, timeout=240
    )


def test_a_run_leaves_the_whole_folder(inputs: Path, trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "finished" and result["message"] is None
    assert set(result["results"]["bbox"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert result["results"]["bbox"]["APl"] is None  # no object is large: NaN in detectron2
    assert result["results"]["bbox"]["AP-orange"] is not None
    assert set(result["results_precise_bn"]["bbox"]) == set(result["results"]["bbox"])
    assert result["norm"] == {
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.NORM": "CBN(window=3, burn_in=2)",
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
    }
    assert (result["images_per_gpu"], result["world_size"], result["total_batch"]) == (2, 1, 2)
    assert (result["seed"], result["iterations"], result["device"]) == (1, 6, "cpu")
    for key in ("sec_per_iter", "train_seconds", "peak_memory_mb", "parameters", "flops"):
        assert result[key] > 0, key
    name = dataset_name(inputs)
    assert result["dataset"] == {"train": [name], "test": [name]}
    for name in ("config.yaml", "log.txt", "model_final.pth", "coco_instances_results.json"):
        assert (trained / name).stat().st_size > 0
    assert len(list((trained / "pictures").iterdir())) == 4
    assert list(trained.glob("events.out.tfevents*"))
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(trained.glob(".*"))  # no half-written file


def test_metrics_hold_losses_evaluations_and_the_norms_state(inputs: Path, tmp_path: Path) -> None:
    norm = ("MODEL.FPN.NORM", "CBN(window=2, burn_in=1)")
    code = run_here(inputs, tmp_path, *norm, "SOLVER.MAX_ITER", "20", "DATASETS.TEST", "()")
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 19
    assert {"total_loss", "loss_cls", "lr", "norm/clamped"} <= set(lines[-1])
    assert result_of(tmp_path)["results"] == {}


def test_eval_only_repeats_the_ap_and_keeps_what_training_left(inputs: Path, trained: Path) -> None:
    before, files = result_of(trained), contents(trained)
    words = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=2)", "SOLVER.BASE_LR", "7.0")
    earlier = ("MODEL.WEIGHTS", str(trained / "model_0000001.pth"))
    assert run_here(inputs, trained, "--eval-only", *words, *earlier) == 0
    assert evaluation_of(trained)["weights"] == str(trained / "model_0000001.pth")
    words += ("MODEL.WEIGHTS", str(trained / "model_final.pth"))
    assert run_here(inputs, trained, "--eval-only", *words) == 0
    assert contents(trained) == files
    left = {path.name for path in (trained / "evaluation").iterdir()}
    kinds = {"result.json", "config.yaml", "coco_instances_results.json", "pictures"}
    assert kinds <= left
    assert "BASE_LR: 7.0" in (trained / "evaluation" / "config.yaml").read_text()
    after = evaluation_of(trained)
    assert after["weights"] == str(trained / "model_final.pth")
    assert after["results"] == before["results"]
    assert after["results_precise_bn"] is None
    for key in ("iterations", "sec_per_iter", "train_seconds", "peak_memory_mb"):
        assert after[key] == before[key]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize(
    "mistake",
    [("DATASETS.TRAIN", "('no_such_set',)"), ("MODEL.WEIGHTS", "absent.pth"), ("SEED", "one")],
)
def test_a_start_that_is_refused_costs_nothing(
    inputs: Path, trained: Path, tmp_path: Path, resume: list[str], mistake: tuple[str, str]
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained, output, ignore=shutil.ignore_patterns("evaluation"))
    if resume and "WEIGHTS" in mistake[0]:
        (output / "last_checkpoint").unlink()
    before = contents(output)
    norm = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=2)")
    assert run_here(inputs, output, *resume, *norm, *mistake) == 2
    assert contents(output) == before


def test_missed_expectations_fail_the_run(inputs: Path, trained: Path, tmp_path: Path) -> None:
    expected = ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]")
    weights = ("MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.FPN.NORM", "CBN")
    assert run_here(inputs, tmp_path, "--eval-only", *weights, *expected) == 1
    result = evaluation_of(tmp_path)
    assert (result["status"], result["message"]) == (
        "failed",
        "the results miss TEST.EXPECTED_RESULTS",
    )


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_saves_and_resume_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In the last iteration, too: evaluating may take long."""
    from cbn_det.plugin.trainer import Trainer

    steps = []
    run_step = Trainer.run_step

    def interrupted(self: Trainer) -> None:
        steps.append(self.iter)
        if len(steps) == at + 1:
            os.kill(os.getpid(), signal.SIGINT)
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    norm = ("MODEL.FPN.NORM", "CBN(window=2, burn_in=1)")
    assert run_here(inputs, tmp_path, *norm) == 130
    result = result_of(tmp_path)
    message = f"interrupted at iteration {at}"
    assert (result["status"], result["message"]) == ("failed", message)
    assert result["iterations"] == at + 1 == len(steps) and not result["results"]
    assert run_here(inputs, tmp_path, "--resume", *norm) == 0
    assert steps == [0, 1, 2, 3]
    result = result_of(tmp_path)
    assert (result["status"], result["iterations"]) == ("finished", 4)

    # and once more, when nothing is left to do but to evaluate
    assert run_here(inputs, tmp_path, "--resume", *norm) == 0
    assert steps == [0, 1, 2, 3]
    again = result_of(tmp_path)
    assert again["results"] == result["results"]
    assert again["sec_per_iter"] == result["sec_per_iter"]


def test_resume_in_an_empty_folder_starts(inputs: Path, tmp_path: Path) -> None:
    more = ("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    assert run_here(inputs, tmp_path, "--resume", *more) == 0
    assert result_of(tmp_path)["iterations"] == 1


def test_a_new_run_does_not_inherit_an_old_ones_files(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text('{"status": "finished"}')
    (tmp_path / "metrics.json").write_text('{"iteration": 99}\n')
    for name in ("result.json", "coco_instances_results.json", "worst_images.png"):
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / name).write_text("[]")
    (tmp_path / "last_checkpoint").write_text("model_0000098.pth")
    more = ("SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e999", "DATASETS.TEST", "()")
    assert run_here(inputs, tmp_path, *more) == 3
    assert result_of(tmp_path)["status"] == "diverged"
    assert '"iteration": 99' not in (tmp_path / "metrics.json").read_text()
    assert not list((tmp_path / "evaluation").iterdir())
    assert not (tmp_path / "last_checkpoint").exists()  # NaN weights are not worth a checkpoint


def test_a_crash_is_recorded_and_shown(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from cbn_det.plugin.trainer import Trainer

    def crash(self: Trainer) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(Trainer, "run_step", crash)
    assert run_here(inputs, tmp_path) == 1
    result = result_of(tmp_path)
    assert (result["status"], result["message"]) == ("failed", "RuntimeError: the disk is full")
    assert result["parameters"] > 0
    assert "Traceback" in capfd.readouterr().err
    assert "the disk is full" in (tmp_path / "log.txt").read_text()


def test_two_torchrun_processes_replace_sync_bn_and_say_so(inputs: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TRAIN_NET]
    words = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "CBN(burn_in=1)")
    more = ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2")
    done = start(torchrun, *arguments(inputs, tmp_path, *words, *more))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "replaced by naiveSyncBN_N" in line]
    assert len(said) == 1 and "MODEL.RESNETS.NORM: SyncBN" in said[0]
    result = result_of(tmp_path)
    assert result["status"] == "finished"
    assert result["norm"]["MODEL.RESNETS.NORM"] == "naiveSyncBN_N"
    assert result["norm"]["MODEL.FPN.NORM"] == "CBN(burn_in=1)"
    assert (result["world_size"], result["images_per_gpu"]) == (2, 1)
    assert result["results"]["bbox"]["AP"] is not None
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len({p["image_id"] for p in predictions}) == 6  # those of both processes


def test_divergence_ends_both_processes_and_names_the_layer(inputs: Path, tmp_path: Path) -> None:
    words = ("--num-gpus", "2", "SOLVER.BASE_LR", "1e8", "MODEL.FPN.NORM", "CBN")
    done = start([TRAIN_NET], *arguments(inputs, tmp_path, *words))
    assert done.returncode == 3, done.stderr
    result = result_of(tmp_path)
    assert (result["status"], result["world_size"]) == ("diverged", 2)
    assert "backbone." in result["message"] and "not finite" in result["message"]
    assert result["message"] in done.stderr and "Traceback" not in done.stderr
    assert result["iterations"] < 4


def test_help_teaches() -> None:
    from cbn_det.run.arguments import argument_parser

    text = argument_parser().format_help()
    for word in ("--coco-dataset", "--precise-bn-iters", "--accumulate", "torchrun", "exit codes"):
        assert word in text
