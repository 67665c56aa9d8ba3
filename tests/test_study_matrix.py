"""What the matrix of a comparison asks of the launcher: norms and where they go, images per GPU and
what follows from them, GPUs, and how the processes of a run are started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

import cbn_det
from cbn_det.commands import compare as compare_norms
from cbn_det.study import runner
from cbn_det.study.compare import compare
from cbn_det.study.plan import Plan, Run, Split
from cbn_det.study.runner import Places, visible_gpus

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_launcher.py")))
SCHEDULE = "SOLVER:\n  MAX_ITER: 90000\n  STEPS: (60000, 80000)\n  BASE_LR: 0.02\n"
SCALING = SCHEDULE + "  IMS_PER_BATCH: 16\n  REFERENCE_WORLD_SIZE: 8\n"


def make_plan(tmp_path: Path, norms: list[str], text: str | None = None, **changes) -> Plan:
    if text is not None:
        (tmp_path / "base.yaml").write_text(text)
        changes["config"] = tmp_path / "base.yaml"
    settings = {"splits": [Split(1, 2)], "seeds": [1], "engine": "detectron2"} | changes
    return Plan(tmp_path / "out", norms, launcher=LAUNCHER, **settings)


def options(run: Run) -> dict[str, str]:
    """The KEY VALUE pairs of a run's command line."""
    words = list(run.command)
    first = next(i for i, word in enumerate(words) if word.split(".")[0] in ("MODEL", "SOLVER"))
    return dict(zip(words[first::2], words[first + 1 :: 2], strict=True))


# --- what a run is ---------------------------------------------------------------------------


def test_folders_of_earlier_versions_are_found_again(tmp_path) -> None:
    """The name is spelled out as the first version made it: configs, version, engine, ranks, and
    the options in their order."""
    norms = [w for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD") for w in (key, "MBN")]
    words = [f"MODEL.{w}.NORM" if i % 2 == 0 else w for i, w in enumerate(norms)]
    words = ["--precise-bn-iters", "50", *words, "SOLVER.IMS_PER_BATCH", "8", "SEED", "1"]
    words += ["SOLVER.MAX_ITER", "600", "SOLVER.STEPS", "(480,)", "SOLVER.WARMUP_ITERS", "50"]
    words += ["SOLVER.BASE_LR", "0.04"]
    config = REPOSITORY / "configs" / "quickstart" / "Base-RCNN-R18-FPN-digits.yaml"
    identity = [config.read_text("utf-8"), cbn_det.__version__, "detectron2", "8", *words]
    known = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    settings = {"splits": [Split(8, 1)], "iterations": 600}
    settings["overrides"] = ["SOLVER.BASE_LR", "0.04"]
    run = make_plan(tmp_path, ["MBN"], **settings).runs()[0]
    assert run.folder.name == f"MBN_8x1_seed_1-{known}"
    assert make_plan(tmp_path, ["MBN"], **settings, machines=2).runs()[0].folder == run.folder


def test_a_run_is_known_by_all_that_its_config_builds_on(tmp_path) -> None:
    (tmp_path / "one.yaml").write_text("MODEL: {MASK_ON: True}\n")
    (tmp_path / "two.yaml").write_text("SOLVER: {MAX_ITER: 10}\n")
    plan = make_plan(tmp_path, ["GN"], "_BASE_: [one.yaml, two.yaml]\n")
    before = plan.runs()[0].folder
    (tmp_path / "two.yaml").write_text("SOLVER: {MAX_ITER: 20}\n")
    assert plan.runs()[0].folder != before


def test_a_config_that_is_none_is_a_line_and_no_traceback(tmp_path, capsys) -> None:
    (tmp_path / "base.yaml").write_text("MODEL: [unclosed\n")
    words = ["--config-file", str(tmp_path / "base.yaml"), "--engine", "detectron2"]
    assert compare_norms.main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"compare: {tmp_path / 'base.yaml'}: ") and said.count("\n") == 1


def test_a_norm_named_twice_is_one_row(tmp_path) -> None:
    assert len(make_plan(tmp_path, ["BN", "GN", "BN"]).runs()) == 2


@pytest.mark.parametrize(
    ("key", "instead"),
    [("SOLVER.IMS_PER_BATCH", "--images-per-gpu"), ("SEED", "--seeds"), ("OUTPUT_DIR", "--output")],
)
def test_what_the_matrix_sets_cannot_be_overridden(tmp_path, key, instead) -> None:
    with pytest.raises(ValueError, match=f"{key} is set by {instead}"):
        make_plan(tmp_path, ["GN"], overrides=[key, "4"])


def test_a_run_with_another_batch_than_its_row_is_a_failure(tmp_path, capsys) -> None:
    assert compare(make_plan(tmp_path, ["OTHER", "GN"]), jobs=1) == 1
    printed = capsys.readouterr().out
    assert "failed: trained as 1x4 where 1x2 (processes x images) was asked for" in printed
    assert "GN 1x2 seed 1: finished" in printed


# --- where the norm goes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sites", "expected"),
    [
        ("  RESNETS: {NORM: FrozenBN}\n  FPN: {NORM: GN}\n", None, ["FPN"]),
        ("  RESNETS: {NORM: BN}\n  FPN: {NORM: BN}\n", None, ["RESNETS", "FPN"]),
        ("  ROI_BOX_HEAD: {NORM: ''}\n  RETINANET: {NORM: BN}\n", None, ["RETINANET"]),
        (
            "  RESNETS: {NORM: FrozenBN}\n",
            None,
            ["FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"],
        ),
        ("  FPN: {NORM: GN}\n", ["box_head", "backbone"], ["RESNETS", "ROI_BOX_HEAD"]),
    ],
)
def test_the_norm_goes_where_the_config_has_one_or_where_it_is_told(
    tmp_path, text, sites, expected
) -> None:
    base = "MODEL:\n" + text
    (tmp_path / "base0.yaml").write_text(base)
    plan = make_plan(tmp_path, ["KN"], "_BASE_: base0.yaml\n", sites=sites)
    norms = [key for key, value in options(plan.runs()[0]).items() if value == "KN"]
    assert norms == [f"MODEL.{name}.NORM" for name in expected]


def test_sites_of_a_recipe_and_sites_that_nobody_knows(tmp_path) -> None:
    run = make_plan(tmp_path, ["KN"], sites=["fpn"]).runs()[0]
    assert [key for key, value in options(run).items() if value == "KN"] == ["MODEL.FPN.NORM"]
    with pytest.raises(ValueError, match="site 'neck': known are backbone, fpn"):
        make_plan(tmp_path, ["KN"], sites=["neck"])
    with pytest.raises(ValueError, match="site 'retinanet': known are backbone, fpn, box_head, m"):
        make_plan(tmp_path, ["KN"], sites=["retinanet"], engine="standalone")


def test_the_row_without_a_norm(tmp_path) -> None:
    found = options(make_plan(tmp_path, ["none"]).runs()[0])
    assert found["MODEL.RESNETS.NORM"] == "FrozenBN"
    assert found["MODEL.FPN.NORM"] == found["MODEL.ROI_MASK_HEAD.NORM"] == ""


def test_each_norm_may_have_a_config_of_its_own(tmp_path) -> None:
    for norm in ("none", "gn", "cbn"):
        text = f"_BASE_: base.yaml\nMODEL:\n  FPN: {{NORM: {norm.upper()}}}\n"
        (tmp_path / f"{norm}_2img.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text(SCALING)
    plan = make_plan(
        tmp_path, ["none", "GN", "CBN(window=8)"], config=tmp_path / "{norm}_2img.yaml"
    )
    runs = plan.runs()
    configs = [run.command[run.command.index("--config-file") + 1] for run in runs]
    assert [Path(name).name for name in configs] == [
        "none_2img.yaml",
        "gn_2img.yaml",
        "cbn_2img.yaml",
    ]
    written = [{k: v for k, v in options(run).items() if k.endswith("NORM")} for run in runs]
    assert written == [{}, {}, {"MODEL.FPN.NORM": "CBN(window=8)"}]
    plan.norms.append("KN")
    with pytest.raises(FileNotFoundError, match="kn_2img.yaml"):
        plan.runs()


# --- images per GPU ----------------------------------------------------------------------------


def test_without_a_reference_nothing_but_the_batch_changes(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"], SCHEDULE, splits=[Split(1, 1), Split(4, 2)])
    found = [{k: v for k, v in options(r).items() if k.startswith("SOLVER")} for r in plan.runs()]
    assert found == [{"SOLVER.IMS_PER_BATCH": "1"}, {"SOLVER.IMS_PER_BATCH": "8"}]


def test_images_that_do_not_divide_the_batch_are_refused(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"], SCALING, splits=[Split(8, 3)])
    with pytest.raises(ValueError, match="base.yaml: 3 images per GPU do not divide"):
        plan.runs()


@pytest.mark.detectron2
@pytest.mark.parametrize(("ranks", "images"), [(8, 2), (8, 1), (1, 2), (1, 1), (64, 1), (2, 4)])
def test_rate_and_schedule_follow_as_detectron2_scales_them(tmp_path, ranks, images) -> None:
    """Linear scaling written out, against what detectron2 makes of the command line."""
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer

    run = make_plan(tmp_path, ["GN"], SCALING, splits=[Split(ranks, images)]).runs()[0]
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "base.yaml"))
    cfg.merge_from_list([word for pair in options(run).items() for word in pair])
    cfg = DefaultTrainer.auto_scale_workers(cfg, ranks)
    times = ranks * images / 16
    assert cfg.SOLVER.IMS_PER_BATCH == ranks * images
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.02 * times)
    assert cfg.SOLVER.MAX_ITER == round(90_000 / times)
    assert cfg.SOLVER.STEPS == (round(60_000 / times), round(80_000 / times))
    assert cfg.SOLVER.WARMUP_ITERS == round(1000 / times)


@pytest.mark.detectron2
@pytest.mark.parametrize("norm", ["GN", "none", "CBN"])
def test_the_matrix_over_the_coco_configs_is_what_their_files_say(tmp_path, norm) -> None:
    """One image per GPU asked of the files for two is what the files for one say."""
    from detectron2.config import get_cfg

    folder = REPOSITORY / "configs" / "coco" / "mask_rcnn_R_50_FPN_1x"
    plan = make_plan(tmp_path, [norm], config=folder / "{norm}_2img.yaml", splits=[Split(8, 1)])
    run = plan.runs()[0]
    asked, written = get_cfg(), get_cfg()
    asked.merge_from_file(run.command[run.command.index("--config-file") + 1])
    asked.merge_from_list([word for pair in options(run).items() for word in pair])
    written.merge_from_file(str(folder / f"{norm.lower()}_1img.yaml"))
    asked.OUTPUT_DIR, asked.SEED = written.OUTPUT_DIR, written.SEED
    assert asked.dump() == written.dump()


def test_a_given_length_is_the_length_and_the_rate_still_follows(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN"], SCALING, splits=[Split(2, 1)], iterations=900)
    found = options(plan.runs()[0])
    assert found["SOLVER.REFERENCE_WORLD_SIZE"] == "0"
    assert found["SOLVER.IMS_PER_BATCH"] == "2" and found["SOLVER.MAX_ITER"] == "900"
    assert float(found["SOLVER.BASE_LR"]) == pytest.approx(0.0025)
    assert found["SOLVER.STEPS"] == "(600, 800,)"
    whole = make_plan(tmp_path, ["GN"], SCALING, splits=[Split(800, 1)], iterations=900)
    assert options(whole.runs()[0])["SOLVER.BASE_LR"] == "1.0", "an int would be refused"


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, False),
        ({"iterations": 40}, True),
        ({"overrides": ["SOLVER.MAX_ITER", "40"]}, True),
    ],
)
def test_runs_are_short_where_they_were_made_short(tmp_path, capsys, changes, short) -> None:
    # twice the images of its steps make 40 iterations of it, which the launcher always tells
    text = "SOLVER: {MAX_ITER: 80, IMS_PER_BATCH: 4, REFERENCE_WORLD_SIZE: 4}\n"
    plan = make_plan(tmp_path, ["GN"], text, splits=[Split(8, 1)], **changes)
    assert compare(plan, jobs=8) == 0
    said = [capsys.readouterr().out]
    said += [(plan.output / name).read_text() for name in ("table.md", "report.html")]
    for text in said:
        assert ("Short runs, 40 of the config" in text) == ("Short runs" in text) == short


# --- processes and GPUs ------------------------------------------------------------------------


def test_machines_share_the_ranks(tmp_path) -> None:
    run = make_plan(tmp_path, ["GN"], splits=[Split(16, 1)], machines=2).runs()[0]
    assert run.ranks == 16 and run.command[run.command.index("--num-gpus") + 1] == "8"
    with pytest.raises(ValueError, match="split 9x1: 2 machines cannot share that"):
        make_plan(tmp_path, ["GN"], splits=[Split(9, 1)], machines=2)


def test_gpus_are_shared_out_one_a_process() -> None:
    four = Places(4, ["0", "1", "2", "3"])
    first, second = four.take(2), four.take(2)
    assert sorted(first + second) == ["0", "1", "2", "3"] and four.take(1) is None
    four.give_back(first)
    assert four.take(2) == first
    shared = Places(4, ["0", "1"])  # more processes than GPUs: a run's own are different ones
    assert shared.take(2) == ["0", "1"] and sorted(shared.take(2)) == ["0", "1"]
    again = Places(4, ["0", "1"])
    single = [again.take(1) for _ in range(4)]
    for place in (0, 2, 1):  # so that two places of GPU 0 come first
        again.give_back(single[place])
    assert sorted(again.take(2)) == ["0", "1"]
    assert set(Places(1, ["GPU-5e"]).take(8)) == {"GPU-5e"}


@pytest.mark.parametrize("places", [1, 2, 7])
def test_a_run_with_more_ranks_than_places_has_a_gpu_for_each(places) -> None:
    eight = Places(places, list("01234567"))
    wide = eight.take(8)
    assert wide == list("01234567") and eight.take(1) is None, "it runs alone"
    eight.give_back(wide)
    assert [eight.take(1) for _ in range(places)] == [[name] for name in "01234567"[:places]]
    assert eight.take(1) is None, "its GPUs are no places for others"
    assert eight.take(8) is None


def test_a_run_sees_its_gpus_only(tmp_path) -> None:
    plan = make_plan(tmp_path, ["GN", "BN"], splits=[Split(2, 2)])
    assert compare(plan, jobs=4, gpus=["4", "5", "6", "7"]) == 0
    results = [json.loads((run.folder / "result.json").read_text()) for run in plan.runs()]
    assert sorted(result["gpus"] for result in results) == ["4,5", "6,7"]


def test_a_run_sees_as_many_gpus_as_it_has_ranks_at_one_job(tmp_path, capsys) -> None:
    plan = make_plan(tmp_path, ["GN", "BN"], splits=[Split(4, 2)])
    assert compare(plan, jobs=1, gpus=["4", "5", "6", "7"]) == 0
    results = [json.loads((run.folder / "result.json").read_text()) for run in plan.runs()]
    assert [result["gpus"] for result in results] == ["4,5,6,7"] * 2
    assert "2 runs, up to 1 at a time on GPU 4 5 6 7" in " ".join(capsys.readouterr().out.split())


def test_gpus_are_left_alone_where_none_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    plan = make_plan(tmp_path, ["GN"])
    compare(plan, jobs=1)
    assert json.loads((plan.runs()[0].folder / "result.json").read_text())["gpus"] == "3"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [("{}", [], True), ("MODEL: {DEVICE: cpu}", [], False)]
    + [("{}", ["MODEL.DEVICE", "cpu"], False), (None, [], False)],
)
def test_whether_runs_want_a_gpu_is_the_configs_to_say(tmp_path, text, overrides, expected) -> None:
    assert make_plan(tmp_path, ["GN"], text, overrides=overrides).on_gpu is expected


def test_gpus_of_this_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, MIG-7f,-1")
    assert visible_gpus() == ["2", "MIG-7f"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    assert visible_gpus() == []


# --- the tool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--split 4x2 --num-gpus 4", "leave out --num-gpus"),
        ("--num-machines 2", "--submit slurm"),
        ("--sbatch gpu", "KEY=VALUE"),
        ("--images-per-gpu 0", "1 or more"),
        ("--opts SEED", "KEY VALUE"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, words, expected) -> None:
    with contextlib.suppress(SystemExit):  # of argparse
        assert compare_norms.main([*words.split(), "--engine", "detectron2"]) == 2
    assert expected in capsys.readouterr().err


def test_the_tool_plans_the_whole_matrix(tmp_path, capsys) -> None:
    words = "--norms none KN --images-per-gpu 1 2 --seeds 1 2 --num-gpus 4 --engine detectron2 "
    assert compare_norms.main([*words.split(), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert sum("SOLVER.IMS_PER_BATCH 4 " in line for line in lines) == 4
    assert all("--num-gpus 4 " in line for line in lines)
