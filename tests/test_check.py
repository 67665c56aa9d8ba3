"""cbn-det check: what can be known of a training before it starts, on both engines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import (
    REPOSITORY,
    arguments,
    dataset_name,
    run_loggers_removed,
    write_boxes,
    write_inputs,
)

from cbn_det.commands import check, trial
from cbn_det.run.measure import peak_memory_mb, reset_peak_memory

ENGINES = [pytest.param("detectron2", marks=pytest.mark.detectron2), "standalone"]
CBN = ("MODEL.FPN.NORM", "CBN(window=2, burn_in=2)")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set for training, and another one for evaluation."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    write_boxes(folder / "val", count=2, size=80)
    return folder


def words_of(inputs: Path, output: Path, engine: str, *options: str) -> list[str]:
    name = dataset_name(inputs)
    val = ["--coco-dataset", f"{name}_val", str(inputs / "val/boxes.json"), f"{inputs}/val/images"]
    config = "tiny.yaml" if engine == "detectron2" else "standalone.yaml"
    keys = next((i for i, word in enumerate(options) if word[:1].isupper()), len(options))
    words = ("--engine", engine, *val, *options[:keys], "DATASETS.TEST", f"('{name}_val',)")
    return arguments(inputs, output, *words, *options[keys:], config=config)


@pytest.fixture
def lines(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Exit code and lines of a check."""

    def run(engine: str, *options: str) -> tuple[int, list[str]]:
        code = check.main(words_of(inputs, tmp_path / "run", engine, *options))
        return code, capsys.readouterr().out.splitlines()

    return run


def line_of(found: list[str], start: str) -> str:
    (line,) = [line for line in found if line[8:].startswith(start)]
    return line


@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_that_is_ready(
    lines: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = (*CBN, "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2")
    code, found = lines(engine, *options)
    assert code == 0 and found[-1] == "ready for training", found
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"
    assert f"{engine} engine, cpu" in line_of(found, "config: ")
    assert line_of(found, "norms: 8 x CBN(").endswith(", 8 bound to their convolution")
    # ResNet-50 has 53 norms; the box head is one convolution
    assert line_of(found, "norms: 54 x BN" if engine == "detectron2" else "norms: 54 x ")
    assert line_of(found, "burn-in: ").endswith("CBN is BatchNorm until iteration 2 of 6")
    assert line_of(found, "folding: 62 norms")
    assert line_of(found, "no image is in both DATASETS.TRAIN and DATASETS.TEST")
    used = int(re.search(r"memory: (\d+) MB", line_of(found, "memory: ")).group(1))
    assert 0 < used < 1000
    assert len(found) <= 20, "more than a screen"

    # Oracle: the checkpoints that the training then leaves.
    from cbn_det.launch import main as train

    with run_loggers_removed():
        assert train(words_of(inputs, tmp_path / "run", engine, *options)) == 0
    sizes = [path.stat().st_size for path in (tmp_path / "run").glob("model_*.pth")]
    number, size = re.search(r"are (\d+) x ([\d.]+) MB", line_of(found, "disk: ")).groups()
    assert int(number) == len(sizes) == 4
    assert float(size) == pytest.approx(
        max(sizes) / 1e6, rel=0.02, abs=1.0 if engine == "detectron2" else 0
    )
    code, found = lines(engine, *options)
    assert code == 0 and line_of(found, "OUTPUT_DIR ").startswith("note ")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks begin anew on Linux")
def test_memory_counts_that_was_freed_before() -> None:
    """As that of annotations is."""

    def blocks() -> list[bytes]:
        return [bytes([i % 250 + 1]) * 100_000 for i in range(2000)]

    freed = blocks()
    kept = freed[-1]  # what lies behind the others keeps them from going back by themselves
    del freed
    reset_peak_memory()
    before = peak_memory_mb()
    used = blocks()
    assert peak_memory_mb() - before > 150 and used[-1] == kept


PROBLEMS = {
    "a key": (("SOLVER.MAX_ITRE", "3"), "SOLVER.MAX_ITRE"),
    "a norm": (("MODEL.FPN.NORM", "CBNN"), "MODEL.FPN.NORM: unknown norm"),
    "classes": (("MODEL.ROI_HEADS.NUM_CLASSES", "3"), "add `MODEL.ROI_HEADS.NUM_CLASSES 2`"),
    "no set": (("DATASETS.TRAIN", "('nothing',)"), "nothing"),
    "weights": (("MODEL.WEIGHTS", "absent.pth"), "MODEL.WEIGHTS absent.pth: no such file"),
    "random": (("MODEL.BACKBONE.FREEZE_AT", "2"), "frozen layers, which stay random"),
    "burn-in": (
        ("MODEL.FPN.NORM", "CBN(burn_in=4)"),
        "CBN is BatchNorm until iteration 4, and SOLVER.MAX_ITER is 4",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_name_the_key_and_the_remedy(lines: Any, engine: str, problem: str) -> None:
    options, said = PROBLEMS[problem]
    code, found = lines(engine, *options)
    assert code == 1 and found[-1] == "1 problem found"
    (line,) = [line for line in found if line.startswith("PROBLEM ")]
    assert said in line


@pytest.mark.parametrize("engine", ENGINES)
def test_sizes_that_no_image_gets(lines: Any, engine: str) -> None:
    code, found = lines(engine, "INPUT.MIN_SIZE_TRAIN", "(96, 400)", "INPUT.MAX_SIZE_TRAIN", "128")
    assert code == 0
    assert line_of(found, "INPUT.MIN_SIZE_TRAIN (96, 400) is above INPUT.MAX_SIZE_TRAIN 128")
    assert not any("INPUT.MIN_SIZE_TEST" in line for line in found)


def test_images_in_both_sets(lines: Any, inputs: Path) -> None:
    code, found = lines("standalone", "DATASETS.TEST", f"('{dataset_name(inputs)}',)")
    assert code == 1 and "--coco-dataset" in found[0], "a set that is not used"
    name = dataset_name(inputs)
    code, found = lines("standalone", "DATASETS.TEST", f"('{name}_val', '{name}')")
    assert code == 1
    assert "6 images are in both DATASETS.TRAIN and DATASETS.TEST" in "".join(found)


@pytest.mark.detectron2
def test_a_norm_that_no_layer_has(lines: Any) -> None:
    options = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NORM", "CBN")
    code, found = lines("detectron2", *options)
    assert code == 1
    assert "MODEL.ROI_BOX_HEAD.NORM: the model has no layer of this norm" in "".join(found)


@pytest.mark.parametrize("engine", ENGINES)
def test_kalman_norms_say_where_the_chain_ends(lines: Any, engine: str) -> None:
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
    code, found = lines(engine, *(word for key in keys for word in (key, "KN")))
    assert code == 0
    assert line_of(found, "KN: 61 of 62 layers have a prediction")  # the stem sees the image
    assert line_of(found, "KN: 1 without (a model input").startswith("note ")


@pytest.mark.detectron2
def test_a_training_set_in_another_format(lines: Any, inputs: Path, tmp_path: Path) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    images = inputs / "val" / "images"
    content = json.loads((inputs / "val" / "boxes.json").read_text())
    for record in content["images"]:  # as LVIS names them
        record["coco_url"] = f"somewhere/{record.pop('file_name')}"
    (tmp_path / "other.json").write_text(json.dumps(content))
    name = f"other_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: load_coco_json(inputs / "val/boxes.json", images, name))
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "other.json"),
        image_root=str(images),
        evaluator_type="lvis",
        thing_classes=[category["name"] for category in content["categories"]],
    )
    try:
        sets = f"('{dataset_name(inputs)}', '{name}')"
        code, found = lines("detectron2", "DATASETS.TRAIN", sets)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert code == 0, found
    assert line_of(found, "no image is in both DATASETS.TRAIN and DATASETS.TEST")


def test_memory_and_disk_that_do_not_suffice(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3e6))
    pages = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(trial.os, "sysconf", pages.get)
    # what this process took before it, it need not take again
    peaks = iter((100.0, 350.0))
    monkeypatch.setattr(trial, "peak_memory_mb", lambda: next(peaks))
    code, found = lines("standalone", "SOLVER.CHECKPOINT_PERIOD", "1", *CBN)
    assert code == 1 and found[-1] == "2 problems found"
    assert line_of(found, "disk: checkpoints are 5 x ").startswith("PROBLEM ")
    assert "lower SOLVER.IMS_PER_BATCH" in line_of(found, "memory: ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("tried 2.00 GiB"),
            "memory: a training step does not fit (tried 2.",
        ),
        (RuntimeError("shapes do not match"), "a training step fails: RuntimeError: shapes do not"),
    ],
)
def test_a_step_that_fails(
    lines: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from cbn_det.run.trial import Trial

    def fail(self: Trial, iteration: int) -> None:
        raise error

    monkeypatch.setattr(Trial, "step", fail)
    code, found = lines("standalone")
    assert code == 1 and found[-2].startswith("PROBLEM ") and said in found[-2]


@pytest.mark.detectron2
def test_processes_share_the_batch_and_the_machine(
    lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbn_det.run.trial import Trial

    seen = []
    step = Trial.step

    def noted(self: Trial, iteration: int) -> None:
        step(self, iteration)
        seen.append(len(self._trainer.step.last_batch))

    monkeypatch.setattr(Trial, "step", noted)
    more = ("SOLVER.IMS_PER_BATCH", "6", "SOLVER.REFERENCE_WORLD_SIZE", "3")
    code, found = lines("detectron2", "--num-gpus", "2", "--accumulate", "2", *more)
    assert code == 0, found
    assert "2 images x 2 mini-batches, times 2 processes" in line_of(found, "memory: ")
    assert seen == [2, 2, 2]
    assert "cpu, 2 processes" in line_of(found, "config: ")


@pytest.mark.parametrize(
    "command",
    [["tools/check_coco.py", "--train", "JSON", "IMAGES"], ["-m", "cbn_det", "check", "x.yaml"]],
)
def test_a_reader_that_leaves_is_no_error(
    inputs: Path, tmp_path: Path, source_env: dict[str, str], command: list[str]
) -> None:
    """As ``| head`` does."""
    files = {"JSON": str(inputs / "boxes.json"), "IMAGES": str(inputs / "images")}
    words = [files.get(word, word) for word in command]
    if words[0] != "-m":
        words[0] = str(REPOSITORY / words[0])
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *words],
        env=source_env,
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 141


def test_every_tool_is_its_command(source_env: dict[str, str], tmp_path: Path) -> None:
    """tools/X.py --help, from anywhere, shows the options of ``python -m cbn_det``."""
    env = {name: value for name, value in source_env.items() if name != "PYTHONPATH"}
    for tool, command in (("compare_norms", "compare"), ("reproduce", "reproduce")):
        path = shutil.copytree(REPOSITORY / "tools", tmp_path / command / "tools") / f"{tool}.py"
        (path.parents[1] / "cbn_det").symlink_to(REPOSITORY / "cbn_det")
        runs = (
            ([str(path), "--help"], env),
            (["-m", "cbn_det", command, "--help"], source_env),
        )
        shown = [
            subprocess.run(
                [sys.executable, *words], env=of, cwd=tmp_path, capture_output=True, text=True
            ).stdout
            for words, of in runs
        ]
        own, whole = (re.sub(r"\s+", " ", text).partition("]")[2] for text in shown)
        assert own == whole and len(own) > 1000
        assert shown[1].startswith(f"usage: python -m cbn_det {command} ")


def test_the_weights_are_looked_at_and_loaded(lines: Any, inputs: Path, tmp_path: Path) -> None:
    from cbn_det.standalone.config import read_config
    from cbn_det.standalone.model import build_model

    model = build_model(read_config(inputs / "standalone.yaml"))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    code, found = lines("standalone", "MODEL.WEIGHTS", str(path))
    assert code == 0 and line_of(found, str(path)).startswith("ok ")
    torch.save({"model": {"other": torch.zeros(1)}}, path)
    code, found = lines("standalone", "MODEL.WEIGHTS", str(path))
    assert code == 1 and str(path) in [line for line in found if "PROBLEM" in line][0]
    path.write_bytes(path.read_bytes()[:200])
    code, found = lines("standalone", "MODEL.WEIGHTS", str(path))
    assert code == 1 and "is cut off" in line_of(found, str(path))
    assert json.loads((inputs / "boxes.json").read_text())["images"]
