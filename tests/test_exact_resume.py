"""A training on detectron2 that was killed goes on as if nothing had happened."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same_run import differences, lines_of, rank_files_of, same, state_of
from tiny_run import arguments, parsed, run_loggers_removed, write_mixed_inputs

pytestmark = pytest.mark.detectron2

CBN = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=1)")
MBN = ("MODEL.FPN.NORM", "MBN(burn_in=1)", "MODEL.ROI_BOX_HEAD.NORM", "MBN(burn_in=1)")
GN = (
    *("MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
)
KN_AND_GKN = ("MODEL.FPN.NORM", "KN", "MODEL.ROI_BOX_HEAD.NORM", "GKN(groups=4)")
KN_AND_OTHERS = (
    *("MODEL.FPN.NORM", "KN(gain=0.5)"),
    *("MODEL.RESNETS.NORM", "BGN(groups=2)", "MODEL.ROI_BOX_HEAD.NORM", "BRN(burn_in=1, ramp=2)"),
    *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"),
)
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NORM", "MBN(burn_in=1)"),
    *("MODEL.RETINANET.IN_FEATURES", "('p2', 'p3', 'p4', 'p5', 'p6')"),
    *("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.RETINANET.NUM_CONVS", "1"),
)
# every iteration has a learning rate of its own
LENGTH = (
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "3"),
    *("SOLVER.WARMUP_ITERS", "4", "SOLVER.STEPS", "(5,)"),
)
SHORT = ("SOLVER.MAX_ITER", "1")
OF_RANKS = (
    *(*CBN, "MODEL.RESNETS.NORM", "BRN(burn_in=1, ramp=2)"),
    *("SOLVER.IMS_PER_BATCH", "3"),
)
RANKS = 3
INEXACT = "the checkpoint cannot be resumed exactly"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs, too: a process that is forked while threads compute waits for them for ever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def scripts_as_written() -> Iterator[None]:
    """RetinaNet's losses are TorchScript, whose first calls in a process round differently."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_mixed_inputs(folder)
    return folder


def leave_out_the_end(patch: pytest.MonkeyPatch) -> None:
    """Pictures and FLOPs take longer than a few iterations; lines come every two of those."""
    from cbn_det.plugin import trainer
    from cbn_det.run import job

    for name in ("write_all_pictures", "count_flops"):
        patch.setattr(job, name, lambda *args: None)
    patch.setattr(trainer, "_WRITE_PERIOD", 2)


def run_here(inputs: Path, output: Path, *words: str) -> int:
    from cbn_det.launch import main

    with run_loggers_removed(), pytest.MonkeyPatch.context() as patch:
        leave_out_the_end(patch)
        return main(["--engine", "detectron2", *arguments(inputs, output, *words)])


def make_trainer(inputs: Path, output: Path, *words: str):
    from detectron2.utils import comm

    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, *words)
    output.mkdir(parents=True, exist_ok=True)
    cfg, _ = build_config(args, comm.get_world_size())
    prepare_datasets(cfg, args.coco_dataset)
    torch.manual_seed(cfg.SEED)  # as default_setup does
    return Trainer(cfg)


def killed(patch: Callable[[], None], run: Callable[[], Any]) -> int:
    """The exit code of a process that starts ``run()`` after ``patch()``."""

    def child() -> None:
        patch()
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Each changes the process that will be killed, for good.


def kill_in_a_step() -> None:
    from cbn_det.plugin.step import CheckedStep

    after_backward = CheckedStep.after_backward
    CheckedStep.after_backward = lambda self: die() if self.iter == 4 else after_backward(self)


def kill_while_saving() -> None:
    save = torch.save

    def half(content: Any, file: Any) -> None:
        if "model_0000005" not in Path(file.name).name:
            return save(content, file)
        file.write(b"half of it")
        file.flush()
        die()

    torch.save = half


def kill_before_the_save_is_known() -> None:
    from cbn_det.run.checkpoint import AtomicSave

    tag, names = AtomicSave.tag_last_checkpoint, []

    def late(self: AtomicSave, name: str) -> None:
        names.append(name)
        if len(names) == 2:
            die()
        tag(self, name)

    AtomicSave.tag_last_checkpoint = late


def kill_in_the_evaluation_after_a_save() -> None:
    from cbn_det.plugin.trainer import Trainer

    Trainer.evaluate = die


KILLS = {
    "in a step": kill_in_a_step,
    "while saving": kill_while_saving,
    "before the save is known": kill_before_the_save_is_known,
    "in the evaluation after a save": kill_in_the_evaluation_after_a_save,
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
            assert run_here(inputs, folders[norm], *norm, *LENGTH) == 0
        return folders[norm]

    return run


@pytest.mark.usefixtures("scripts_as_written")
@pytest.mark.parametrize(
    ("norm", "when", "workers"),
    [
        *((CBN, when, "0") for when in KILLS),
        (CBN, "in a step", "2"),
        (MBN, "in a step", "0"),
        (GN, "in a step", "0"),
        (KN_AND_GKN, "in the evaluation after a save", "0"),
        (KN_AND_OTHERS, "in a step", "0"),
        (RETINANET, "in a step", "0"),
    ],
)
def test_a_killed_run_resumes_exactly(
    inputs: Path,
    unbroken: Callable[[tuple[str, ...]], Path],
    tmp_path: Path,
    norm: tuple[str, ...],
    when: str,
    workers: str,
) -> None:
    whole = unbroken(norm)
    words = (*norm, *LENGTH, "DATALOADER.NUM_WORKERS", workers)
    assert killed(KILLS[when], lambda: run_here(inputs, tmp_path, *words)) == -signal.SIGKILL
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "result.json").exists()
    assert run_here(inputs, tmp_path, "--resume", *words) == 0
    assert differences(tmp_path, whole) == []
    assert not list(tmp_path.glob(".*"))
    assert INEXACT not in (tmp_path / "log.txt").read_text()


def test_a_run_that_never_saved_leaves_no_lines(
    inputs: Path, unbroken: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 7.0}\n{"itera')
    assert run_here(inputs, tmp_path, "--resume", *CBN, *LENGTH) == 0
    assert differences(tmp_path, unbroken(CBN)) == []


# ------------------------------------------------------------------ mixed precision


class Killed(BaseException):
    """Ends a training inside a process that lives on."""


def break_off(trainer: Any, at: int) -> None:
    run_step = trainer._trainer.run_step

    def broken() -> None:
        if trainer.iter == at:
            trainer.after_train = lambda: None
            raise Killed
        run_step()

    trainer._trainer.run_step = broken


@pytest.mark.parametrize(("overflow", "scales"), [(None, (8.0, 16.0)), (2, (4.0, 8.0))])
def test_mixed_precision_and_accumulation_resume_exactly(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overflow: int | None,
    scales: tuple[float, float],
) -> None:
    """On the CPU, which the launcher does not offer but the training step can do. Also where the
    checkpoint comes after a step that was skipped, whose mini-batches belong to the next one."""
    from cbn_det.plugin.trainer import Trainer

    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=4.0, growth_interval=2)
    monkeypatch.setattr("torch.amp.GradScaler", scaler)
    words = ("SOLVER.MAX_ITER", "5", "SOLVER.CHECKPOINT_PERIOD", "3", "DATASETS.TEST", "()")
    norms = (
        *("MODEL.FPN.NORM", "KN", "MODEL.ROI_BOX_HEAD.NORM", "MBN(burn_in=1)"),
        *("MODEL.RESNETS.NORM", "CBN(window=3, burn_in=1)"),
    )

    def make(name: str) -> Trainer:
        cfg = config_of(inputs, *words, *norms, "OUTPUT_DIR", str(tmp_path / name))
        (tmp_path / name).mkdir(exist_ok=True)
        cfg.defrost()
        cfg.SOLVER.AMP.ENABLED = True
        torch.manual_seed(0)
        trainer = Trainer(cfg, accumulate=2)
        trainer.step.precision = torch.bfloat16
        trainer.model.backbone.fpn_lateral2.weight.register_hook(
            lambda grad: grad * float("inf") if trainer.iter == overflow else grad
        )
        return trainer

    make("whole").train()
    trainer = make("broken")
    break_off(trainer, 4)
    with pytest.raises(Killed):
        trainer.train()
    trainer = make("broken")
    trainer.resume_or_load()
    assert (trainer.start_iter, trainer.step.grad_scaler.get_scale()) == (3, scales[0])
    trainer.train()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert same(lines_of(broken), lines_of(whole))
    assert same(state_of(broken), state_of(whole))
    assert state_of(broken)["trainer"]["_trainer"]["grad_scaler"]["scale"] == scales[1]


# ------------------------------------------------------------------ several processes


def _runs_of_ranks(inputs: Path, folder: Path) -> int:
    """A job: one run in one go, one broken off and one stopped, which both are resumed, the former
    by ranks that do not share their folder; and one that finds a broken file."""
    from detectron2.utils import comm

    from cbn_det.run.signals import Interrupted

    torch.set_num_threads(1)
    words = (*OF_RANKS, *LENGTH, "TEST.EVAL_PERIOD", "4", "DATASETS.TEST", "()")
    make_trainer(inputs, folder / "whole", *words).train()

    own = folder / ("elsewhere" if comm.get_rank() == 1 else "broken")
    for output, ending, error in (
        (own, break_off, Killed),
        (folder / "stopped", ask_to_stop, Interrupted),
    ):
        trainer = make_trainer(inputs, output, *words)
        ending(trainer, 4)
        with pytest.raises(error):
            trainer.train()
        comm.synchronize()
        if output != folder / "stopped":
            with pytest.raises(ValueError, match="'model_0000002.pth', rank 1 finds ''"):
                make_trainer(inputs, output, *words).resume_or_load()
        if output == folder / "elsewhere":
            for name in ("last_checkpoint", "model_0000002.pth"):
                shutil.copy(folder / "broken" / name, output)
        trainer = make_trainer(inputs, output, *words)
        trainer.resume_or_load()
        trainer.train()

    if comm.get_rank() == 1:
        (folder / "stopped" / "rank1_0000005.pth").write_bytes(b"half of it")
    comm.synchronize()
    trainer = make_trainer(inputs, folder / "stopped", *words)
    log = logging.getLogger("cbn_det.plugin.resume")
    log.addHandler(logging.FileHandler(folder / f"log{comm.get_rank()}"))
    trainer.resume_or_load()
    return 0


def ask_to_stop(trainer: Any, at: int) -> None:
    run_step = trainer._trainer.run_step

    def asked() -> None:
        trainer._trainer.stop_request.requested = trainer.iter == at
        run_step()

    trainer._trainer.run_step = asked


def test_several_processes_resume_exactly(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbn_det.plugin.launch import Layout, run_processes

    ended = run_processes(Layout(processes=RANKS), "cpu", _runs_of_ranks, (inputs, tmp_path))
    assert ended == (0, "")
    whole, broken, stopped = (tmp_path / name for name in ("whole", "broken", "stopped"))
    for output in (broken, stopped):
        assert same(lines_of(output), lines_of(whole)), output.name
        assert same(state_of(output), state_of(whole)), output.name
    for folder in (tmp_path / "elsewhere").glob("rank*.pth"):
        folder.rename(broken / folder.name)
    expected = rank_files_of(whole)
    assert sorted(expected) == [f"rank{r}_{i:07d}.pth" for r in range(1, RANKS) for i in (2, 5)]
    assert same(rank_files_of(broken), expected)
    assert (stopped / "model_0000004.pth").exists()
    for rank in range(1, RANKS):  # of the last two saves
        names = [path.name for path in sorted(stopped.glob(f"rank{rank}_*.pth"))]
        assert names == [f"rank{rank}_0000004.pth", f"rank{rank}_0000005.pth"]
    other = state_of(whole)["trainer"]
    ours = expected["rank1_0000005.pth"]
    assert not same(ours["norm_memory"], other["norm_memory"])  # it was worth a file
    said = (tmp_path / "log0").read_text()
    assert said.count(INEXACT) == 1 and "rank1_0000005.pth cannot be read" in said

    again = make_trainer(inputs, tmp_path / "broken", *OF_RANKS, *LENGTH)
    listen(monkeypatch, caplog)
    again.resume_or_load()
    assert len(warnings_in(caplog)) == 1
    assert f"written by {RANKS} processes, now there are 1" in caplog.text
    from cbn_det.norms import memory_state_dict

    assert same(memory_state_dict(again.bare_model), other["norm_memory"])


def listen(patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("cbn_det.plugin.resume")  # it may not propagate
    patch.setattr(log, "handlers", [caplog.handler])
    patch.setattr(log, "propagate", False)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if INEXACT in r.getMessage()]


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("BN", "CBN(window=3, burn_in=1)", "the model has other norms"),
        ("MBN(burn_in=1)", "CBN(burn_in=1)", "the model has other norms"),
        ("CBN(window=3, burn_in=1)", "CBN(window=4, burn_in=1)", "window=3"),
    ],
)
def test_other_norms_start_with_an_empty_memory(
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
    why: str,
) -> None:
    from cbn_det.norms import memory_state_dict

    more = ("SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()")
    make_trainer(inputs, tmp_path, "MODEL.FPN.NORM", before, *more).train()
    again = make_trainer(inputs, tmp_path, "MODEL.FPN.NORM", after, *more)
    fresh = memory_state_dict(again.bare_model)
    listen(monkeypatch, caplog)
    again.resume_or_load()
    assert again.start_iter == 3
    (said,) = warnings_in(caplog)
    assert why in said and "windows of all norms start anew, burn-ins go on" in said
    for layer in fresh.values():
        layer["steps"] = 3
    assert same(memory_state_dict(again.bare_model), fresh)
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert same(dict(again.bare_model.state_dict()), dict(weights))


def test_a_checkpoint_of_detectron2s_own_trainer_goes_on_where_the_schedule_is(
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cbn_det.norms import memory_state_dict

    more = ("MODEL.FPN.NORM", "CBN(window=3, burn_in=2)", "SOLVER.MAX_ITER", "3")
    make_trainer(inputs, tmp_path, *more, "DATASETS.TEST", "()").train()
    file = tmp_path / "model_final.pth"
    state = torch.load(file, weights_only=True)
    theirs = ("iteration", "hooks", "_trainer")
    state["trainer"] = {key: state["trainer"][key] for key in theirs}
    torch.save(state, file)
    again = make_trainer(inputs, tmp_path, *more, "DATASETS.TEST", "()")
    listen(monkeypatch, caplog)
    again.resume_or_load()
    (said,) = warnings_in(caplog)
    assert "it holds no norm memory: windows of all norms start anew, burn-ins go on" in said
    assert {layer["steps"] for layer in memory_state_dict(again.bare_model).values()} == {3}


# ------------------------------------------------------------------ images


def config_of(inputs: Path, *words: str) -> Any:
    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets

    args = parsed(inputs, "out", *words)
    cfg, _ = build_config(args, 1)
    prepare_datasets(cfg, args.coco_dataset)
    return cfg


def loader_of(inputs: Path, *words: str) -> Any:
    from cbn_det.plugin.loading import build_loader

    return build_loader(config_of(inputs, *words))


def batches(loader: Any, seed: int, start: int, count: int) -> list[list[Any]]:
    from cbn_det.plugin.loading import place

    place(loader, seed, start)
    found = [next(iterator) for iterator in [iter(loader)] for _ in range(count)]
    return [
        [
            (sample["image_id"], sample["image"], sample["instances"].gt_boxes.tensor)
            for sample in batch
        ]
        for batch in found
    ]


def test_a_batch_depends_on_seed_and_iteration_alone(inputs: Path) -> None:
    loader = loader_of(inputs, "INPUT.RANDOM_FLIP", "horizontal")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    all_of_them = batches(loader, 1, 0, 12)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert same(batches(loader, 1, 7, 5), all_of_them[7:])
    workers = loader_of(inputs, "INPUT.RANDOM_FLIP", "horizontal", "DATALOADER.NUM_WORKERS", "2")
    assert same(batches(workers, 1, 3, 4), all_of_them[3:7])
    assert not same(batches(loader, 2, 0, 12), all_of_them)
    for batch in all_of_them:  # grouped: one of the two is not padded to the other's shape
        assert len({image_id % 2 for image_id, _, _ in batch}) == 1
    views = [image for batch in all_of_them for image_id, image, _ in batch if image_id == 1]
    assert len({tuple(view.shape) for view in views}) > 1  # and augmented anew every time


def test_the_order_is_detectron2s() -> None:
    from detectron2.data.common import AspectRatioGroupedDataset
    from detectron2.data.samplers import TrainingSampler

    from cbn_det.plugin.loading import grouped_keys

    wide = [bool(w) for w in np.random.default_rng(0).integers(0, 2, 50)]
    records = [{"index": i, "width": 2 if w else 1, "height": 1.5} for i, w in enumerate(wide)]
    for size in (1, 3):
        indices = list(zip(range(400), TrainingSampler(50, seed=3), strict=False))
        theirs = AspectRatioGroupedDataset([records[i] for _, i in indices], size)
        expected = [[record["index"] for record in batch] for batch in theirs]
        ours = list(grouped_keys(iter(i for _, i in indices), wide, size, 0, 1))
        assert [[index for index, _ in batch] for batch in ours] == expected
        for batch in ours:
            assert all(indices[position][1] == index for index, position in batch)


def test_ranks_share_out_positions() -> None:
    from cbn_det.plugin.loading import grouped_keys

    taken = [list(grouped_keys(iter(range(6)), None, 2, rank, 3)) for rank in range(3)]
    positions = [position for rank in taken for batch in rank for _, position in batch]
    assert sorted(positions) == list(range(18))


def test_other_samplers(
    inputs: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbn_det.plugin.loading import ResumableLoader, build_loader

    log = logging.getLogger("cbn_det.plugin.loading")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    cfg = config_of(inputs, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    whole = batches(build_loader(cfg), 1, 0, 9)
    np.random.seed(5)
    assert same(batches(build_loader(cfg), 1, 4, 5), whole[4:])
    assert not caplog.text

    cfg.defrost()
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    loader = build_loader(cfg)
    assert not isinstance(loader, ResumableLoader)
    assert "DATALOADER.SAMPLER_TRAIN: RandomSubsetTrainingSampler cannot" in caplog.text
    assert len(next(iter(loader))) == 2


def test_signals_do_not_reach_the_processes_that_load(inputs: Path) -> None:
    from cbn_det.plugin.trainer import Trainer

    words = (*SHORT, "DATALOADER.NUM_WORKERS", "1")
    cfg = config_of(inputs, *words)
    test_set = cfg.DATASETS.TEST[0]
    for loader in (Trainer.build_train_loader(cfg), Trainer.build_test_loader(cfg, test_set)):
        iterator = iter(loader)
        next(iterator)
        (worker,) = multiprocessing.active_children()
        for number in ("TERM", "INT", "TERM"):
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        assert [len(next(iterator)) for _ in range(4)]
        assert worker.is_alive()
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
        del iterator


@pytest.mark.parametrize("ending", ["killed", "exits"])
def test_the_processes_that_load_end_with_the_main_one(
    inputs: Path, tmp_path: Path, ending: str
) -> None:
    def load() -> None:
        global _left_open
        _left_open = iter(loader_of(inputs, "DATALOADER.NUM_WORKERS", "2"))
        next(_left_open)
        pids = [worker.pid for worker in multiprocessing.active_children()]
        (tmp_path / "pids").write_text(" ".join(map(str, pids)))
        if ending == "killed":
            die()

    code = killed(lambda: None, load)
    assert code == (-signal.SIGKILL if ending == "killed" else 0)
    left = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(left) == 2
    end = time.monotonic() + 30
    while left and time.monotonic() < end:
        left = [pid for pid in left if running(pid)]
        time.sleep(0.05)
    assert not left


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_mapper_of_ones_own_and_a_loader_of_ones_own(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detectron2.data import DatasetMapper, build_detection_train_loader

    from cbn_det.plugin.loading import ResumableLoader, build_loader
    from cbn_det.plugin.trainer import Trainer

    class Marking(DatasetMapper):
        def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
            return {**super().__call__(record), "marked": True}

    cfg = config_of(inputs, *SHORT, "OUTPUT_DIR", str(tmp_path))
    for build, exact in ((build_loader, True), (build_detection_train_loader, False)):
        make = classmethod(lambda cls, cfg, build=build: build(cfg, mapper=Marking(cfg, True)))
        trainer_class = type("Own", (Trainer,), {"build_train_loader": make})
        trainer_class(cfg).train()
        trainer = trainer_class(cfg)
        listen(monkeypatch, caplog)
        caplog.clear()
        trainer.resume_or_load()
        assert isinstance(trainer.data_loader, ResumableLoader) == exact
        assert bool(warnings_in(caplog)) != exact
        assert ("the training loader cannot go on where it was" in caplog.text) != exact
        assert all(sample["marked"] for sample in next(iter(trainer.data_loader)))


def test_images_that_the_mapper_refuses_are_replaced(inputs: Path) -> None:
    from cbn_det.data import DataError

    loader = loader_of(inputs)
    whole = batches(loader, 1, 0, 6)
    mapper = loader._mapper
    loader._mapper = lambda record: None if record["image_id"] == 3 else mapper(record)
    kept = batches(loader, 1, 0, 6)
    assert all(image_id != 3 for batch in kept for image_id, _, _ in batch)
    assert same([b[0] for b in kept if b[0][0] == 2], [b[0] for b in whole if b[0][0] == 2])
    assert same(batches(loader, 1, 2, 4), kept[2:])
    loader._mapper = lambda record: None
    with pytest.raises(DataError, match="refused 1000 images"):
        batches(loader, 1, 0, 1)
