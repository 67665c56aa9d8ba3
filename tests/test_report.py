"""report.html: what is in it, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbn_det.run import files
from cbn_det.study.figures import COLOURS, ap_over_images, colours, final_ap, to_svg
from cbn_det.study.plan import Plan, Run, Split
from cbn_det.study.recipes import QUICKSTART
from cbn_det.study.report import MAX_WIDTH, Comparison, picture_strip
from cbn_det.study.results import make_rows
from cbn_det.study.runner import Outcome

ODD = """<b>"X"&'$a$_1"""


class Page(HTMLParser):
    """The visible text of a page, its elements, and everything that points somewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.in_cell = False
        self.rows: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        known = dict(attributes)
        self.links += [v for k, v in known.items() if k in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append((known.get("class") or "", []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(cells for _, cells in self.rows if cells and cells[0] == first)


def write_run(folder: Path, ap: float | None = None, size: tuple[int, int] = (40, 80)) -> None:
    (folder / "pictures").mkdir(parents=True)
    for name in ("000002", "000001"):
        picture = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"{name}.png")
    lines = [{"iteration": i, "total_loss": 2.0 - i / 100} for i in range(19, 100, 20)]
    if ap is not None:
        lines += [{"iteration": i, "bbox/AP": ap * i / 99} for i in (49, 99)]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.json").write_text(text)


def finished(ap: float, **more) -> dict:
    return {
        "status": "finished",
        "message": None,
        "results": {"bbox": {"AP": ap, "AP50": 2 * ap}},
        "dataset": {"train": ["shapes_train"], "test": ["shapes_val"]},
        "iterations": 100,
        "sec_per_iter": 0.25,
        "train_seconds": 185.2,
        "peak_memory_mb": 512.0,
        "parameters": 13_955_202,
        "flops": 3_195_312_384,
        "device": "cpu",
        "machine": {"cpu": "Z80 <8 bit>", "cores": 2, "threads": 1, "gpu": None},
        "versions": {"python": "3.11", "torch": "2.14"},
    } | more


def compared(tmp_path: Path, entries: list[tuple[str, int, dict]], **changes) -> Comparison:
    """A comparison of (norm, seed, result); every run has a folder as a launcher leaves it."""
    norms = list(dict.fromkeys(norm for norm, _, _ in entries))
    settings = {"splits": [Split(1, 2)], "seeds": [1, 2], "engine": "standalone"}
    plan = Plan(tmp_path, norms, iterations=100, **settings | changes)
    outcomes = []
    for place, (norm, seed, result) in enumerate(entries):
        label, folder = f"{norm} 1x2 seed {seed}", tmp_path / "runs" / str(place)
        if result["status"] == "finished":
            write_run(folder, result["results"]["bbox"]["AP"])
        command = ("python", "train_net.py", norm)
        run = Run(label, folder, command, norm=norm, split=Split(1, 2), seed=seed)
        outcomes.append(Outcome(run, result))
    return Comparison(plan, outcomes, "python tools/compare_norms.py --norms GN", seconds=3723.0)


def page_of(comparison: Comparison) -> Page:
    written = comparison.write()
    assert written[-1].name == "report.html"
    return Page(written[-1].read_text(encoding="utf-8"))


def test_the_page_says_what_was_compared_and_what_came_out(tmp_path) -> None:
    entries = [("GN", 1, finished(20.0)), ("GN", 2, finished(22.0)), ("CBN", 1, finished(9.0))]
    page = page_of(compared(tmp_path, entries))
    text = " ".join(page.text.split())
    assert "GN and CBN at 2 images per GPU" in text
    assert "with the standalone engine: recipe “scratch”" in text
    assert "100 iterations, images per GPU: 2, seeds: 1 2." in text
    assert "Trained on shapes_train, evaluated on shapes_val." in text
    assert page.row("GN")[:3] == ["GN", "21.0 ± 1.4", "42.0 ± 2.8"]
    assert "Total SGD batch 2 (world size 1, 2 images per GPU), 100 iterations" in text
    assert "mean ± sample standard deviation" in text
    assert "Short runs, 100 of the config's 2400 iterations" in text
    assert "Z80 <8 bit>, 2 cores" in text and "python 3.11, torch 2.14" in text
    assert "1 h 2 min" in text
    facts = next(c for _, c in page.rows if c[:3] == ["GN", "1x2", "2"])
    assert facts == "GN,1x2,2,22.0,0.250,512,13.96,3.20,3 min 5 s,cpu,finished".split(",")
    assert f"The python of this and every other command is {sys.executable}." in text
    assert text.count("python tools/compare_norms.py --norms GN") == 1, "at its end, not its head"
    assert "To be expected of this recipe" in text
    assert "python train_net.py CBN" in text


def test_a_comparison_that_was_finished_before_says_what_its_training_took(tmp_path) -> None:
    comparison = compared(tmp_path, [("GN", 1, finished(20.0)), ("GN", 2, finished(22.0))])
    assert comparison.wall == "1 h 2 min"
    comparison.reused, comparison.seconds = 1, 0.2
    assert comparison.wall == "0 s"
    comparison.reused = 2
    expected = "all 2 runs were finished before, after 6 min 10 s of training in all"
    assert comparison.wall == expected and expected in page_of(comparison).text
    assert page_of(comparison).text.count("finished before") == 1


def test_ap_of_each_class_is_on_the_page(tmp_path) -> None:
    results = [finished(20.0), finished(10.0)]
    for result, ap in zip(results, (12.5, 3.5), strict=True):
        result["results"]["bbox"]["AP-red cell"] = ap
    page = page_of(compared(tmp_path, [("GN", 1, results[0]), ("CBN", 1, results[1])]))
    assert page.row("class") == ["class", "GN", "CBN"]
    assert page.row("red cell") == ["red cell", "12.5", "3.5"]
    none = page_of(compared(tmp_path / "none", [("GN", 1, finished(20.0))]))
    assert "of each class" not in none.text


@pytest.mark.parametrize(
    "changes",
    [
        {"config": QUICKSTART / "faster_rcnn_R_18_FPN_digits_gn.yaml"},
        {"splits": [Split(1, 4)]},
        {"recipe": "finetune"},
        {"sites": ["fpn"]},
    ],
    ids=["config", "split", "recipe", "sites"],
)
def test_nothing_is_expected_of_what_was_never_measured(tmp_path, changes) -> None:
    page = page_of(compared(tmp_path, [("GN", 1, finished(20.0))], **changes))
    assert "To be expected" not in page.text


def test_pictures_can_be_enlarged(tmp_path) -> None:
    """Without a script: an element that opens and closes by click or key holds each."""
    comparison = compared(tmp_path, [("GN", 1, finished(20.0))])
    page_of(comparison)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    zoomed = r'<details class="zoom"><summary title="enlarge"><img [^>]*></summary></details>'
    assert len(re.findall(zoomed, source)) == source.count("<img ") == 2


def test_the_page_needs_no_script_no_network_and_no_other_file(tmp_path) -> None:
    page = page_of(compared(tmp_path, [("GN", 1, finished(20.0))]))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)


def test_names_and_messages_are_escaped(tmp_path) -> None:
    message = """loss of <Conv2d> & "others" is 'nan'"""
    entries = [(ODD, 1, finished(20.0)), ("GN", 1, {"status": "diverged", "message": message})]
    page = page_of(compared(tmp_path, entries))
    assert "conv2d" not in page.tags and page.tags.count("b") == 1  # the engine's name
    assert page.row(ODD)[0] == ODD
    assert f"{ODD} and GN at 2 images" in page.text
    assert page.row(message) == [message]


def test_runs_that_did_not_finish_are_shown_with_their_message(tmp_path) -> None:
    bad = {"status": "diverged", "message": "loss is nan"}
    entries = [("GN", 1, finished(20.0)), ("BN", 1, bad), ("GN", 2, {"status": "failed"})]
    page = page_of(compared(tmp_path, entries))
    table = [(kind, cells) for kind, cells in page.rows if cells]
    assert ("bad why", ["diverged: loss is nan"]) in table
    assert next(k for k, c in table if c[0] == "BN") == "bad"
    assert page.row("GN")[-1] == "1 of 2 finished"
    assert ("bad why", ["failed: no message"]) in table


def test_nothing_finished_is_a_page_too(tmp_path) -> None:
    page = page_of(compared(tmp_path, [("GN", 1, {"status": "failed", "message": "x"})]))
    assert "svg" not in page.tags and "img" not in page.tags
    assert "0 of 1 finished" in page.text


def test_one_colour_a_norm_everywhere(tmp_path) -> None:
    entries = [("BN", 1, finished(9.0)), ("GN", 1, finished(20.0))]
    page_of(compared(tmp_path, entries))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert colours(["BN", "GN", "BN"]) == {"BN": COLOURS[0], "GN": COLOURS[1]}
    swatches = re.findall(r'background:(#\w+)"></span>(\w+)', source)
    assert set(swatches) == {(COLOURS[0], "BN"), (COLOURS[1], "GN")}
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        assert COLOURS[0].lower() in svg and COLOURS[1].lower() in svg


def test_curves_of_ap_want_evaluations_during_training(tmp_path) -> None:
    comparison = compared(tmp_path, [("GN", 1, finished(20.0))])
    assert "ap_curves.png" in {path.name for path in comparison.write()}
    metrics = comparison.outcomes[0].run.folder / "metrics.json"
    metrics.write_text('{"iteration": 49, "bbox/AP": NaN}\n{"iteration": 99, "bbox/AP": 3.0}\n')
    names = {path.name for path in comparison.write()}
    assert "ap_curves.png" not in names and "ap.png" in names


def test_figures_take_the_colour_of_the_page(tmp_path) -> None:
    entries = [(r"$\frac$", Split(1, 2), finished(ap)) for ap in (9.0, 11.0)]
    svg = to_svg(final_ap(make_rows(entries)))
    assert svg.startswith('<svg role="img" fill="currentColor"')
    assert "#000000" not in svg and "#ffffff" not in svg
    assert r"<!-- $\frac$ -->" in svg  # drawn as it is; as a formula it would be an error


def test_figures_keep_world_sizes_and_total_batches_apart(tmp_path) -> None:
    entries = [("GN", Split(*sizes), finished(10.0)) for sizes in ((1, 2), (1, 8), (4, 2))]
    assert len(final_ap(make_rows(entries[:2])).axes) == 2
    assert len(final_ap(make_rows(entries)).axes) == 3


def test_ap_over_images_is_drawn_where_one_thing_stays(tmp_path) -> None:
    """Of 8x1, 1x8 and 1x2: one total batch, and one world size; 8x1 and 1x2 share neither."""
    aps = {Split(8, 1): 30.0, Split(1, 8): 40.0, Split(1, 2): 20.0}
    rows = make_rows([("GN", split, finished(ap)) for split, ap in aps.items()])
    titles = [axes.get_title() for axes in ap_over_images(rows).axes]
    assert titles == ["total batch 8", "world size 1: total batch grows with images"]
    drawn = [axes.lines[0].get_xydata().tolist() for axes in ap_over_images(rows).axes]
    assert drawn == [[[1.0, 30.0], [8.0, 40.0]], [[2.0, 20.0], [8.0, 40.0]]]
    assert ap_over_images(rows[:1]) is None
    assert ap_over_images([rows[0], rows[2]]) is None


def test_pictures_are_sorted_shrunk_and_whole(tmp_path) -> None:
    write_run(tmp_path / "run", size=(300, 3 * MAX_WIDTH))
    (tmp_path / "run" / "pictures" / "000000.png").write_bytes(b"\x89PNG cut off")
    strip = picture_strip(tmp_path / "run")
    assert [name for name, _ in strip] == ["000001", "000002"]
    data = base64.b64decode(strip[0][1].split(",")[1])
    image = Image.open(io.BytesIO(data))
    assert (image.size, image.mode) == ((MAX_WIDTH, 100), "RGB")


def test_pictures_are_of_runs_that_left_some_and_stand_image_by_image(tmp_path) -> None:
    entries = [("GN", 1, {"status": "failed", "message": "x"}), ("GN", 2, finished(20.0))]
    page = page_of(compared(tmp_path, [*entries, ("BN", 1, finished(10.0))]))
    assert page.tags.count("img") == 4
    text = " ".join(page.text.split())
    gn, bn = "GN, world size 1, 2 images per GPU, seed 2", "BN, world size 1, 2 images per GPU"
    first, second = text.index("000001"), text.rindex("000002")
    assert first < text.index(gn) < text.index(bn) < second < text.rindex(gn) < text.rindex(bn)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    comparison = compared(tmp_path, [("GN", 1, finished(20.0))])
    comparison.write()
    before = (tmp_path / "report.html").read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    comparison.seconds = 1.0
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        comparison.write()
    assert (tmp_path / "report.html").read_text() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
