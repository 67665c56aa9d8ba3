"""Writes the tables of README and docs from the CSV files beside them, and the picture of README.

  python docs/tables.py             # rewrites every table in place
  python docs/tables.py --picture   # also draws docs/images/batch_size.png

A page has a table between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a file of docs/results
without its ending, or a name of `SELECTIONS`. Of the columns of a file "X ±" is written into the
cells of X, and "X low" and "X high" as the interval behind X.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from functools import partial
from pathlib import Path

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
RESULTS = DOCS / "results"
KERNELS = REPOSITORY / "benchmarks" / "results"
PICTURE = DOCS / "images" / "batch_size.png"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = list[dict[str, str]]

# README's rows of batch_size.csv: what is to be recovered, and who recovers it
SHORT = [
    ("BN", "1 x 8"),
    *((norm, "4 x 2") for norm in ("BN", "SyncBN", "BGN", "MBN", "CBN", "KN")),
]
SHORT += [("GN", "1 x 8")]
SHORT_COLUMNS = ("norm", "ranks x images", "AP", "AP ±", "recovered, %", "seeds")


def read(path: Path) -> Rows:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def batch_size_short() -> Rows:
    """README's table."""
    rows = {(row["norm"], row["ranks x images"]): row for row in read(RESULTS / "batch_size.csv")}
    return [{name: rows[key][name] for name in SHORT_COLUMNS} for key in SHORT]


def operations_of_an_iteration() -> Rows:
    """What ``benchmarks/kernels.py iteration`` counted: a row a place, a column a norm."""
    table: dict[str, dict[str, str]] = {}
    for row in read(KERNELS / "iteration.csv"):
        line = table.setdefault(row["place"], {"norm": row["place"].replace("_", " ")})
        is_count = row["norm"] == "BN"
        number = float(row["operations" if is_count else "ratio"])
        line[row["norm"]] = f"{number:.0f} operations" if is_count else f"{number:.2f}"
    return list(table.values())


def operations_of_a_layer() -> Rows:
    """What ``benchmarks/kernels.py layer`` counted."""
    kinds = ("a layer over BN", "in burn-in")
    return [
        {"norm": row["norm"], **{kind: f"{float(row[kind]):g}" for kind in kinds}}
        for row in read(KERNELS / "layer.csv")
    ]


def dispatch_bound() -> Rows:
    """What ``benchmarks/benchmark.py dispatch`` timed."""
    return [
        {"norm": row["norm"], "ratio to BN": f"{ratio:.2f} [{low:.2f}, {high:.2f}]"}
        for row in read(KERNELS / "dispatch.csv")
        for ratio, low, high in [[float(row[f"ratio to BN{end}"]) for end in ("", " low", " high")]]
        if row["norm"] != "BN"
    ]


def with_recovered(name: str) -> Rows:
    """Single runs on digits, beside the means of BN in the batch-size comparison."""
    of_bn = {r["ranks x images"]: r for r in read(RESULTS / "batch_size.csv") if r["norm"] == "BN"}
    most = float(of_bn["1 x 8"]["AP"])
    table = []
    for row in read(RESULTS / name):
        lost = most - float(of_bn[row["ranks x images"]]["AP"])
        some = lost and not row["norm"].startswith("GN")  # which depends on no batch
        recovered = f"{100 + 100 * (float(row['AP']) - most) / lost:.0f}" if some else ""
        table.append(row | {"recovered, %": recovered})
    return table


SELECTIONS = {
    function.__name__: function
    for function in (
        batch_size_short,
        operations_of_an_iteration,
        operations_of_a_layer,
        dispatch_bound,
    )
} | {
    name: partial(with_recovered, f"{name}.csv")
    for name in ("freeze", "freeze_digits", "freeze_processes")
}


def cell(row: dict[str, str], name: str) -> str:
    """A value with its spread or interval; "-" where there is none."""
    text = row[name] or "-"
    if spread := row.get(f"{name} ±"):
        text += f" ± {spread}"
    if low := row.get(f"{name} low"):
        text += f" [{low}, {row[f'{name} high']}]"
    return text


def markdown(rows: Rows) -> str:
    parts = {f"{name}{end}" for name in rows[0] for end in (" ±", " low", " high")}
    names = [name for name in rows[0] if name not in parts]
    lines = [names, ["---"] * len(names), *([cell(row, name) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(name: str) -> str:
    """The Markdown of a table.

    Raises:
        OSError: no file and no selection has this name.
    """
    rows = SELECTIONS[name]() if name in SELECTIONS else read(RESULTS / f"{name}.csv")
    return markdown(rows)


def pages() -> list[Path]:
    """README and every page of docs."""
    return [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]


def written(text: str) -> str:
    """A page with its tables as the files have them now."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[3], text)


def draw() -> Path:
    """The bars of README: AP at 4 ranks x 2 images, with one standard deviation over seeds."""
    sys.path.insert(0, str(REPOSITORY))
    from cbn_det.study.figures import colours, save_png, side_by_side

    rows = [row for row in batch_size_short() if row["ranks x images"] == "4 x 2"]
    others = {row["norm"]: row for row in batch_size_short() if row["ranks x images"] == "1 x 8"}
    norms = [row["norm"] for row in rows]
    figure, (axes,) = side_by_side(["AP"])
    figure.set_size_inches(6.4, 2.6)
    axes.grid(visible=False, axis="x")
    spreads = [float(row["AP ±"]) for row in rows]
    heights = [float(row["AP"]) for row in rows]
    axes.bar(norms, heights, yerr=spreads, color=list(colours(norms).values()), capsize=4)
    for name, style in (("BN", "--"), ("GN", ":")):
        axes.axhline(float(others[name]["AP"]), color="#606060", linestyle=style, linewidth=1)
        axes.text(5.6, float(others[name]["AP"]) + 0.6, f"{name}, 1 x 8", ha="right", fontsize=8)
    axes.set_ylim(0, 60)
    axes.set_ylabel("AP, digits")
    axes.set_title("4 processes x 2 images each", fontsize="medium")
    PICTURE.parent.mkdir(exist_ok=True)
    return save_png(figure, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", action="store_true", help="draw README's picture as well")
    if parser.parse_args().picture:
        print(draw())
    for path in pages():
        text = path.read_text("utf-8")
        if (new := written(text)) != text:
            path.write_text(new, "utf-8")
            print(path)


if __name__ == "__main__":
    main()
