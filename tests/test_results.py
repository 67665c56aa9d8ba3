"""Rows and tables: what numbers come out of run folders."""

from __future__ import annotations

import json

import pytest

from cbn_det.study.plan import Split
from cbn_det.study.results import Spread, make_rows, read_lines
from cbn_det.study.tables import make_tables, of_classes, text_report


def finished(ap: float | None, precise: float | None = None) -> dict:
    return {
        "status": "finished",
        "results": {"bbox": {"AP": ap, "AP50": ap}},
        "results_precise_bn": {"bbox": {"AP": precise}} if precise is not None else None,
    }


def test_spread_is_the_sample_standard_deviation() -> None:
    spread = Spread.of([43.0, None, 43.8])
    assert (spread.mean, spread.n) == (pytest.approx(43.4), 2)
    assert spread.std == pytest.approx(0.4 * 2**0.5)
    assert Spread.of([5.0]).std is None
    assert Spread.of([None]) is None


def test_recovered_share_reproduces_the_published_control() -> None:
    """BN 8x1: 23.0 (PreciseBN 35.8); 1x8: 43.0 and 43.8; CBN 8x1: 37.8 -> 63 % and 72.5 %."""
    small, large = Split(8, 1), Split(1, 8)
    rows = make_rows(
        [
            ("BN", large, finished(43.0)),
            ("BN", large, finished(43.8)),
            ("BN", small, finished(23.0, 35.8)),
            ("CBN", small, finished(37.8)),
            ("CBN", Split(4, 2), finished(40.0)),
        ]
    )
    by_name = {(row.norm, row.split): row for row in rows}
    gains = {key: row.gains["bbox"] for key, row in by_name.items()}
    assert gains["BN", small]["recovered"] == 0.0
    assert round(100 * gains["BN", small]["recovered, PreciseBN"]) == 63
    assert round(100 * gains["CBN", small]["recovered"], 1) == 72.5
    assert gains["CBN", small].keys() == {"recovered"}, "neither PreciseBN, GN nor SyncBN"
    assert gains["CBN", Split(4, 2)] == {}, "there is no BN at 4x2 to compare with"
    assert gains["BN", large] == {}, "one rank has the whole batch: nothing is lost"
    assert "AP - SyncBN" not in text_report(rows, [], "t", [1])
    assert "73 %" in text_report(rows, [], "t", [1]) and "recovered" in text_report(
        rows, [], "t", [1]
    )


def test_syncbn_is_the_reference_where_it_was_run() -> None:
    split = Split(4, 2)
    results = [("SyncBN", split, 50.0), ("BN", split, 40.0), ("CBN", split, 45.0)]
    rows = make_rows(
        [(n, s, finished(ap)) for n, s, ap in results] + [("BN", Split(1, 8), finished(99.0))]
    )
    gains = [row.gains["bbox"] for row in rows]
    assert [gain["recovered"] for gain in gains[:3]] == [1.0, 0.0, 0.5]
    assert [gain.get("AP - SyncBN") for gain in gains] == [None, -10.0, -5.0, None]
    text = text_report(rows, [], "t", [1])
    assert "-5.0" in text and "AP - SyncBN" in text and "AP - GN" not in text


def test_mask_ap_has_distances_of_its_own() -> None:
    rows = []
    for norm, box, mask in (("GN", 40.0, 36.0), ("SyncBN", 38.0, 35.0), ("CBN", 39.0, 32.0)):
        result = finished(box)
        result["results"]["segm"] = {"AP": mask}
        rows.append((norm, Split(8, 2), result))
    rows = make_rows(rows)
    assert rows[2].gains["bbox"] == {"AP - SyncBN": 1.0, "AP - GN": -1.0}
    assert rows[2].gains["segm"] == {"AP - SyncBN": -3.0, "AP - GN": -4.0}
    assert [rows[0].gains[task] for task in ("bbox", "segm")] == [
        {"AP - SyncBN": 2.0},
        {"AP - SyncBN": 1.0},
    ]


def test_ap_of_each_class_is_over_seeds_and_of_each_split() -> None:
    """0 where a run detected nothing of anything, "-" for a class without objects."""

    def of(cat: float, dog: float | None, task: str = "bbox") -> dict:
        result = finished(20.0)
        result["results"].setdefault(task, {"AP": 1.0}).update({"AP-cat": cat, "AP-dog": dog})
        return result

    one, two = Split(1, 2), Split(1, 4)
    nothing = finished(0.0) | {"results": {"bbox": {"AP": None}}}
    entries = [("GN", one, of(10.0, 2.0)), ("GN", one, of(20.0, None)), ("BN", one, nothing)]
    tables = of_classes(make_rows([*entries, ("GN", two, of(7.0, 8.0))]))
    assert [table.lines for table in tables] == [
        [
            {"class": "cat", "GN": "15.0 ± 7.1", "BN": "0.0"},
            {"class": "dog", "GN": "1.0 ± 1.4", "BN": "0.0"},
        ],
        [{"class": "cat", "GN": "7.0"}, {"class": "dog", "GN": "8.0"}],
    ]
    (masks,) = of_classes(make_rows([("GN", one, of(9.0, None, "segm"))]))
    assert masks.lines == [{"class": "cat", "GN": "9.0"}, {"class": "dog", "GN": "-"}]
    assert "mask AP of each class" in masks.heading
    assert of_classes(make_rows([("GN", one, finished(3.0))])) == []


def test_every_number_of_a_result_has_its_place() -> None:
    """The oracle is the result itself: all its numbers differ, and each is under its own name."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    result = {
        "status": "finished",
        "results": {
            "bbox": {name: 10.0 + place for place, name in enumerate(names)},
            "segm": {name: 20.0 + place for place, name in enumerate(names)},
        },
        "sec_per_iter": 0.125,
        "peak_memory_mb": 777.0,
        "parameters": 44_300_000,
        "flops": 201_000_000_000,
        "iterations": 90,
    }
    box, mask, cost = make_tables(make_rows([("GN", Split(8, 2), result)]))
    assert [box.lines[0][name] for name in names] == [
        "10.0",
        "11.0",
        "12.0",
        "13.0",
        "14.0",
        "15.0",
    ]
    assert [mask.lines[0][f"mask {name}"] for name in names] == [f"{20 + i}.0" for i in range(6)]
    assert list(cost.lines[0].values()) == ["GN", "0.125", "777", "44.30", "201.00"]
    assert box.heading == "Total SGD batch 16 (world size 8, 2 images per GPU), 90 iterations"


def test_a_run_that_detects_nothing_counts_as_zero() -> None:
    """detectron2 has NaN for it, and no masks at all; pycocotools would say 0."""
    split = Split(8, 1)
    good = finished(21.0, precise=24.0)
    good["results"]["segm"] = {"AP": 18.0}
    good["results"]["bbox"]["APl"] = None  # no object is large
    blind = {
        "status": "finished",
        "results": {"bbox": {"AP": None, "AP50": None, "APl": None}},
        "results_precise_bn": {"bbox": {"AP": None}},
    }
    row, unevaluated = make_rows(
        [
            ("BN", split, good),
            ("BN", split, blind),
            ("BN", split, {"status": "diverged", "results": {}}),
            ("GN", split, {"status": "finished", "results": {}}),
        ]
    )
    assert (row.ap().mean, row.ap().n) == (10.5, 2)
    assert row.ap("bbox", "AP50").mean == 10.5 and row.ap("segm").mean == 9.0
    assert row.ap("bbox", "AP, PreciseBN").mean == 12.0
    assert row.ap("bbox", "APl") is None and row.ap("bbox", "AP, image share") is None
    assert unevaluated.ap() is None
    alone = make_rows([("BN", split, blind)])[0]
    assert alone.ap() is None, "nobody says that there was anything to detect"


@pytest.mark.parametrize("source", ["results_precise_bn", "results_image_share"])
def test_any_evaluation_shows_that_there_was_something_to_detect(source) -> None:
    blind = {"bbox": {"AP": None}}
    one, other = ({"status": "finished", "results": blind, source: blind} for _ in range(2))
    one[source] = {"bbox": {"AP": 20.0}}
    row, other_row = make_rows([(norm, Split(8, 1), r) for norm, r in (("BN", one), ("GN", other))])
    both = make_rows([("BN", Split(8, 1), one), ("BN", Split(8, 1), other)])[0]
    column = "AP, PreciseBN" if source == "results_precise_bn" else "AP, image share"
    found, plain = both.ap("bbox", column), both.ap()
    assert (found.mean, found.n) == (10.0, 2)
    assert (plain.mean, plain.n) == (0.0, 2)
    assert row.ap().mean == other_row.ap().mean == 0.0, "of the whole table"
    assert both.ap("segm") is None


def test_distance_to_gn_of_the_same_split_or_else_of_the_same_total_batch() -> None:
    small, middle, other = Split(8, 1), Split(4, 2), Split(2, 2)
    results = [("GN", middle, 60.0), ("GN", small, 62.0), ("BN", small, 23.0), ("BN", middle, 38.0)]
    results += [("BN", Split(1, 8), 43.0), ("BN", other, 30.0)]
    rows = make_rows([(norm, split, finished(ap)) for norm, split, ap in results])
    distances = [row.gains["bbox"].get("AP - GN") for row in rows]
    assert distances == [None, None, -39.0, -22.0, -17.0, None]
    assert "-39.0" in text_report(rows, [], "t", [1])


def test_no_share_of_a_loss_within_the_spread() -> None:
    """BN at 39 ± 1.4: 1 AP below SyncBN is noise, 10 AP are not."""
    for above, known in ((1.0, False), (10.0, True)):
        results = [("BN", ap) for ap in (38.0, 40.0)] + [("SyncBN", 39.0 + above), ("KN", 39.5)]
        rows = make_rows([(norm, Split(8, 1), finished(ap)) for norm, ap in results])
        assert ("recovered" in rows[2].gains["bbox"]) == known


def test_no_share_where_nothing_was_lost() -> None:
    rows = make_rows([("BN", Split(2, 1), finished(40.0)), ("BN", Split(1, 2), finished(39.0))])
    assert [row.gains["bbox"] for row in rows] == [{}, {}]


def test_failed_runs_do_not_enter_the_mean() -> None:
    broken = finished(90.0) | {"status": "failed", "message": "disk full"}
    row = make_rows([("GN", Split(1, 2), finished(10.0)), ("GN", Split(1, 2), broken)])[0]
    assert (row.ap().mean, row.ap().n) == (10.0, 1)
    assert row.status == "1 of 2 finished" and row.reasons == ["failed: disk full"]
    assert "1 of 2 finished; failed: disk full" in text_report([row], [], "t", [1])


def test_different_world_sizes_and_total_batches_never_share_a_table_or_a_column() -> None:
    """Each run's AP names its split, so a table tells whose numbers it holds."""
    aps = {Split(1, 2): 12.0, Split(1, 8): 18.0, Split(4, 2): 42.0, Split(8, 1): 81.0}
    rows = make_rows(
        [(norm, split, finished(ap)) for norm in ("BN", "GN") for split, ap in aps.items()]
    )
    first, *others = make_tables(rows)
    columns = [[line[name] for line in first.lines] for name in first.lines[0] if name != "norm"]
    assert columns == [["12.0"] * 2, ["18.0"] * 2, ["42.0"] * 2, ["81.0"] * 2]
    assert list(first.lines[0]) == ["norm", "AP, 1 x 2", "AP, 1 x 8", "AP, 4 x 2", "AP, 8 x 1"]
    accuracy = [table for table in others if "AP" in table.lines[0]]
    assert [[line["AP"] for line in table.lines] for table in accuracy] == columns
    assert len({table.heading for table in others}) == len(others) == 4
    assert "not comparable with each other" in text_report(rows, [], "t", [1])


def test_a_norm_that_was_not_run_at_a_split_leaves_its_cell_empty() -> None:
    results = [("CBN", Split(8, 1), finished(37.0)), ("BN", Split(1, 8), finished(43.0))]
    results.append(("CBN", Split(4, 2), {"status": "diverged", "message": "nan"}))
    lines = make_tables(make_rows(results))[0].lines
    assert [list(line.values()) for line in lines] == [
        ["CBN", "", "-", "37.0"],
        ["BN", "43.0", "", ""],
    ]


def test_mask_ap_gets_columns_where_there_is_one() -> None:
    result = finished(10.0)
    result["results"]["segm"] = {"AP": 7.5, "AP50": 9.0}
    text = text_report(make_rows([("GN", Split(1, 2), result)]), [], "t", [1])
    assert "mask AP" in text and "7.5" in text
    rows = make_rows([("GN", Split(1, 2), finished(10.0))])
    assert "mask AP" not in text_report(rows, [], "t", [1])


def test_metrics_of_a_resumed_run_and_a_half_written_line(tmp_path) -> None:
    lines = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 19, "total_loss": 2.5},
        {"iteration": 19, "bbox/AP": 1.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 59, "tot'
    (tmp_path / "metrics.json").write_text(text)
    found = read_lines(tmp_path / "metrics.json")
    assert [line["iteration"] for line in found] == [19, 39]
    assert found[0] == {"iteration": 19, "total_loss": 2.5, "bbox/AP": 1.0}
    assert read_lines(tmp_path / "of a run that has not begun") == []


def test_a_report_says_what_it_was_made_with() -> None:
    machine = {"cpu": "Z80", "cores": 1, "threads": 1, "gpu": None}
    results = 2 * [{"machine": machine, "versions": {"torch": "2"}}]
    rows = make_rows([("GN", Split(1, 2), finished(10.0))])
    text = text_report(rows, results, "t", [2, 1])
    assert "Made with: seeds 1 2; Z80, 1 cores, 1 threads a process; torch 2." in text


@pytest.mark.parametrize(("length", "short"), [(2400, True), (600, False), (None, False)])
def test_a_short_run_is_called_short(length, short) -> None:
    rows = make_rows([("GN", Split(1, 2), finished(10.0) | {"iterations": 600})])
    text = text_report(rows, [], "t", [1], config_iterations=length)
    assert ("Short runs, 600 of the config's 2400 iterations" in text) == short
    assert ("Short runs" in text) == short


def test_a_column_without_any_number_is_left_out() -> None:
    """Of a table, not of a row: "-" stands where another row has a number."""
    rows = make_rows([("GN", Split(1, 2), finished(4.0)), ("BN", Split(1, 2), finished(3.0, 5.0))])
    (table,) = make_tables(rows)
    columns = ["norm", "AP", "AP50", "AP, PreciseBN", "AP - GN", "status"]
    assert [list(line) for line in table.lines] == [columns, columns]
    assert [line["AP, PreciseBN"] for line in table.lines] == ["-", "5.0"]
    (empty,) = make_tables(make_rows([("GN", Split(1, 2), {"status": "failed"})]))
    assert list(empty.lines[0].values()) == ["GN", "-", "0 of 1 finished"]
