"""Rows and tables: what numbers come out of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbn_det.study.plan import Run, Split
from cbn_det.study.results import Row, Spread, make_rows, read_metrics
from cbn_det.study.tables import by_total_batch, text_report


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
    assert by_name["BN", small].recovered == 0.0
    assert round(100 * by_name["BN", small].recovered_precise) == 63
    assert round(100 * by_name["CBN", small].recovered, 1) == 72.5
    assert by_name["CBN", small].recovered_precise is None
    assert by_name["CBN", Split(4, 2)].recovered is None, "there is no BN at 4x2 to compare with"
    assert by_name["CBN", small].to_gn is None, "GN was not trained"
    assert by_name["BN", large].recovered is None, "one rank has the whole batch: nothing is lost"
    assert "73 %" in text_report(rows, [], "t") and "recovered" in text_report(rows, [], "t")


def test_syncbn_is_the_reference_where_it_was_run() -> None:
    split = Split(4, 2)
    results = [("SyncBN", split, 50.0), ("BN", split, 40.0), ("CBN", split, 45.0)]
    rows = make_rows(
        [(n, s, finished(ap)) for n, s, ap in results] + [("BN", Split(1, 8), finished(99.0))]
    )
    assert [row.recovered for row in rows[:3]] == [1.0, 0.0, 0.5]


def test_distance_to_gn_of_the_same_split_or_else_of_the_same_total_batch() -> None:
    small, middle, other = Split(8, 1), Split(4, 2), Split(2, 2)
    results = [("GN", middle, 60.0), ("GN", small, 62.0), ("BN", small, 23.0), ("BN", middle, 38.0)]
    results += [("BN", Split(1, 8), 43.0), ("BN", other, 30.0)]
    rows = make_rows([(norm, split, finished(ap)) for norm, split, ap in results])
    distances = [row.to_gn for row in rows]
    assert distances == [None, None, -39.0, -22.0, -17.0, None]
    assert "-39.0" in text_report(rows, [], "t")


def test_no_share_where_nothing_was_lost() -> None:
    rows = make_rows([("BN", Split(2, 1), finished(40.0)), ("BN", Split(1, 2), finished(39.0))])
    assert [row.recovered for row in rows] == [None, None]


def test_failed_runs_do_not_enter_the_mean() -> None:
    broken = finished(90.0) | {"status": "failed", "message": "disk full"}
    row = make_rows([("GN", Split(1, 2), finished(10.0)), ("GN", Split(1, 2), broken)])[0]
    assert (row.ap["bbox"].mean, row.ap["bbox"].n) == (10.0, 1)
    assert row.status == "1 of 2 finished" and row.reasons == ["failed: disk full"]
    assert "1 of 2 finished; failed: disk full" in text_report([row], [], "t")


def test_different_total_batches_never_share_a_table() -> None:
    rows = make_rows(
        [("BN", Split(1, 2), finished(1.0)), ("BN", Split(1, 8), finished(2.0))]
        + [("BN", Split(4, 2), finished(3.0))]
    )
    assert {total: len(group) for total, group in by_total_batch(rows).items()} == {2: 1, 8: 2}
    text = text_report(rows, [], "t")
    assert text.count("norm ") == 2
    assert "different total batch are not comparable" in text


def test_mask_ap_gets_columns_where_there_is_one() -> None:
    result = finished(10.0)
    result["results"]["segm"] = {"AP": 7.5, "AP50": 9.0}
    text = text_report(make_rows([("GN", Split(1, 2), result)]), [], "t")
    assert "mask AP" in text and "7.5" in text
    row = Row("GN", Split(1, 2), "finished", ap={"bbox": Spread(10.0, None, 1)})
    assert "mask AP" not in text_report([row], [], "t")


def test_metrics_of_a_resumed_run_and_a_half_written_line(tmp_path) -> None:
    lines = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 19, "total_loss": 2.5},
        {"iteration": 19, "bbox/AP": 1.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 59, "tot'
    (tmp_path / "metrics.json").write_text(text)
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [19, 39]
    assert read_metrics(tmp_path)[0] == {"iteration": 19, "total_loss": 2.5, "bbox/AP": 1.0}


def test_a_report_says_what_it_was_made_with(tmp_path: Path) -> None:
    machine = {"cpu": "Z80", "cores": 1, "threads": 1, "gpu": None}
    results = []
    for seed in (1, 2):
        run = Run(f"GN {seed}", tmp_path, (), "s", norm="GN", split=Split(1, 2), seed=seed)
        results.append((run, {"machine": machine, "versions": {"torch": "2"}}))
    row = Row("GN", Split(1, 2), "finished", ap={"bbox": Spread(10.0, 1.0, 2)})
    text = text_report([row], results, "t")
    assert "Made with: seeds 1 2; Z80, 1 cores, 1 threads a process; torch 2." in text


@pytest.mark.parametrize(("length", "short"), [(2400, True), (600, False), (None, False)])
def test_a_short_run_is_called_short(length, short) -> None:
    row = Row("GN", Split(1, 2), "finished", iterations=600)
    text = text_report([row], [], "t", config_iterations=length)
    assert ("Short runs, 600 of the config's 2400 iterations" in text) == short
    assert ("Short runs" in text) == short
