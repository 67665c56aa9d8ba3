"""Published tables beside what was measured, with a launcher that only pretends to train."""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cbn_det.study.published import CHECKS, SOURCES, TABLES
from cbn_det.study.reproduce import COCO_TABLES as CONFIGS
from cbn_det.study.reproduce import Reproduction
from cbn_det.study.reproduce_report import (
    checks_text,
    differences,
    document,
    overview,
    table_text,
)

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, str(Path(__file__).with_name("fake_row_launcher.py")))
FASTER, MASK = "faster_rcnn_R_50_FPN_1x_cbn_authors", "mask_rcnn_R_50_FPN_1x_cbn_authors"


def load_tool():
    from cbn_det.commands import reproduce

    return reproduce


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Runs the tool in this process, its runs with the pretended launcher, below tmp_path/out."""
    loaded = load_tool()
    pretend = functools.partial(Reproduction, launcher=LAUNCHER)
    monkeypatch.setattr(loaded, "Reproduction", pretend)

    def run(*arguments: str) -> int:
        return loaded.main([*arguments, "--output", str(tmp_path / "out")])

    return run


def cells(text: str, title: str) -> dict[str, list[str]]:
    """The lines of the first table in `text` with a column `title`, by their first cell."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if title in line)
    found = {}
    for line in lines[start + 2 :]:
        if not line:
            break
        first, *rest = re.split(r"\s{2,}", line.strip())
        found[first] = rest
    return found


# --- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_number_says_where_it_was_read_and_can_be_an_ap(table) -> None:
    for published in (*table.published.values(), *table.elsewhere):
        assert published.source.name and published.place
        # an address that cannot change: it names a commit, or a paper
        addresses = r"https://(github\.com/\S+/[0-9a-f]{40}/\S+|arxiv\.org/abs/\d{4}\.\d{5})"
        assert re.fullmatch(addresses, published.source.url)
        for values in published.values.values():
            assert set(values) <= {"AP", "AP50", "AP75"}
            assert 20 < values["AP"] < 50
            assert values["AP"] < values.get("AP75", 99) < values.get("AP50", 100)
        if "segm" in published.values:  # a box is easier than a mask, in each of these papers
            assert published.values["segm"]["AP"] < published.values["bbox"]["AP"]
    assert all(entry.what and entry.remark for entry in table.elsewhere)


def test_every_table_is_a_folder_of_configs_and_every_published_row_a_config() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if any(path.glob("*_*img.yaml"))}
    assert set(TABLES) == folders
    for table in TABLES.values():
        names = {path.stem for path in (CONFIGS / table.name).glob("*.yaml")}
        assert set(table.published) <= names
        detector = "Mask" if "mask" in table.name else "Faster"
        depth, schedule = table.name.split("_")[3], table.name.split("_")[5]
        assert table.title.startswith(f"{detector} R-CNN R{depth}-FPN, {schedule}")
        for published in table.published.values():
            assert ("segm" in published.values) == (detector == "Mask")


def test_other_heads_are_no_rows() -> None:
    """detectron2's FrozenBN rows have a 2fc head; every config here has 4conv1fc."""
    for table in TABLES.values():
        for row in Reproduction(Path("out")).rows(table):
            head = row.settings["MODEL"]["ROI_BOX_HEAD"]
            assert (head["NUM_CONV"], head["NUM_FC"]) == (4, 1)
            assert (
                row.norm != "none"
                or row.published is None
                or row.published.source in (SOURCES["CBN"], SOURCES["CBN_PAPER"])
            )
        for entry in table.elsewhere:
            if entry.source is SOURCES["ZOO"]:
                assert "another head (2fc)" in entry.remark


def published(table: str, task: str, metric: str = "AP") -> dict[str, float]:
    return {name: p.values[task][metric] for name, p in TABLES[table].published.items()}


def test_the_gain_of_cbn_that_its_authors_print() -> None:
    """Worked out by hand from the README's table."""
    box = differences(published(MASK, "bbox"), "none")
    mask = differences(published(MASK, "segm"), "none")
    assert box["cbn_4img"] == pytest.approx(0.8) and mask["cbn_4img"] == pytest.approx(0.7)
    assert differences(published(MASK, "segm"), "gn")["syncbn_4img"] == pytest.approx(-0.7)
    assert "none_4img" not in box
    strict = differences(published(MASK, "bbox", "AP75"), "none")
    assert strict["cbn_4img"] == pytest.approx(1.2)


def test_differences_stay_within_the_same_images_per_gpu() -> None:
    values = {"gn_1img": 30.0, "cbn_1img": 31.0, "gn_2img": 40.0, "cbn_2img": None}
    assert differences(values, "gn") == {"cbn_1img": 1.0}
    assert differences(values, "none") == {}


def test_what_the_paper_prints_of_the_norm_everywhere_and_of_bn_in_the_head() -> None:
    """Read in Tables 5 and 6."""
    everywhere = published("faster_rcnn_R_50_FPN_1x_cbn_authors_everywhere", "bbox")
    assert differences(everywhere, "bn") == pytest.approx(
        {"syncbn_4img": 2.4, "gn_4img": 2.3, "cbn_4img": 2.2}
    )
    heads = published(FASTER, "bbox")
    assert (heads["bn_4img"], heads["brn_4img"]) == (36.3, 37.4)
    deep = published("mask_rcnn_R_101_FPN_1x_cbn_authors", "segm")
    assert deep == {"syncbn_4img": 36.0, "gn_4img": 36.6, "cbn_4img": 35.8}


def test_what_is_known_only_from_a_figure_is_no_published_number() -> None:
    for table in (FASTER, MASK):
        rows = {path.stem for path in (CONFIGS / table).iterdir()}
        assert {"cbn_naive_4img", "cbn_as_released_4img"} <= rows - TABLES[table].published.keys()


def test_only_tables_without_a_published_row_say_that_there_is_none() -> None:
    for table in TABLES.values():
        claims = [remark for remark in table.remarks if "No published numbers" in remark]
        assert not (claims and table.published), table.name


# --- what a row runs ---------------------------------------------------------------------------


def options(command: tuple[str, ...]) -> dict[str, str]:
    words = list(command[len(LAUNCHER) :])
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "gpus", "machines", "want"),
    [
        ("cbn_1img", None, 1, ("16", None)),
        ("cbn_1img", 8, 2, ("8", None)),
        ("cbn_1img", None, 2, ("8", None)),
        ("cbn_1img", 1, 1, ("1", "16")),
        ("cbn_2img", 2, 2, ("2", "2")),
    ],
)
def test_gpus_machines_and_accumulation_keep_the_total_batch(name, gpus, machines, want) -> None:
    reproduction = Reproduction(Path("out"), gpus=gpus, machines=machines, launcher=LAUNCHER)
    (row,) = reproduction.rows(TABLES["mask_rcnn_R_50_FPN_1x"], [name])
    run = reproduction.run(row, seed=3)
    found = options(run.command)
    assert (found["--num-gpus"], found.get("--accumulate")) == want
    steps = int(found["--num-gpus"]) * machines * int(found.get("--accumulate", 1))
    assert steps * row.images == 16
    assert run.ranks == int(found["--num-gpus"]) * machines
    assert found["SEED"] == "3" and found["OUTPUT_DIR"] == str(run.folder)
    assert found["--config-file"] == str(row.config) and row.config.exists()


def test_gpus_that_cannot_share_a_step() -> None:
    for gpus, machines in ((3, 1), (32, 1), (None, 64), (None, 3)):
        reproduction = Reproduction(Path("out"), gpus=gpus, machines=machines)
        row = reproduction.rows(TABLES[FASTER], ["cbn_4img"])[0]
        with pytest.raises(ValueError, match="choose 1, 2, 4 in all"):
            reproduction.run(row, 1)


def test_a_config_that_does_not_say_its_gpus(tmp_path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / FASTER / "cbn_4img.yaml"
    path.write_text(path.read_text().replace("REFERENCE_WORLD_SIZE: 4", ""))
    with pytest.raises(ValueError, match="cbn_4img.yaml: SOLVER.REFERENCE_WORLD_SIZE is missing"):
        Reproduction(Path("out"), configs=tmp_path / "configs").rows(TABLES[FASTER])


def test_rows_that_are_others_on_fewer_gpus() -> None:
    reproduction = Reproduction(Path("out"), gpus=2)
    names = ["syncbn_2img", "bn_2img", "mbn_2img"]
    rows = reproduction.rows(TABLES["faster_rcnn_R_50_FPN_1x"], names)
    bn, sync, mbn = (reproduction.departures(row) for row in rows)
    assert bn == []
    assert mbn == ["mbn_2img: on 2 GPUs a remembered step is of 4 mini-batches, in the row 1"]
    assert sync == ["syncbn_2img: on 2 GPUs SyncBN normalises over 4 images, in the row over 16"]
    full = Reproduction(Path("out"))
    assert full.departures(rows[1]) == full.departures(rows[2]) == []


def test_rows_by_name_and_norm_in_order() -> None:
    reproduction = Reproduction(Path("out"))
    table = TABLES["faster_rcnn_R_50_FPN_1x"]
    names = [row.name for row in reproduction.rows(table)]
    assert names[:5] == ["none_1img", "bn_1img", "syncbn_1img", "gn_1img", "brn_1img"]
    assert names[10:12] == ["none_2img", "bn_2img"] and len(names) == 20
    chosen = reproduction.rows(table, ["cbn", "gn_2img"])
    assert [row.name for row in chosen] == ["cbn_1img", "gn_2img", "cbn_2img"]
    with pytest.raises(ValueError, match="no row 'xyz'; known are none_1img, bn_1img"):
        reproduction.rows(table, ["xyz"])


def test_what_belongs_to_the_row_cannot_be_changed(tool, capsys) -> None:
    assert tool(FASTER, "--opts", "SOLVER.IMS_PER_BATCH", "2") == 2
    assert "SOLVER.IMS_PER_BATCH belongs to the row" in capsys.readouterr().err


def test_a_row_is_known_by_its_values_not_by_its_text_or_its_gpus(tmp_path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    path = configs / FASTER / "cbn_4img.yaml"

    def folder(**changes) -> str:
        reproduction = Reproduction(tmp_path / "out", configs=configs, **changes)
        (row,) = reproduction.rows(TABLES[FASTER], ["cbn_4img"])
        return reproduction.run(row, 1).folder.name

    first = folder()
    assert first == folder(gpus=1) == folder(precise_bn=0)
    assert len({first, folder(iterations=5), folder(overrides=["MODEL.DEVICE", "cpu"])}) == 3
    assert first != folder(datasets=[["a", "b", "c"]])
    path.write_text("# a comment\n" + path.read_text().replace("OUTPUT_DIR: ", "OUTPUT_DIR: new/"))
    assert folder() == first
    path.write_text(path.read_text().replace("SOLVER: {", "SOLVER: {BASE_LR: 0.01, "))
    assert folder() != first


# --- running and reading -----------------------------------------------------------------------


def test_nothing_has_been_run(tool, tmp_path, capsys) -> None:
    assert tool(FASTER) == 0
    text = capsys.readouterr().out
    rows = cells(text, "published box AP")
    assert rows["cbn_as_released_4img"] == ["(4x4)", "-", "not run yet", *"-----"]
    measured = ["(4x4)", "(37.7)", "not run yet", "-", "-", "(59.0)", "(40.7)"]
    assert rows["cbn_4img"] == [*measured, "CBN paper (CVPR 2021), Table 5"]
    gains = cells(text, "AP - AP of none")
    assert gains["gn_4img"] == ["(+0.9)", "(+1.5)", "(+0.1)", "-"]
    assert (
        SOURCES["CBN_PAPER"].url in text and " ".join(text.split()).count("8 iterations of it") == 1
    )
    assert not (tmp_path / "out").exists(), "to look changes nothing"


def test_rows_are_run_resumed_and_set_beside_the_published(tool, tmp_path, capsys) -> None:
    arguments = (MASK, "--rows", "none", "gn", "cbn_4img", "--num-gpus", "2", "--jobs", "4")
    assert tool(*arguments, "--run", "--seeds", "1", "2") == 0
    text = capsys.readouterr().out
    rows = cells(text, "published box AP")
    # mean of 30 and 31, their sample deviation, published 37.6
    assert rows["none_4img"][:5] == [
        "2x4, 2 accumulated",
        "(37.6)",
        "30.5 ± 0.7",
        "-7.1",
        "31.0 ± 0.7",
    ]
    assert rows["none_4img"][5:7] == ["50.5 (58.5)", "32.5 (41.0)"]
    masks = cells(text, "published mask AP")
    assert masks["gn_4img"][:7] == [
        "2x4, 2 accumulated",
        "(35.0)",
        "28.0 ± 0.7",
        "-7.0",
        "28.5 ± 0.7",
        "48.0 (56.4)",
        "(37.3)",
    ]
    gains = cells(text, "AP - AP of none")
    assert gains["cbn_4img"] == ["+1.0 (+0.8)", "-0.5 (-0.1)"]  # nor BN nor SyncBN are among them
    assert "Measured with: a GPU" in text
    assert tool(*arguments, "--run", "--seeds", "1", "2", "3") == 0
    assert "kept from before" in capsys.readouterr().out
    folders = list((tmp_path / "out" / MASK).glob("*_seed*"))
    assert len(folders) == 9
    assert all((f / "attempts").read_text() == "start\n" for f in folders), "a run was repeated"
    assert tool(MASK) == 0  # whatever it ran on
    assert cells(capsys.readouterr().out, "published box AP")["none_4img"][2] == "31.0 ± 1.0"


def test_a_crashed_and_a_diverged_row_are_rows(tool, capsys) -> None:
    rows = ("none", "syncbn", "cbn_as_released")
    assert tool(FASTER, "--rows", *rows, "--num-gpus", "1", "--run") == 1
    captured = capsys.readouterr()
    assert "syncbn_4img: on 1 GPU SyncBN normalises over 4 images" in captured.err
    found = cells(captured.out, "published box AP")
    assert found["none_4img"][2] == "30.0"
    assert found["syncbn_4img"][2] in ("not finished", "failed")
    assert found["cbn_as_released_4img"][2] == "diverged"
    assert "- cbn_as_released_4img: diverged: loss is nan at fpn_output2" in captured.out


def test_a_changed_row_is_marked_and_does_not_count_as_the_row(tool, capsys) -> None:
    changed = ("--iters", "5", "--opts", "MODEL.DEVICE", "cpu")
    assert tool(FASTER, "--rows", "cbn_4img", "--num-gpus", "1", "--run", *changed) == 0
    text = capsys.readouterr().out
    assert "Changed by --iters 5 MODEL.DEVICE cpu: these are not the table's rows" in text
    assert cells(text, "published box AP")["cbn_4img"][1:4] == ["(37.7)", "31.0", "-"]
    assert tool(FASTER, "--rows", "cbn_4img") == 0
    text = capsys.readouterr().out
    assert "Changed by" not in text
    assert cells(text, "published box AP")["cbn_4img"][2] == "not run yet"


def test_runs_that_are_not_the_row_are_no_measurement(tmp_path) -> None:
    reproduction = Reproduction(tmp_path)
    rows = {row.name: row for row in reproduction.rows(TABLES[FASTER])}
    good = {"status": "finished", "results": {"bbox": {"AP": 37.0}}, "accumulate": 1}
    for name, result in (
        ("cbn_4img", {**good, "images_per_gpu": 2, "world_size": 4}),  # as if edited by hand
        ("gn_4img", {**good, "images_per_gpu": 4, "world_size": 8}),
        ("syncbn_4img", {**good, "images_per_gpu": 4, "world_size": 1, "accumulate": 4}),
        ("cbn_as_released_4img", {**good, "images_per_gpu": 4, "world_size": 2, "accumulate": 2}),
        ("none_4img", {**good, "images_per_gpu": 4, "world_size": 2, "accumulate": 2}),
    ):
        folder = reproduction.run(rows[name], 1).folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
    assert reproduction.measured(TABLES[FASTER])["cbn_4img"].ap("bbox") is None
    text = table_text(reproduction, TABLES[FASTER], list(rows.values()))
    assert "cbn_4img: trained at 2 images per GPU" in text
    assert "gn_4img: on 8 GPUs a step had 32 images, in the row 16" in text
    assert "syncbn_4img: on 1 GPU SyncBN normalises over 4 images, in the row over 16" in text
    remembered = "on 2 GPUs a remembered step is of 2 mini-batches, in the row 1"
    assert f"cbn_as_released_4img: {remembered}" in text
    assert "none_4img: on" not in text


def test_a_seed_that_detects_nothing_counts_as_zero(tmp_path) -> None:
    """Oracle: pycocotools, which says 0 where detectron2 leaves the number out."""
    reproduction = Reproduction(tmp_path)
    rows = {row.name: row for row in reproduction.rows(TABLES[MASK])}
    nothing = {"bbox": {"AP": None}}
    seen = {"bbox": {"AP": 36.0, "APl": None}, "segm": {"AP": 30.0}}
    for name, seed, plain, precise in (
        ("cbn_4img", 1, seen, {"bbox": {"AP": 38.0, "AP75": 40.0}}),
        ("cbn_4img", 2, nothing, nothing),
        ("gn_4img", 1, nothing, None),
        ("none_4img", 1, {}, None),
    ):
        folder = reproduction.run(rows[name], seed).folder
        folder.mkdir(parents=True)
        result = {"status": "finished", "results": plain, "results_precise_bn": precise}
        result |= {"images_per_gpu": 4, "world_size": 4}
        (folder / "result.json").write_text(json.dumps(result))
    known = reproduction.measured(TABLES[MASK])
    cbn, blind = known["cbn_4img"], known["gn_4img"]
    precise = "AP, PreciseBN"
    assert (cbn.ap("bbox").mean, cbn.ap("bbox").n) == (18.0, 2)
    assert (cbn.ap("segm").mean, cbn.ap("segm").n) == (15.0, 2)
    assert (cbn.ap("bbox", precise).mean, cbn.ap("bbox", precise).n) == (19.0, 2)
    assert cbn.ap("bbox", "AP75").mean == 0.0, "PreciseBN found some"
    assert cbn.ap("bbox", "APl") is None, "there is no large object"
    assert blind.ap("bbox").mean == blind.ap("segm").mean == 0.0
    assert blind.ap("bbox", precise) is None and known["none_4img"].ap("bbox") is None
    alone = table_text(reproduction, TABLES[MASK], [rows["gn_4img"]])
    assert cells(alone, "published box AP")["gn_4img"][2] == "0.0", "whichever rows are shown"


# --- what a reproduction has to reach first -----------------------------------------------------


def write_result(
    reproduction: Reproduction, table: str, name: str, seed: int = 1, **result
) -> None:
    (row,) = reproduction.rows(TABLES[table], [name])
    folder = reproduction.run(row, seed).folder
    folder.mkdir(parents=True)
    split = {"images_per_gpu": row.images, "world_size": row.gpus}
    (folder / "result.json").write_text(json.dumps({"status": "finished", **split, **result}))


def aps(box: float, mask: float | None = None) -> dict[str, dict[str, float]]:
    return {"bbox": {"AP": box}} | ({} if mask is None else {"segm": {"AP": mask}})


@pytest.mark.parametrize(
    ("detector", "result", "said"),
    [
        ("faster", {}, ": not run yet"),
        ("faster", {"results_precise_bn": aps(39.0)}, ": passed, box AP 39.0"),
        ("faster", {"results_precise_bn": aps(39.54)}, ": passed, box AP 39.5"),
        ("faster", {"results_precise_bn": aps(38.9)}, ": FAILED, box AP 38.9"),
        ("faster", {"results_precise_bn": aps(39.6)}, ": FAILED, box AP 39.6"),
        ("faster", {"results": aps(39.25)}, ": NOT CHECKED, its runs were not evaluated with"),
        ("faster", {"status": "diverged", "message": "loss is nan"}, ": diverged"),
        (
            "faster",
            {"results_precise_bn": aps(39.2), "world_size": 1, "accumulate": 8},
            ": NOT CHECKED, syncbn_2img: on 1 GPU SyncBN normalises over 2 images",
        ),
        ("mask", {"results_precise_bn": aps(39.8, 36.1)}, ": passed, box AP 39.8, mask AP 36.1"),
        ("mask", {"results_precise_bn": aps(39.8, 35.7)}, ": FAILED, box AP 39.8, mask AP 35.7"),
        ("mask", {"results_precise_bn": aps(39.3, 36.0)}, ": FAILED, box AP 39.3, mask AP 36.0"),
    ],
)
def test_the_check_is_printed_first_and_says_how_it_ended(
    tool, tmp_path, capsys, detector, result, said
) -> None:
    reproduction = Reproduction(tmp_path / "out", launcher=LAUNCHER)
    table = f"{detector}_rcnn_R_50_FPN_1x_everywhere"
    if result:
        write_result(reproduction, table, "syncbn_2img", **{"results": aps(20.0, 20.0)} | result)
    other = f"{detector}_rcnn_R_101_FPN_1x_cbn_authors"
    for words in ([other], [table, "--rows", "syncbn_2img", "--iters", "5"]):
        assert tool(*words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Checks, to pass before any other row is believed")
        (line,) = (line for line in lines if line.startswith(f"- {table} syncbn_2img, box AP"))
        assert said in line
        assert sum("_everywhere syncbn_2img," in line for line in lines) == len(CHECKS)


def test_checks_are_rows_that_are_published_with_precise_bn() -> None:
    for check in CHECKS:
        published = TABLES[check.table].published[check.row]
        assert published.precise_bn
        for task, (ap, within) in check.expected.items():
            assert (
                abs(published.values[task]["AP"] - ap) <= within <= 0.3
            )  # what two groups differ by


def test_numbers_with_precise_bn_are_compared_with_such(tmp_path) -> None:
    reproduction, name = Reproduction(tmp_path), "faster_rcnn_R_50_FPN_1x_everywhere"
    for seed, precise in ((1, 38.0), (2, 39.0)):
        numbers = {"results": aps(20.0), "results_precise_bn": aps(precise)}
        write_result(reproduction, name, "syncbn_2img", seed, **numbers)
    rows = reproduction.rows(TABLES[name], ["syncbn_2img"])
    line = cells(table_text(reproduction, TABLES[name], rows), "published box AP")["syncbn_2img"]
    assert line[1:5] == ["(39.25)", "20.0 ± 0.0", "-0.8", "38.5 ± 0.7"]
    assert "FAILED, box AP 38.5 ± 0.7" in checks_text(reproduction)


def zoo_rows(markdown: str) -> dict[tuple[str, str], list[str]]:
    """{(table, row): the other cells of its line}"""
    found, table = {}, ""
    for line in markdown.splitlines():
        if name := re.fullmatch(r"`(\w+)`", line):
            table = name[1]
        if re.match(r"\| [\w+]+_\dimg ", line):
            row, *others = (cell.strip() for cell in line.strip("|").split("|"))
            found[table, row] = others
    return found


def test_markdown_holds_every_published_row_and_no_machine(tool, tmp_path, capsys) -> None:
    path = tmp_path / "zoo.md"
    assert tool("all", "--markdown", str(path)) == 0
    text = path.read_text()
    published = {(t.name, row) for t in TABLES.values() for row in t.published}
    assert set(zoo_rows(text)) == published and len(published) > 10
    for table in TABLES.values():
        assert f"## {table.title}" in text
        for entry in table.elsewhere:
            assert f"| {entry.what} " in text
    assert "| not run yet" not in text and "so far: 0." in text
    assert text.index("Checks, to pass before") < text.index("## ")
    zoo = SOURCES["ZOO"]
    assert f"[{zoo.name}, line 955]({zoo.url}?plain=1#L955)" in text
    assert str(REPOSITORY) not in text
    # read in the CBN authors' paper, Table 5, and README, line 33
    assert zoo_rows(text)[FASTER, "cbn_4img"][:2] == ["(4x4)", "(37.7)"]
    assert zoo_rows(text)[MASK, "cbn_4img"][:3] == ["(4x4)", "(38.4)", "(34.7)"]


def test_the_zoo_in_the_docs_has_todays_rows_and_numbers(tmp_path) -> None:
    """What was measured since may differ; rows and published numbers may not."""
    text = (REPOSITORY / "docs" / "model_zoo.md").read_text("utf-8")
    command = re.search(r"<!-- written by (.*); do not edit -->", text).group(1)
    assert command == "python tools/reproduce.py all --markdown docs/model_zoo.md"
    fresh = zoo_rows(document(Reproduction(tmp_path), list(TABLES.values()), command))
    assert set(fresh) <= set(zoo_rows(text)), f"run {command}"
    for row, cells_now in fresh.items():
        ours = " ".join(zoo_rows(text)[row])
        assert all(cell in ours for cell in cells_now[1:]), f"{row}: run {command}"


def test_the_zoo_gets_what_is_measured(tmp_path) -> None:
    """A row with a published number, and one without."""
    reproduction = Reproduction(tmp_path)
    one_table = "faster_rcnn_R_50_FPN_1x"
    for table, name, ap in ((FASTER, "cbn_4img", 31.25), (one_table, "mbn_2img", 12.0)):
        row = next(row for row in reproduction.rows(TABLES[table]) if row.name == name)
        folder = reproduction.run(row, 1).folder
        folder.mkdir(parents=True)
        result = {"status": "finished", "images_per_gpu": row.images, "world_size": row.gpus}
        result |= {"results": {"bbox": {"AP": ap}}}
        (folder / "result.json").write_text(json.dumps(result))
    text = document(reproduction, list(TABLES.values()), "python tools/reproduce.py")
    assert "so far: 2." in text
    assert zoo_rows(text)[FASTER, "cbn_4img"][:2] == ["4x4", "31.2 (37.7)"]
    assert zoo_rows(text)[one_table, "mbn_2img"] == ["8x2", "12.0", "-"]


def test_list_and_dry_run_of_every_table(capsys, monkeypatch) -> None:
    tool = load_tool()
    monkeypatch.chdir(REPOSITORY)
    assert tool.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Checks") and text.count("_everywhere syncbn_2img,") == len(CHECKS)
    listed = cells(text, "rows    ")
    assert set(listed) == set(TABLES)
    assert listed[FASTER][:3] == ["8", "6", "0"]
    assert tool.main(["all", "--dry-run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 133
    for command in commands:
        words = shlex.split(command)
        assert words[:5] == ["python", "-m", "cbn_det", "train", "--config-file"]
        assert (REPOSITORY / words[5]).exists()
    assert len({shlex.split(command)[-1] for command in commands}) == 133


@pytest.mark.detectron2
def test_the_launcher_understands_each_command() -> None:
    """Oracle: the launcher's own parser and detectron2's config."""
    from cbn_det.plugin.config import build_config
    from cbn_det.run.arguments import argument_parser

    for name, gpus in (("mask_rcnn_R_50_FPN_1x", 4), ("mask_rcnn_R_50_FPN_9x_scratch", 8)):
        reproduction = Reproduction(Path("out"), gpus=gpus)
        for row in reproduction.rows(TABLES[name], ["gn"]):
            command = reproduction.run(row, 1).command[4:]
            args: argparse.Namespace = argument_parser().parse_args(
                [*command, "MODEL.DEVICE", "cpu"]
            )
            cfg, _ = build_config(args, world_size=gpus)
            own = row.settings["SOLVER"]
            assert cfg.SOLVER.IMS_PER_BATCH == gpus * row.images
            assert cfg.SOLVER.IMS_PER_BATCH * args.accumulate == own["IMS_PER_BATCH"]
            # the total batch is the config's, so that its schedule holds
            assert cfg.SOLVER.BASE_LR == own["BASE_LR"]
            assert cfg.SOLVER.MAX_ITER == own["MAX_ITER"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "TABLE is missing"),
        (["nothing", "--dry-run"], "invalid choice: 'nothing' (choose from "),
        ([FASTER, "--rows", "kn"], "has no row 'kn'"),
        ([FASTER, "--opts", "A"], "KEY VALUE pairs"),
        ([FASTER, "--num-gpus", "0"], "1 or more"),
        ([FASTER, "--num-machines", "2", "--run"], "needs --submit slurm"),
        ([FASTER, "--sbatch", "time"], "KEY=VALUE"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said, source_env, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "reproduce.py"), *arguments],
        env=source_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_overview_counts_what_is_measured(tmp_path) -> None:
    reproduction = Reproduction(tmp_path)
    row = reproduction.rows(TABLES[FASTER], ["gn"])[0]
    folder = reproduction.run(row, 1).folder
    folder.mkdir(parents=True)
    result = {"status": "finished", "images_per_gpu": 4, "world_size": 4, "results": {}}
    (folder / "result.json").write_text(json.dumps(result))
    listed = cells(overview(reproduction, [TABLES[FASTER]]), "published")
    assert listed[FASTER][:3] == ["8", "6", "1"]
    text = document(reproduction, [TABLES[FASTER]], "python tools/reproduce.py")
    assert zoo_rows(text)[FASTER, "gn_4img"][:2] == ["4x4", "no AP (37.8)"]
