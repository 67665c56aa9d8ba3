"""The benchmark: its arithmetic, and that it runs. How fast anything is, is not tested."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import arguments, run_loggers_removed, tiny_inputs

from cbn_det.norms import CBN2d, MBN2d
from cbn_det.run.arguments import argument_parser

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from benchmark import cases, main, make_parser, rows_of  # noqa: E402
from timing import (  # noqa: E402
    KEEP_FREED_MEMORY,
    WorkerFailed,
    Workload,
    end_burn_in,
    median_interval,
    paired_ratio,
    run,
    started,
    take_turns,
)
from workloads import (  # noqa: E402
    BATCHES,
    inference_workload,
    iteration_workload,
    layer_workload,
    norm_workload,
)

inputs = tiny_inputs


# ---- the arithmetic --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, rank",  # printed in tables of nonparametric statistics
    [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18)],
)
def test_the_interval_has_the_ranks_of_the_tables(n, rank):
    values = np.random.default_rng(0).permutation(np.arange(1, n + 1)).tolist()
    assert median_interval(values) == (rank, n + 1 - rank)


def test_the_interval_holds_the_median_as_often_as_it_says():
    samples = np.random.default_rng(0).lognormal(size=(4000, 20))  # true median 1
    intervals = np.array([median_interval(sample.tolist()) for sample in samples])
    share = ((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).mean()
    assert share == pytest.approx(0.9586, abs=0.01)  # 1 - 2 P(binomial(20, 1/2) <= 5)


def test_a_machine_that_slows_down_does_not_change_a_ratio():
    rng = np.random.default_rng(1)
    speed = np.where(np.arange(30) < 12, 1.0, 3.0)
    reference = speed * rng.normal(0.5, 0.01, 30)
    times = 1.25 * speed * rng.normal(0.5, 0.01, 30)
    times[[3, 20]] *= 9  # something else ran
    ratio, (low, high) = paired_ratio(times.tolist(), reference.tolist())
    assert ratio == pytest.approx(np.median(times / reference))
    assert low < 1.25 < high and high - low < 0.05


def test_the_same_against_the_same_is_one():
    rng = np.random.default_rng(2)
    times, reference = rng.gamma(5, size=(2, 40))
    _, (low, high) = paired_ratio(times.tolist(), reference.tolist())
    assert low < 1 < high
    assert paired_ratio([1.0] * 6, [1.0] * 6) == (1.0, (1.0, 1.0))


def test_too_few_repetitions_are_no_interval():
    with pytest.raises(ValueError, match="5 repetitions: an interval needs 6 or more"):
        median_interval([1.0] * 5)
    with pytest.raises(ValueError):
        paired_ratio([1.0] * 7, [1.0] * 6)


# ---- taking turns ----------------------------------------------------------------------------


class FakeWorker:
    def __init__(self, norm, turns):
        self.norm, self.turns = norm, turns

    def ask(self, function, steps):
        self.turns.append(self.norm)
        assert function is run and steps == 3
        return {"wall": float(len(self.turns)), "cpu": 0.0}


def test_every_worker_has_a_turn_in_each_repetition_in_changing_order():
    turns = []
    workers = [FakeWorker(norm, turns) for norm in "abc"]
    taken = take_turns(workers, steps=3, repetitions=20)
    rounds = [tuple(turns[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 3
    assert [t["wall"] for t in taken["b"]] == [i + 1 for i, n in enumerate(turns) if n == "b"]


def dies() -> None:
    os._exit(1)


def dies_at_once() -> Workload:
    dies()


def dies_when_asked() -> Workload:
    return Workload(dies, torch.nn.Module(), torch.device("cpu"))


@pytest.mark.parametrize("build", [dies_at_once, dies_when_asked])
def test_a_worker_that_dies_is_an_error_that_names_the_norm(build):
    with started({"CBN": build}) as (worker,):
        with pytest.raises(WorkerFailed, match="CBN: .*process .* was terminated"):
            worker.facts()
            worker.ask(run, 1)


def environment() -> Workload:
    return Workload(lambda: None, torch.nn.Module(), torch.device("cpu"))


@pytest.mark.parametrize("own", [None, "1000"])
def test_workers_keep_the_memory_they_freed_unless_told_otherwise(monkeypatch, own):
    """So that page faults are not taken for the cost of a norm."""
    for name in KEEP_FREED_MEMORY:
        monkeypatch.setenv(name, "")  # is put back afterwards
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", own)
    with started({"BN": environment}) as (worker,):
        found = {name: int(worker.ask(os.getenv, name)) for name in KEEP_FREED_MEMORY}
    assert found["MALLOC_MMAP_THRESHOLD_"] > 2**32
    assert found["MALLOC_TRIM_THRESHOLD_"] == (int(own) if own else found["MALLOC_MMAP_THRESHOLD_"])


# ---- the report ------------------------------------------------------------------------------


TIMES = {"BN": [0.2] * 6, "CBN": [0.6, 0.6, 0.5, 0.7, 0.8, 0.4]}


def test_a_row_has_the_columns_of_the_tables_in_the_docs():
    bn, cbn = rows_of("a case", TIMES, {"BN": 100.0, "CBN": 107.0})
    assert bn["ratio to BN"] == bn["memory ratio"] == 1
    assert cbn["ms"] == pytest.approx(600) and cbn["peak MB"] == 107
    ends = [cbn[f"ratio to BN{end}"] for end in ("", " low", " high")]
    assert ends == pytest.approx([3, 2, 4]) and cbn["memory ratio"] == 1.07
    with open(REPOSITORY / "docs" / "results" / "iteration_everywhere.csv") as file:
        assert set(next(csv.reader(file))) <= cbn.keys()


def test_bandwidth_is_what_has_to_be_moved_in_the_time():
    times = {"copy": [0.2] * 6, "CBN": [0.6] * 6}
    copy, cbn = rows_of("x", times, {"copy": 1.0, "CBN": 1.0}, size=10**9)
    assert (copy["GB/s"], copy["of copy's, %"]) == pytest.approx((10, 100))
    assert (cbn["GB/s"], cbn["of copy's, %"]) == pytest.approx((40 / 3, 400 / 3))


OPTIONS = ["--repetitions", "7", "--turn-seconds", "0", "--warm-up", "1", "--threads", "1"]


def written(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_norms_alone_are_timed_beside_a_copy(tmp_path, capsys):
    words = ["norm", "--norms", "GN", "CBN(compensation='none')", "--shapes", "2,32,6,5", *OPTIONS]
    assert main([*words, "--out", str(tmp_path / "norm.csv")]) == 0
    assert "of copy's" in capsys.readouterr().out
    rows = written(tmp_path / "norm.csv")
    assert [row["norm"] for row in rows] == ["copy", "GN", "CBN(compensation='none')"]
    for row, tensors in zip(rows, (2, 8, 8), strict=True):
        moved = float(row["GB/s"]) * 1e9 * float(row["ms"]) / 1e3
        assert row["case"] == "2x32x6x5" and moved == pytest.approx(tensors * 2 * 32 * 6 * 5 * 4)


def test_layers_are_timed_and_reported(tmp_path, capsys):
    words = ["layer", "--norms", "BN", "CBN(window=3)", "MBN(window=2)", "--shapes", "2,4,6,5,8,3"]
    assert main([*words, *OPTIONS, "--out", str(tmp_path / "new" / "layer.csv")]) == 0
    assert "3x3 4->8, 2x6x5" in capsys.readouterr().out
    rows = written(tmp_path / "new" / "layer.csv")
    assert [row["norm"] for row in rows] == ["BN", "CBN(window=3)", "MBN(window=2)"]
    assert {row["repetitions"] for row in rows} == {"7"} and "1 threads" in rows[0]["machine"]
    assert all(float(row["ms"]) > 0 and float(row["peak MB"]) >= 0 for row in rows)


def test_a_dispatch_bound_step_is_timed_in_turns(tmp_path):
    path = tmp_path / "dispatch.csv"
    assert main(["dispatch", "--norms", "BN", "CBN", *OPTIONS, "--out", str(path)]) == 0
    batchnorm, cbn = written(path)
    assert batchnorm["norm"] == "BN" and float(batchnorm["ratio to BN"]) == 1.0
    assert 1.0 < float(cbn["ratio to BN"]) <= float(cbn["ratio to BN high"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["layer", "--norms", "BN"], "--norms: name two or more"),
        (["layer", "--norms", "BN", "CBN", "BN"], "--norms: name two or more, each once"),
        (
            ["layer", "--norms", "BN", "GN", "--repetitions", "5"],
            "argument --repetitions: expected 6",
        ),
        (
            ["layer", "--norms", "BN", "GN", "--warm-up", "0"],
            "argument --warm-up: expected 1 or more",
        ),
        (["layer", "--norms", "BN", "GN", "--shapes", "1,2,3"], "--shapes 1,2,3: expected N,C,H,W"),
        (["layer", "--norms", "BN", "GN", "--shapes", "1,2,3,4,5,x"], "--shapes 1,2,3,4,5,x"),
        (
            ["layer", "--norms", "BN", "GN", "--shapes", "1,2,3,4,5,2"],
            "--shapes 1,2,3,4,5,2: the kernel must be odd",
        ),
        (["norm", "--norms", "BN", "GN", "--shapes", "1,2,3"], "--shapes 1,2,3: expected N,C,H,W"),
        (["norm", "--norms", "BN", "GN", "--shapes", "1,0,3,3"], "--shapes 1,0,3,3: expected"),
        (["norm", "--norms", "copy", "BN"], "--norms copy"),
        (["iteration", "--norms", "BN", "GN", "--opts", "SEED"], "--opts takes KEY VALUE"),
        (
            ["iteration", "--norms", "BN", "GN", "--images", "0"],
            "argument --images: expected 1 or more",
        ),
    ],
)
def test_settings_that_cannot_be_followed_name_their_option(capsys, words, message):
    assert f": error: {message}" in refused(capsys, words)


def refused(capsys, words: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_norm_that_cannot_be_built_is_named(tmp_path, capsys):
    words = ["layer", "--norms", "BN", "CNB(window=3)", "--shapes", "1,2,3,3,4,1"]
    error = refused(capsys, [*words, "--out", str(tmp_path / "out.csv")])
    assert "error: CNB(window=3): --norms: unknown norm 'CNB' in 'CNB(window=3)'. Known: " in error
    assert not (tmp_path / "out.csv").exists()


# ---- what is timed ---------------------------------------------------------------------------


def test_a_layer_step_trains_and_does_all_of_a_norms_work():
    work = layer_workload("CBN(window=3)", (2, 4, 6, 5), 8, 3, "cpu")
    conv, norm = work.model
    assert isinstance(norm, CBN2d) and norm.conv is conv
    steps = end_burn_in(work.model) + 2
    before = conv.weight.clone()
    for _ in range(steps):
        work.step()
    assert len(norm.memory) == 2 and not torch.equal(conv.weight, before)
    work = layer_workload("MBN(window=3)", (2, 4, 6, 5), 8, 3, "cpu")
    end_burn_in(work.model)
    staged = []
    work.model[1].register_forward_pre_hook(lambda m, _: staged.append(m._unchanged))
    work.step()
    assert staged == [False, True]  # Double Forward is part of the step
    assert isinstance(layer_workload("GN", (1, 4, 3, 3), 64, 1, "cpu").model[1], torch.nn.GroupNorm)


def test_a_step_of_a_norm_alone_goes_forward_and_back(monkeypatch):
    work = norm_workload("CBN(compensation='none')", (2, 4, 6, 5), "cpu")
    seen = []
    work.model.register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0], dy[0])))
    work.step()
    work.step()
    assert work.model.num_batches_tracked == 2
    (dx, _), (_, dy) = seen
    assert dx.shape == (2, 4, 6, 5) and dx.abs().sum() > 0 and not torch.equal(dx, dy)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: copied.append((to.shape, x.shape)))
    norm_workload("copy", (2, 4, 6, 5), "cpu").step()
    assert copied == [((2, 4, 6, 5), (2, 4, 6, 5))]


def test_a_layer_of_somebody_else_is_timed_like_ours(tmp_path, capsys):
    peers = tmp_path / "peers.py"
    peers.write_text(
        "from torch import nn\n"
        "def theirs(c, out, k):\n"
        "    return nn.Sequential(nn.Conv2d(c, out, k, padding=k // 2), nn.InstanceNorm2d(out))\n"
    )
    work = layer_workload(f"{peers}:theirs", (2, 4, 6, 5), 8, 3, "cpu")
    assert [type(m).__name__ for m in work.model] == ["Conv2d", "InstanceNorm2d"]
    before = work.model[0].weight.clone()
    work.step()
    assert not torch.equal(work.model[0].weight, before)
    words = ["layer", *OPTIONS, "--shapes", "2,4,6,5,8,3", "--norms"]
    assert main([*words, "BN", f"{peers}:theirs"]) == 0
    assert f"{peers}:theirs" in capsys.readouterr().out
    assert f"{peers} defines no 'ours'" in refused(capsys, [*words, "BN", f"{peers}:ours"])


def engines():
    return ["standalone", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.mark.parametrize("engine", engines())
def test_inference_runs_the_deployed_model_on_test_images(inputs, tmp_path, engine):
    config = "tiny.yaml" if engine == "detectron2" else "standalone.yaml"
    keys = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM"]
    outputs, kinds = {}, {}
    for stage in ("trained", "deployed", "folded"):
        words = [word for key in keys for word in (key, "CBN")]
        words += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
        with run_loggers_removed():
            words = arguments(inputs, tmp_path, "--engine", engine, *words, config=config)
            work = inference_workload(stage, words)
        found = []
        work.model.register_forward_hook(lambda m, args, out, to=found: to.append((args[0], out)))
        for _ in range(3):
            work.step()
        assert not work.model.training
        outputs[stage], kinds[stage] = found, {type(m) for m in work.model.modules()}
    assert CBN2d in kinds["trained"] and CBN2d not in kinds["deployed"] | kinds["folded"]
    assert torch.nn.BatchNorm2d in kinds["deployed"] - kinds["folded"]
    first, second = (pixels(batch) for batch, _ in outputs["trained"][:2])
    assert first.shape != second.shape or not torch.equal(first, second)  # one after the other
    pairs = zip(*(outputs[stage] for stage in ("trained", "deployed", "folded")), strict=True)
    for trained, deployed, folded in pairs:
        assert torch.equal(pixels(trained[0]), pixels(deployed[0]))
        assert torch.equal(pixels(trained[0]), pixels(folded[0]))
        assert torch.equal(scores(trained[1]), scores(deployed[1]))
        # an untrained network makes rounding errors larger; how exact folding is, test_deploy says
        torch.testing.assert_close(scores(trained[1]), scores(folded[1]), rtol=1e-2, atol=1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", engines())
def test_inference_is_that_of_the_weights_it_is_given(inputs, tmp_path, engine):
    config = "tiny.yaml" if engine == "detectron2" else "standalone.yaml"
    words = ["--engine", engine, "MODEL.FPN.NORM", "CBN"]
    with run_loggers_removed():
        first = inference_workload("trained", arguments(inputs, tmp_path, *words, config=config))
        state = {key: value + 0.01 for key, value in first.model.state_dict().items()}
        weights = tmp_path / "weights.pth"
        torch.save({"model": state}, weights)
        words += ["MODEL.WEIGHTS", str(weights)]
        work = inference_workload("trained", arguments(inputs, tmp_path, *words, config=config))
    assert not work.model.training
    for key, value in work.model.state_dict().items():
        torch.testing.assert_close(value, state[key].to(value.dtype), rtol=0, atol=0, msg=key)
    work.step()


def scores(output: list) -> torch.Tensor:
    first = output[0]
    return first["instances"].scores if "instances" in first else first["scores"]


def builds_of(*words: str) -> tuple[str, dict[str, partial]]:
    ((title, builds),) = cases(make_parser().parse_args(words)).items()
    return title, builds


def test_inference_knows_what_may_be_done_to_a_norm(capsys):
    norms = ("--norms", "FrozenBN", "folded:CBN(window=8)", "--engine", "standalone")
    _, builds = builds_of("inference", *norms)
    assert {build.func for build in builds.values()} == {inference_workload}
    assert builds["FrozenBN"].args[0] == "trained"
    stage, words = builds["folded:CBN(window=8)"].args
    assert stage == "folded" and words[words.index("MODEL.FPN.NORM") + 1] == "CBN(window=8)"
    error = refused(capsys, ["inference", "--norms", "FrozenBN", "melted:CBN"])
    assert "--norms melted:CBN: before the colon stands trained or" in error


@pytest.mark.parametrize("engine", engines())
def test_an_iteration_trains_and_its_batches_come_again(inputs, tmp_path, engine):
    config = "tiny.yaml" if engine == "detectron2" else "standalone.yaml"
    keys = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM"]
    norms = [word for key in keys for word in (key, "MBN(window=2)")]
    words = arguments(inputs, tmp_path, "--engine", engine, *norms, config=config)
    with run_loggers_removed():
        work = iteration_workload(words)
        layers = [m for m in work.model.modules() if isinstance(m, MBN2d)]
        assert layers and end_burn_in(work.model) == 2
        images, second = [], []

        def note(model, args):
            images.append(pixels(args[0]))
            second.append(layers[0]._unchanged)

        work.model.register_forward_pre_hook(note)
        weight = next(p for p in work.model.parameters() if p.requires_grad and p.dim() == 4)
        before = weight.detach().clone()
        for _ in range(BATCHES + 1):
            work.step()
    assert not torch.equal(weight, before)
    assert second == [False, True] * (BATCHES + 1)
    first = images[::2]
    assert torch.equal(first[0], first[BATCHES]) and not torch.equal(first[0], first[1])
    assert not list(tmp_path.iterdir())


def pixels(batch: list) -> torch.Tensor:
    return (batch[0]["image"] if isinstance(batch[0], dict) else batch[0]).float().clone()


def test_iterations_get_each_norm_at_the_sites_of_the_recipe():
    data = ["a", str(REPOSITORY / "README.md"), str(REPOSITORY)]  # that are there
    words = ["iteration", "--norms", "BN", "CBN(window=8)", "--recipe", "finetune"]
    words += ["--engine", "standalone", "--device", "cuda"]
    words += ["--coco-dataset", *data, "--images", "4", "--opts", "MODEL.WEIGHTS", "w.pth"]
    words += ["DATASETS.TRAIN", "('a',)"]
    title, builds = builds_of(*words)
    assert title.endswith("4 images, standalone; norm in FPN, ROI_BOX_HEAD, ROI_MASK_HEAD")
    (words,) = builds["CBN(window=8)"].args
    args: argparse.Namespace = argument_parser().parse_args(words)
    assert builds["CBN(window=8)"].func is iteration_workload
    assert args.config_file.endswith("Finetune-RCNN-R18-FPN-digits.yaml")
    assert args.coco_dataset == [data] and args.engine == "standalone"
    options = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    assert options["SOLVER.IMS_PER_BATCH"] == "4" and options["MODEL.WEIGHTS"] == "w.pth"
    assert options["MODEL.DEVICE"] == "cuda"
    sites = {key for key, value in options.items() if value == "CBN(window=8)"}
    assert sites == {f"MODEL.{part}.NORM" for part in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}


@pytest.mark.detectron2
@pytest.mark.parametrize("images", [2, 8])
def test_a_config_for_several_gpus_is_timed_with_the_images_asked_for(images):
    from cbn_det.plugin.config import build_config

    config = str(REPOSITORY / "configs" / "coco" / "mask_rcnn_R_50_FPN_1x" / "bn_2img.yaml")
    words = ["iteration", "--norms", "BN", "GN", "--config-file", config, "--images", str(images)]
    title, builds = builds_of(*words, "--engine", "detectron2")
    args = argument_parser().parse_args(builds["GN"].args[0])
    args.command = ""
    cfg, _ = build_config(args, world_size=1)
    assert f"{images} images" in title and cfg.SOLVER.IMS_PER_BATCH == images
