"""The standalone engine from the command line to the run folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_run import differences, lines_of, predictions_of, same, state_of, tensors_of
from tiny_run import (
    REPOSITORY,
    arguments,
    contents,
    dataset_name,
    evaluation_of,
    result_of,
    run_loggers_removed,
    tiny_inputs,
)
from torchvision.models.detection.roi_heads import RoIHeads

from cbn_det.launch import main
from cbn_det.norms import memory_state_dict
from cbn_det.run import job
from cbn_det.run.arguments import argument_parser
from cbn_det.run.errors import ConfigError
from cbn_det.standalone import trainer as trainer_module
from cbn_det.standalone.config import read_config
from cbn_det.standalone.datasets import DetectionDataset, prepare_datasets
from cbn_det.standalone.job import StandaloneJob
from cbn_det.standalone.launch import build_config
from cbn_det.standalone.model import build_model
from cbn_det.standalone.trainer import Trainer

inputs = tiny_inputs

CBN = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=1)")
MBN_AND_BRN = (
    *("MODEL.FPN.NORM", "MBN(window=3, burn_in=1)"),  # with Double Forward
    *("MODEL.ROI_BOX_HEAD.NORM", "BRN(burn_in=1, ramp=2)"),
)
KN_AND_GKN = ("MODEL.FPN.NORM", "KN", "MODEL.ROI_BOX_HEAD.NORM", "GKN(groups=4)")
KN_AND_BGN = (
    *("MODEL.FPN.NORM", "KN(gain=0.5)"),
    *("MODEL.RESNETS.NORM", "BGN(groups=2)"),
)
NO_TEST = ("DATASETS.TEST", "()")
MASKS = (
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "4"),
)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nobody catches it."""


def words_for(inputs: Path, output: Path, *words: str) -> list[str]:
    return ["--engine", "standalone", *arguments(inputs, output, *words, config="standalone.yaml")]


def run_here(inputs: Path, output: Path, *words: str) -> int:
    with run_loggers_removed():
        return main(words_for(inputs, output, *words))


def make_trainer(inputs: Path, output: Path, *words: str) -> Trainer:
    """A trainer as a run makes it; its evaluation finds nothing."""
    args = argument_parser().parse_args(words_for(inputs, output, *words))
    cfg, _ = build_config(args)
    reports = prepare_datasets(cfg, args.coco_dataset)
    output.mkdir(exist_ok=True)
    torch.manual_seed(cfg.SEED)
    report = reports[cfg.DATASETS.TRAIN[0]]
    dataset = DetectionDataset(report.annotations, report.images, cfg, training=True)
    return Trainer(cfg, build_model(cfg), dataset, dict)


def at_iteration(monkeypatch: pytest.MonkeyPatch, iteration: int, happen: Callable) -> None:
    """Lets ``happen(trainer)`` happen before a training step, once."""
    step, left = Trainer._step, [iteration]

    def patched(trainer: Trainer, batch: Any) -> None:
        if trainer.iter in left:
            left.remove(trainer.iter)
            happen(trainer)
        step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", patched)


def leave_out_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and FLOPs take longer than a few iterations."""
    for name in ("write_all_pictures", "count_flops"):
        monkeypatch.setattr(job, name, lambda *args: None)


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with CBN in the FPN."""
    output = tmp_path_factory.mktemp("trained")
    more = ("SOLVER.MAX_ITER", "5", "TEST.EVAL_PERIOD", "3", "SOLVER.CHECKPOINT_PERIOD", "2")
    assert run_here(inputs, output, "--precise-bn-iters", "2", *CBN, *more) == 0
    return output


def test_a_run_leaves_the_whole_folder(inputs: Path, trained: Path) -> None:
    result = result_of(trained)
    assert (result["status"], result["message"], result["engine"]) == (
        "finished",
        None,
        "standalone",
    )
    assert set(result["results"]["bbox"]) == {
        *("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-orange", "AP-blue")
    }
    assert result["results"]["bbox"]["AP"] >= 0
    assert result["results"]["bbox"]["APl"] is None  # no object is large
    assert set(result["results_precise_bn"]["bbox"]) == set(result["results"]["bbox"])
    assert result["norm"] == {
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.NORM": "CBN(window=3, burn_in=1)",
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
    }
    assert (result["images_per_gpu"], result["world_size"], result["total_batch"]) == (2, 1, 2)
    assert (result["seed"], result["iterations"], result["device"]) == (1, 5, "cpu")
    for key in ("sec_per_iter", "train_seconds", "peak_memory_mb", "parameters", "flops"):
        assert result[key] > 0, key
    name = dataset_name(inputs)
    assert result["dataset"] == {"train": [name], "test": [name]}
    assert "cbn-det train --engine standalone" in result["command"]
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    models = {path.name for path in trained.glob("*.pth")}
    assert models == {"model_0000001.pth", "model_0000003.pth", "model_final.pth"}
    assert len(list((trained / "pictures").iterdir())) == 4
    predictions = json.loads((trained / "coco_instances_results.json").read_text())
    assert {p["image_id"] for p in predictions} <= set(range(1, 7)) and predictions
    assert next(trained.glob("events.out.tfevents*")).stat().st_size > 0
    assert "engine: standalone" in (trained / "log.txt").read_text()
    assert not list(trained.glob(".*"))  # no half-written file


def test_the_configs_copy_describes_the_same_run(inputs: Path, trained: Path) -> None:
    cfg = read_config(trained / "config.yaml")
    words = words_for(inputs, trained, *CBN, "SOLVER.MAX_ITER", "5")
    again, _ = build_config(argument_parser().parse_args(words))
    again.defrost()
    again.merge_from_list(["TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 2])
    assert cfg == again


def test_metrics_hold_losses_evaluations_and_the_norms_state(trained: Path) -> None:
    first, last = lines_of(trained)
    assert (first["iteration"], last["iteration"]) == (2, 4)
    for line in (first, last):
        losses = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert {"total_loss", "lr", "bbox/AP", "norm/clamped", *losses} <= set(line)
        assert line["lr"] == 0.01
    assert last["bbox/AP"] == result_of(trained)["results"]["bbox"]["AP"]


def test_every_line_of_metrics_is_printed(trained: Path) -> None:
    """The last one too: a run shorter than the period has no other."""
    printed = re.findall(r"iter: (\d+)  .*total_loss: ([\d.]+)", (trained / "log.txt").read_text())
    lines = lines_of(trained)
    assert [int(i) for i, _ in printed] == [line["iteration"] for line in lines] == [2, 4]
    for (_, loss), line in zip(printed, lines, strict=True):
        assert float(loss) == pytest.approx(line["total_loss"], abs=1e-3)


@pytest.mark.detectron2
def test_losses_are_named_as_detectron2_names_them(inputs: Path, tmp_path: Path) -> None:
    """So that curves of both engines overlay."""
    names = []
    for engine, config in (("detectron2", "tiny.yaml"), ("standalone", "standalone.yaml")):
        out = tmp_path / engine
        words = ("--engine", engine, "SOLVER.MAX_ITER", "1", *NO_TEST, *MASKS)
        with run_loggers_removed():
            assert main(arguments(inputs, out, *words, config=config)) == 0
        (line,) = lines_of(out)
        names.append({name for name in line if "loss" in name})
    assert names[0] == names[1] and len(names[0]) == 6


def test_tensorboard_has_what_metrics_json_has(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained)).Reload()
    for line in lines_of(trained):
        for key, value in line.items():
            logged = {event.step: event.value for event in events.Scalars(key)}
            assert same(logged[line["iteration"]], pytest.approx(value, nan_ok=True)), key


@pytest.mark.detectron2
def test_both_engines_leave_the_same_keys(inputs: Path, trained: Path, tmp_path: Path) -> None:
    more = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1", *CBN)
    words = arguments(inputs, tmp_path, "--precise-bn-iters", "1", *more, config="standalone.yaml")
    with run_loggers_removed():
        assert main(["--engine", "detectron2", *words]) == 0
    ours, theirs = result_of(trained), result_of(tmp_path)
    assert set(ours) == set(theirs)
    for key in ("results", "results_precise_bn", "norm", "dataset", "machine"):
        assert set(ours[key]) == set(theirs[key]), key
    assert set(ours["results"]["bbox"]) == set(theirs["results"]["bbox"])
    assert ours["norm"] == theirs["norm"]
    assert set(theirs["versions"]) == {*ours["versions"], "detectron2"}
    evaluated = lines_of(tmp_path)[-1]
    shared = {key for key in evaluated if key.startswith("bbox/")} | {"total_loss", "lr"}
    assert shared <= set(lines_of(trained)[-1])
    names = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
    assert names - {path.name for path in trained.iterdir()} <= {"instances_predictions.pth"}


def test_eval_only_repeats_the_ap_and_keeps_what_training_measured(
    inputs: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained, output)
    before, files = result_of(output), contents(output)
    weights = ("MODEL.WEIGHTS", str(output / "model_final.pth"))
    code = run_here(inputs, output, "--eval-only", "--precise-bn-iters", "2", *CBN, *weights)
    assert code == 0
    after = evaluation_of(output)
    assert result_of(output) == before
    assert after["results"] == before["results"]
    assert after["results_precise_bn"] == before["results_precise_bn"]
    for key in ("iterations", "sec_per_iter", "train_seconds", "peak_memory_mb", "flops"):
        assert after[key] == before[key], key
    assert after["weights"] == weights[1]
    assert contents(output) == files
    assert len(predictions_of(trained)) == 2
    assert predictions_of(output / "evaluation") == predictions_of(trained)
    # without weights, of the last checkpoint
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000003.pth")
    assert run_here(inputs, output, "--eval-only", "--resume", *CBN) == 0
    assert evaluation_of(output)["weights"] == str(output / "model_0000003.pth")


@pytest.mark.parametrize(
    "words",
    [
        ("DATASETS.TRAIN", "('no_such_set',)"),
        ("MODEL.WEIGHTS", "wrong.pth"),
        ("--resume", "DATASETS.TRAIN", "('no_such_set',)"),
        ("--resume", "MODEL.ROI_BOX_HEAD.FC_DIM", "24"),
    ],
)
def test_a_start_that_is_refused_costs_nothing(
    inputs: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.pth").write_text("not a checkpoint")
    shutil.copytree(trained, "copy")
    before = contents(tmp_path / "copy")
    assert run_here(inputs, tmp_path / "copy", *words, *CBN) == 2
    assert contents(tmp_path / "copy") == before


def test_a_run_without_a_test_set(inputs: Path, tmp_path: Path) -> None:
    one = ("SOLVER.MAX_ITER", "1")
    assert run_here(inputs, tmp_path, "--precise-bn-iters", "2", *one, *NO_TEST) == 0
    result = result_of(tmp_path)
    assert (result["results"], result["results_precise_bn"], result["flops"]) == ({}, None, None)
    assert lines_of(tmp_path)[-1]["total_loss"] > 0
    assert not (tmp_path / "pictures").exists()


def test_several_test_sets_and_masks(inputs: Path, tmp_path: Path) -> None:
    first = dataset_name(inputs)
    second = ("--coco-dataset", "second", str(inputs / "boxes.json"), str(inputs / "images"))
    sets = ("DATASETS.TEST", f"('{first}', 'second')")
    more = ("SOLVER.MAX_ITER", "1", "MODEL.ROI_MASK_HEAD.NORM", "GN")
    assert run_here(inputs, tmp_path, *second, *sets, *MASKS, *more) == 0
    result = result_of(tmp_path)
    by_set = result["results_by_dataset"]
    assert set(by_set) == {first, "second"}
    assert by_set[first] == by_set["second"] == result["results"]
    assert set(result["results"]) == {"bbox", "segm"}
    assert result["norm"]["MODEL.ROI_MASK_HEAD.NORM"] == "GN"
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert predictions and all(p["segmentation"]["size"] == [96, 96] for p in predictions)
    assert (tmp_path / "second" / "coco_instances_results.json").exists()
    assert {f"{first}/bbox/AP", "second/segm/AP50"} <= set(lines_of(tmp_path)[-1])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("SOLVER.IMS_PER_BATCH", "3", "--num-gpus", "2"), "--num-gpus must stand before"),
        (("--num-gpus", "2"), "--engine detectron2"),
        (("--num-machines", "2"), "--engine detectron2"),
        (("SOLVER.MAX_ITERS", "3"), "Non-existent key: SOLVER.MAX_ITERS"),
        (("SOLVER.AMP.ENABLED", "True"), "SOLVER.AMP.ENABLED is True"),
        (("SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER"),
        (("SOLVER.MAX_ITER",), "KEY VALUE"),
        (("MODEL.WEIGHTS", "absent.pth"), "MODEL.WEIGHTS absent.pth: no such file"),
        (("MODEL.FPN.NORM", "CNB"), "MODEL.FPN.NORM"),
        (("MODEL.FPN.NORM", "CBN(windows=3)"), "MODEL.FPN.NORM"),
        (("MODEL.FPN.NORM", "CBN(window=0)"), "MODEL.FPN.NORM"),
        (("--eval-only",), "MODEL.WEIGHTS"),
        (("--eval-only", "--resume"), "--eval-only --resume: no checkpoint in"),
        (("--eval-only", "--resume", *NO_TEST), "DATASETS.TEST is empty"),
        (("--precise-bn-iters", "-1"), "--precise-bn-iters"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", "3"), "MODEL.ROI_HEADS.NUM_CLASSES 2"),
        (("DATASETS.TRAIN", "('no_such_set',)"), "--coco-dataset no_such_set"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty"),
        (("MODEL.BACKBONE.NAME", "no_such_backbone"), "no_such_backbone"),
    ],
)
def test_refusals_name_the_key_and_show_no_traceback(
    inputs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    expected: str,
) -> None:
    assert run_here(inputs, tmp_path, *words) == 2
    assert_refused(capfd, expected)


def assert_refused(capfd: pytest.CaptureFixture[str], expected: str) -> None:
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert "Traceback" not in said.out


def test_under_torchrun_it_refuses(
    inputs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_here(inputs, tmp_path) == 2
    assert_refused(capfd, "torchrun started 2 processes")


def test_files_that_cannot_be_used(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A missing config, broken annotations, a missing image."""
    assert main(["--engine", "standalone", "--config-file", str(tmp_path / "absent.yaml")]) == 2
    assert_refused(capfd, "absent.yaml: no such file")

    broken = tmp_path / "inputs"
    shutil.copytree(inputs, broken)
    names = {str(inputs / name): str(broken / name) for name in ("boxes.json", "images")}
    words = [names.get(w, w) for w in words_for(inputs, tmp_path / "out")]
    image = broken / "images" / "4.png"
    for change, expected in (
        (image.unlink, "4.png"),
        (lambda: (broken / "boxes.json").write_text('{"images": [}'), "boxes.json"),
    ):
        change()
        with run_loggers_removed():
            assert main(words) == 2
        assert_refused(capfd, expected)
        result = result_of(tmp_path / "out")
        assert result["status"] == "failed" and expected in result["message"]
        assert result["iterations"] is None


def test_weights_of_something_else(
    inputs: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.FPN.NORM")
    assert run_here(inputs, tmp_path, *words, "") == 2
    assert_refused(capfd, "model_final.pth")
    no_file = tmp_path / "text.pth"
    no_file.write_text("not a checkpoint")
    assert run_here(inputs, tmp_path, "MODEL.WEIGHTS", str(no_file)) == 2
    assert_refused(capfd, "text.pth")
    backbone = tmp_path / "backbone.pth"
    state = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    body = {key: value for key, value in state.items() if key.startswith("backbone.body.")}
    torch.save({"model": body}, backbone)
    part = ("MODEL.WEIGHTS", str(backbone))
    assert run_here(inputs, tmp_path / "part", "--eval-only", *part) == 2  # nothing to evaluate
    assert_refused(capfd, "backbone.pth")
    assert run_here(inputs, tmp_path / "part", *part, *NO_TEST, "SOLVER.MAX_ITER", "1") == 0
    assert "backbone.pth" in (tmp_path / "part" / "log.txt").read_text()


def test_what_this_machine_lacks_is_replaced_and_said(inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, tmp_path, "MODEL.DEVICE", "cuda", "SEED", "-1")
    cfg, notes = build_config(argument_parser().parse_args(words))
    assert cfg.SEED >= 0 and f"SEED: chosen at random, {cfg.SEED}" in notes
    if not torch.cuda.is_available():
        assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE" in notes[0]


def test_a_crash_is_recorded_and_shown(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def crash(trainer: Trainer) -> None:
        raise RuntimeError("the disk is full")

    at_iteration(monkeypatch, 1, crash)
    assert run_here(inputs, tmp_path) == 1
    result = result_of(tmp_path)
    assert (result["status"], result["message"]) == ("failed", "RuntimeError: the disk is full")
    assert result["parameters"] > 0 and result["iterations"] == 1
    assert "Traceback" in capfd.readouterr().err
    assert "the disk is full" in (tmp_path / "log.txt").read_text()


# ------------------------------------------------------------------ resume


# every iteration has a learning rate of its own
LENGTH = (
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "3"),
    *("SOLVER.WARMUP_ITERS", "4", "SOLVER.STEPS", "(5,)"),
)


def break_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint's writing is cut off."""
    save, calls = torch.save, []

    def broken(content: Any, file: Any) -> None:
        calls.append(content)
        if len(calls) < 2:
            return save(content, file)
        file.write(b"half of it")
        raise Killed

    monkeypatch.setattr(torch, "save", broken)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a step": lambda patch: at_iteration(patch, 4, kill),
    "in the evaluation after a save": lambda patch: patch.setattr(StandaloneJob, "evaluate", kill),
    "while saving": break_save,
    "before the save is known": lambda patch: at_iteration(
        patch, 3, lambda trainer: patch.setattr(trainer.checkpointer, "tag_last_checkpoint", kill)
    ),
}


@pytest.fixture(scope="module")
def unbroken(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Path]:
    """Runs of six iterations in one go, by their norm."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(norm: tuple[str, ...]) -> Path:
        if norm not in folders:
            folders[norm] = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trainer_module, "_WRITE_PERIOD", 2)
                leave_out_the_end(patch)
                assert run_here(inputs, folders[norm], *norm, *LENGTH) == 0
        return folders[norm]

    return run


@pytest.mark.parametrize(
    ("norm", "when", "workers"),
    [
        *((CBN, when, "0") for when in KILLS),
        (CBN, "in a step", "2"),
        (("MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN"), "in a step", "0"),
        (MBN_AND_BRN, "in a step", "0"),
        (KN_AND_GKN, "in the evaluation after a save", "0"),
        (KN_AND_BGN, "in a step", "0"),
    ],
)
def test_a_killed_run_resumes_exactly(
    inputs: Path,
    unbroken: Callable[[tuple[str, ...]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    norm: tuple[str, ...],
    when: str,
    workers: str,
) -> None:
    whole = unbroken(norm)
    monkeypatch.setattr(trainer_module, "_WRITE_PERIOD", 2)
    leave_out_the_end(monkeypatch)
    words = (*norm, *LENGTH, "DATALOADER.NUM_WORKERS", workers)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        KILLS[when](patch)
        run_here(inputs, tmp_path, *words)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "result.json").exists()
    assert run_here(inputs, tmp_path, "--resume", *words) == 0
    assert "resumed" in (tmp_path / "log.txt").read_text()
    assert differences(tmp_path, whole) == []
    assert [line["iteration"] for line in lines_of(whole)] == [1, 2, 3, 5]
    state = state_of(whole)
    assert tensors_of(state["optimizer"])
    assert tensors_of(state["training"]["norm_memory"]) or norm not in (CBN, MBN_AND_BRN)


def test_a_complete_run_resumes_to_its_evaluation(
    inputs: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained, output)
    monkeypatch.setattr(Trainer, "_step", kill)
    assert run_here(inputs, output, "--resume", *CBN, "SOLVER.MAX_ITER", "5") == 0
    before, after = result_of(trained), result_of(output)
    for key in ("results", "iterations", "sec_per_iter"):
        assert after[key] == before[key], key
    assert same(lines_of(output), lines_of(trained))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("BN", CBN[1], "the model has other norms: windows of all norms"),
        (CBN[1], "CBN(window=4)", "window=3, this layer has window=4: windows of all norms"),
        (CBN[1], CBN[1], "SEED was 1, now it is 2"),
    ],
)
def test_a_checkpoint_of_something_else_says_what_starts_anew(
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: str,
    after: str,
    why: str,
) -> None:
    more = ("SOLVER.MAX_ITER", "3", *NO_TEST)
    first = make_trainer(inputs, tmp_path, "MODEL.FPN.NORM", before, *more)
    first.train()
    seed = ("SEED", "2" if before == after else "1")
    again = make_trainer(inputs, tmp_path, "MODEL.FPN.NORM", after, *more, *seed)
    fresh = memory_state_dict(again.bare_model)
    for layer in fresh.values():
        layer["steps"] = 3
    again.resume()
    assert again.start_iter == 3
    (said,) = [r.getMessage() for r in caplog.records if "cannot be resumed exactly" in r.msg]
    assert why in said and ("start anew" in said) == (before != after)
    memory = memory_state_dict(again.bare_model)
    assert same(memory, memory_state_dict(first.bare_model) if before == after else fresh)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert same(dict(again.bare_model.state_dict()), dict(state))


def checkpoint_contents(good: bytes) -> dict[str, bytes]:
    def saved(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    return {
        "empty": b"",
        "text": b"no checkpoint at all",
        "cut off": good[: len(good) // 2],
        "a list": saved([1, 2]),
        "weights alone": saved({"model": {}}),
        "another pickle": pickle.dumps({"model": Path("x")}),
    }


def test_a_checkpoint_that_is_none(
    inputs: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(inputs, tmp_path, *CBN)
    contents = checkpoint_contents((trained / "model_final.pth").read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ConfigError, match="model_0000001.pth is no checkpoint of this run"):
        trainer.resume()  # it is gone
    for kind, content in contents.items():
        (tmp_path / "model_0000001.pth").write_bytes(content)
        with pytest.raises(ConfigError, match="is no checkpoint of this run") as caught:
            trainer.resume()
        assert len(str(caught.value)) < 700, kind
        assert trainer.start_iter == 0
    # and from the command line
    assert run_here(inputs, tmp_path, "--resume", *CBN) == 2
    assert_refused(capfd, "start without --resume")


def test_a_checkpoint_of_another_architecture(
    inputs: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(trained / name, tmp_path)
    for other in (("MODEL.ROI_BOX_HEAD.FC_DIM", "24"), ("MODEL.FPN.NORM", "")):
        assert run_here(inputs, tmp_path, "--resume", *other) == 2
        assert_refused(capfd, "model_final.pth is of another model")


def test_an_output_folder_that_cannot_be(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_here(inputs, tmp_path / "file" / "out") == 2
    assert_refused(capfd, "OUTPUT_DIR")


def test_resume_in_an_empty_folder_starts(inputs: Path, tmp_path: Path) -> None:
    assert run_here(inputs, tmp_path, "--resume", "SOLVER.MAX_ITER", "1", *NO_TEST) == 0
    assert result_of(tmp_path)["iterations"] == 1
    assert "training starts anew" in (tmp_path / "log.txt").read_text()


def test_going_on_from_the_end_writes_the_last_line_as_it_was(inputs: Path, tmp_path: Path) -> None:
    words = (*CBN, "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "3")
    assert run_here(inputs, tmp_path, *words) == 0
    before = lines_of(tmp_path)
    assert [line["iteration"] for line in before] == [2, 3] and "norm/clamped" in before[-1]
    assert run_here(inputs, tmp_path, "--resume", *words) == 0
    assert same(lines_of(tmp_path), before)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (2, 3)])
def test_a_signal_saves_the_iteration_at_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    """In the last one, too: evaluating may take long."""
    steps = []
    step = Trainer._step

    def watched(trainer: Trainer, batch: Any) -> None:
        steps.append(trainer.iter)
        if len(steps) == at + 1:
            os.kill(os.getpid(), number)
        step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", watched)
    words = (*CBN, *NO_TEST, "SOLVER.MAX_ITER", "4")
    assert run_here(inputs, tmp_path, *words) == 130
    result = result_of(tmp_path)
    message = f"interrupted at iteration {at}"
    assert (result["status"], result["message"]) == ("failed", message)
    assert result["iterations"] == at + 1 == len(steps)
    assert run_here(inputs, tmp_path, "--resume", *words) == 0
    assert steps == [0, 1, 2, 3]
    result = result_of(tmp_path)
    assert (result["status"], result["iterations"]) == ("finished", 4)


def test_sigterm_to_the_process_group_of_a_run(inputs: Path, tmp_path: Path) -> None:
    """As a job scheduler sends it: the processes that load images get it too."""
    words = (*CBN, *NO_TEST, "DATALOADER.NUM_WORKERS", "2", "SOLVER.CHECKPOINT_PERIOD", "2")
    command = [sys.executable, str(REPOSITORY / "tools" / "train_net.py")]
    run = subprocess.Popen(
        [*command, *words_for(inputs, tmp_path, *words, "SOLVER.MAX_ITER", "100000")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "last_checkpoint").exists() and run.poll() is None:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "interrupted at iteration" in said and "Traceback" not in said
    done = result_of(tmp_path)["iterations"]
    assert run_here(inputs, tmp_path, "--resume", *words, "SOLVER.MAX_ITER", str(done + 1)) == 0
    result = result_of(tmp_path)
    assert (result["status"], result["iterations"]) == ("finished", done + 1)


# --------------------------------------------------------------- divergence


def all_finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)
    return all(bool(t.isfinite().all()) for t in tensors_of(state) if t.is_floating_point())


@pytest.mark.parametrize("rate", ["1e4", "1e12", "1e30"])
def test_a_divergence_names_the_layer_and_saves_nothing_bad(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], rate: str
) -> None:
    words = ("SOLVER.BASE_LR", rate, "SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "1")
    assert run_here(inputs, tmp_path, *words, *CBN, *NO_TEST) == 3
    result = result_of(tmp_path)
    assert result["status"] == "diverged" and result["iterations"] < 40
    where = (
        r"diverged at iteration \d+: (backbone|rpn|roi_heads|transform)[\w.]* \(\w+\): .*not finite"
    )
    assert re.match(where, result["message"]), result["message"]
    said = capfd.readouterr().err
    assert result["message"] in said and "Traceback" not in said
    assert all(all_finite(path) for path in tmp_path.glob("*.pth"))
    assert (tmp_path / "last_checkpoint").exists() == bool(list(tmp_path.glob("*.pth")))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("backbone.fpn.inner_blocks.1.0.weight", "backbone.fpn.inner_blocks.1.0 (Conv2d): output"),
        ("backbone.body.layer2.0.bn1.running_var", "backbone.body.layer2.0.bn1 (BatchNorm2d): "),
        ("rpn.head.conv.0.0.bias", "rpn.head.conv.0.0 (Conv2d): output"),
        ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score (Linear)"),
        ("roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred (Linear)"),
    ],
)
def test_divergence_names_the_first_bad_layer(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, expected: str
) -> None:
    def spoil(trainer: Trainer) -> None:
        tensors = dict(trainer.bare_model.named_parameters())
        tensors.update(trainer.bare_model.named_buffers())
        with torch.no_grad():
            tensors[layer].fill_(float("nan"))

    at_iteration(monkeypatch, 1, spoil)
    words = ("SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1", *NO_TEST)
    assert run_here(inputs, tmp_path, *words) == 3
    message = result_of(tmp_path)["message"]
    assert message.startswith(f"diverged at iteration 1: {expected}"), message
    assert result_of(tmp_path)["train_seconds"] > 0 and result_of(tmp_path)["peak_memory_mb"] > 0
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000000.pth"]


def test_a_stop_does_not_save_bad_weights(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.SGD.step

    def spoil(optimizer: torch.optim.SGD) -> None:
        step(optimizer)
        optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    assert run_here(inputs, tmp_path, *NO_TEST) == 3
    assert result_of(tmp_path)["status"] == "diverged"
    assert not list(tmp_path.glob("*.pth"))


def test_a_new_run_does_not_inherit_an_old_ones_files(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "finished"}')
    (tmp_path / "metrics.json").write_text('{"iteration": 99}\n')
    (tmp_path / "last_checkpoint").write_text("model_0000098.pth")
    assert run_here(inputs, tmp_path, "SOLVER.BASE_LR", "1e30", *NO_TEST) == 3
    assert result_of(tmp_path)["status"] == "diverged"
    assert lines_of(tmp_path) == []
    assert not (tmp_path / "last_checkpoint").exists()


# ------------------------------------------------- images without an object


def empty_every_other_image(inputs: Path, folder: Path) -> Path:
    content = json.loads((inputs / "boxes.json").read_text())
    content["images"] = content["images"][:4]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in (1, 3)]
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "norm",
    [
        *("", "BN", "GN", "FrozenBN", "SyncBN", "CBN(burn_in=1)", "CBN(compensation='none')"),
        *(
            "BGN(groups=4)",
            "MBN(burn_in=1)",
            "BRN(burn_in=0)",
            "KN",
            "GKN(groups=4)",
            "GN+WS(groups=4)",
        ),
    ],
)
def test_images_without_objects_train_with_every_norm(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """One image a batch: without an object, the mask head has no RoI."""
    seen = []
    forward = RoIHeads.forward

    def watched(heads: RoIHeads, features: Any, rois: list, shapes: Any, targets: list) -> Any:
        if torch.is_grad_enabled():  # not in MBN's second pass
            seen.append(len(targets[0]["boxes"]))
        return forward(heads, features, rois, shapes, targets)

    monkeypatch.setattr(RoIHeads, "forward", watched)
    norms = [w for s in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD") for w in (f"MODEL.{s}.NORM", norm)]
    annotations = empty_every_other_image(inputs, tmp_path)
    words = words_for(inputs, tmp_path / "out", *NO_TEST, *MASKS, *norms)
    words = [str(annotations) if w == str(inputs / "boxes.json") else w for w in words]
    more = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "SOLVER.IMS_PER_BATCH", "1")
    with run_loggers_removed():
        assert main([*words, *more]) == 0
    assert sorted(seen) == [0, 0, 2, 2]
    assert all_finite(tmp_path / "out" / "model_final.pth")
