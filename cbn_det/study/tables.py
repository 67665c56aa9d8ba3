"""The tables of a comparison, and what a reader has to know to read them."""

from __future__ import annotations

from tabulate import tabulate

from cbn_det.study.plan import Run
from cbn_det.study.results import TASKS, Row, Spread

TASK_NAMES = {"bbox": "", "segm": "mask "}


def by_total_batch(rows: list[Row]) -> dict[int, list[Row]]:
    """Rows grouped by total SGD batch: AP of different total batches is not comparable."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.split.total, []).append(row)
    return dict(sorted(groups.items()))


def heading(total: int, rows: list[Row]) -> str:
    """What the rows of one table have in common."""
    lengths = sorted({row.iterations for row in rows if row.iterations})
    length = f", {' / '.join(map(str, lengths))} iterations" if lengths else ""
    return f"Total SGD batch {total}{length}"


def cells(rows: list[Row]) -> list[dict[str, str]]:
    """The lines of one table, as column -> text; all rows share a total batch.

    Why a run did not finish is no part of them: it is as long as it has to be.
    """
    tasks = [task for task in TASKS if any(row.ap.get(task) for row in rows)] or ["bbox"]
    shares = any(row.recovered is not None for row in rows)
    lines = []
    for row in rows:
        line = {
            "norm": row.norm,
            "images/GPU": str(row.split.images),
            "world size": str(row.split.ranks),
            "total batch": str(row.split.total),
        }
        for task in tasks:
            name = TASK_NAMES[task]
            line[f"{name}AP"] = _ap(row.ap.get(task))
            line[f"{name}AP50"] = _ap(row.ap50.get(task))
            line[f"{name}AP, PreciseBN"] = _ap(row.ap_precise.get(task))
        if shares:
            line["recovered"] = _percent(row.recovered)
            line["recovered, PreciseBN"] = _percent(row.recovered_precise)
            line["AP - GN"] = "-" if row.to_gn is None else f"{row.to_gn:+.1f}"
        line["s/iter"] = f"{row.sec_per_iter.mean:.3f}" if row.sec_per_iter else "-"
        line["peak MB"] = f"{row.peak_memory_mb.mean:.0f}" if row.peak_memory_mb else "-"
        line["status"] = row.status
        lines.append(line)
    return lines


def notes(rows: list[Row], config_iterations: int | None = None) -> list[str]:
    """What the numbers mean and what they do not say, a sentence each.

    Args:
        rows: of all tables.
        config_iterations: the config's own length of training, if known.
    """
    said = ["AP on the 0-100 scale. '-': no such number."]
    spreads = [row.ap.get("bbox") for row in rows if row.ap.get("bbox")]
    if any(spread.n > 1 for spread in spreads):
        said.append("mean ± sample standard deviation over the seeds that finished.")
    else:
        said.append("One seed: small differences mean nothing.")
    trained = min((row.iterations for row in rows if row.iterations), default=None)
    if trained and config_iterations and trained < config_iterations:
        said.append(
            f"Short runs, {trained} of the config's {config_iterations} iterations: they show how "
            "training starts, and the order may change later."
        )
    if any(row.ap_precise.get("bbox") for row in rows):
        said.append("PreciseBN: the same weights, BatchNorm statistics recomputed after training.")
    if any(row.recovered is not None for row in rows):
        said.append(
            "recovered: (AP - AP of BN at this split) / (AP of SyncBN - AP of BN at this split); "
            "BN on one rank stands in for SyncBN where that was not trained."
        )
    if len(by_total_batch(rows)) > 1:
        said.append("Tables of different total batch are not comparable with each other.")
    return said


def machines(results: list[tuple[Run, dict]]) -> list[str]:
    """What the runs ran on, each machine once: "NAME, N threads a process"."""
    found = []
    for machine in filter(None, (result.get("machine") for _, result in results)):
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        found.append(f"{name}, {machine['threads']} threads a process")
    return list(dict.fromkeys(found))


def versions(results: list[tuple[Run, dict]]) -> list[str]:
    """The versions that the runs ran with, each set once: "python 3.11, torch 2.14"."""
    found = filter(None, (result.get("versions") for _, result in results))
    return list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in f.items()) for f in found))


def provenance(results: list[tuple[Run, dict]]) -> str:
    """One line: seeds, machine and versions of the runs, "" if none told."""
    seeds = sorted({run.seed for run, _ in results if run.seed is not None})
    parts = [f"seeds {' '.join(map(str, seeds))}"] if seeds else []
    return "; ".join([*parts, *machines(results), *versions(results)])


def text_report(
    rows: list[Row],
    results: list[tuple[Run, dict]],
    title: str,
    style: str = "simple",
    config_iterations: int | None = None,
) -> str:
    """All tables, one per total batch; `style` is a format of tabulate."""
    parts = [title]
    for total, group in by_total_batch(rows).items():
        lines = cells(group)
        for line, row in zip(lines, group, strict=True):
            line["status"] = "; ".join([row.status, *row.reasons])
        text = tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)
        parts += [heading(total, group), text]
    below, made = notes(rows, config_iterations), provenance(results)
    if made:
        below.append(f"Made with: {made}.")
    return "\n\n".join([*parts, "\n".join(below)]) + "\n"


def _ap(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.1f}" + (f" ± {spread.std:.1f}" if spread.std is not None else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
