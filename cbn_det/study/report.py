"""Tables, files and plots of a comparison. They say what came out, whoever wins."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from tabulate import tabulate  # noqa: E402

from cbn_det.study.plan import Run  # noqa: E402
from cbn_det.study.results import TASKS, Row, Spread, read_metrics  # noqa: E402

TASK_NAMES = {"bbox": "", "segm": "mask "}
# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000"]


def by_total_batch(rows: list[Row]) -> dict[int, list[Row]]:
    """Rows grouped by total SGD batch: AP of different total batches is not comparable."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.split.total, []).append(row)
    return dict(sorted(groups.items()))


def table(rows: list[Row], style: str) -> str:
    """One table of rows that share a total batch; `style` is a format of tabulate."""
    tasks = [task for task in TASKS if any(row.ap.get(task) for row in rows)] or ["bbox"]
    shares = any(row.recovered is not None for row in rows)
    lines = []
    for row in rows:
        line = {
            "norm": row.norm,
            "images/GPU": row.split.images,
            "world size": row.split.ranks,
            "total batch": row.split.total,
        }
        for task in tasks:
            name = TASK_NAMES[task]
            line[f"{name}AP"] = _ap(row.ap.get(task))
            line[f"{name}AP50"] = _ap(row.ap50.get(task))
            line[f"{name}AP, PreciseBN"] = _ap(row.ap_precise.get(task))
        if shares:
            line["recovered"] = _percent(row.recovered)
            line["recovered, PreciseBN"] = _percent(row.recovered_precise)
        line["s/iter"] = f"{row.sec_per_iter.mean:.3f}" if row.sec_per_iter else "-"
        line["peak MB"] = f"{row.peak_memory_mb.mean:.0f}" if row.peak_memory_mb else "-"
        line["status"] = row.status
        lines.append(line)
    return tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)


def provenance(results: list[tuple[Run, dict]]) -> str:
    """One line: seeds, machine and versions of the runs, "" if none told."""
    seeds = sorted({run.seed for run, _ in results if run.seed is not None})
    parts = [f"seeds {' '.join(map(str, seeds))}"] if seeds else []
    for result in (result for _, result in results):
        machine, versions = result.get("machine"), result.get("versions")
        if machine:
            name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
            parts.append(f"{name}, {machine['threads']} threads a process")
        if versions:
            parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "; ".join(dict.fromkeys(parts))


def text_report(
    rows: list[Row], results: list[tuple[Run, dict]], title: str, style: str = "simple"
) -> str:
    """All tables, one per total batch, with what a reader has to know to read them."""
    parts = [title]
    for total, group in by_total_batch(rows).items():
        lengths = sorted({row.iterations for row in group if row.iterations})
        length = f", {' / '.join(map(str, lengths))} iterations" if lengths else ""
        parts += [f"Total SGD batch {total}{length}", table(group, style)]
    notes = ["AP on the 0-100 scale. '-': no such number."]
    spreads = [row.ap.get("bbox") for row in rows if row.ap.get("bbox")]
    if any(spread.n > 1 for spread in spreads):
        notes.append("mean ± sample standard deviation over the seeds that finished.")
    else:
        notes.append("One seed: small differences mean nothing.")
    if any(row.ap_precise.get("bbox") for row in rows):
        notes.append("PreciseBN: the same weights, BatchNorm statistics recomputed after training.")
    if any(row.recovered is not None for row in rows):
        notes.append(
            "recovered: (AP - AP of BN at this split) / (AP of SyncBN - AP of BN at this split)."
        )
    if len(by_total_batch(rows)) > 1:
        notes.append("Tables of different total batch are not comparable with each other.")
    made = provenance(results)
    return "\n\n".join([*parts, "\n".join(notes + [f"Made with: {made}."] * bool(made))]) + "\n"


def write_files(
    output: Path, rows: list[Row], results: list[tuple[Run, dict]], title: str
) -> list[Path]:
    """Write table.md, summary.json and the plots into `output`; return their paths."""
    markdown, summary = output / "table.md", output / "summary.json"
    markdown.write_text(text_report(rows, results, f"# {title}", "github"), encoding="utf-8")
    content = {
        "title": title,
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": [
            {
                "label": run.label,
                "norm": run.norm,
                "ranks": run.split.ranks,
                "images_per_gpu": run.split.images,
                "seed": run.seed,
                "folder": str(run.folder.relative_to(output)),
                "result": result,
            }
            for run, result in results
        ],
    }
    summary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [markdown, summary, *_plot_losses(output, results), *_plot_ap(output, rows)]


def _ap(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.1f}" + (f" ± {spread.std:.1f}" if spread.std is not None else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    smooth, out = values[0], []
    for value in values:
        smooth = weight * smooth + (1 - weight) * value
        out.append(smooth)
    return out


def _plot_losses(output: Path, results: list[tuple[Run, dict]]) -> list[Path]:
    norms = list(dict.fromkeys(run.norm for run, _ in results))
    totals = sorted({run.split.total for run, _ in results})
    figure, all_axes = plt.subplots(
        1, len(totals), figsize=(6 * len(totals), 4), squeeze=False, layout="constrained"
    )
    for axes, total in zip(all_axes[0], totals, strict=True):
        named = set()
        for run, _ in results:
            points = [m for m in read_metrics(run.folder) if "total_loss" in m]
            if run.split.total != total or not points:
                continue
            axes.plot(
                [m["iteration"] for m in points],
                _smooth([m["total_loss"] for m in points]),
                color=COLOURS[norms.index(run.norm) % len(COLOURS)],
                linestyle=["-", "--", ":", "-."][_order(results, run) % 4],
                linewidth=1.2,
                label=None if (run.norm, run.split) in named else f"{run.norm} {run.split}",
            )
            named.add((run.norm, run.split))
        axes.set(
            xlabel="iteration", ylabel="training loss (smoothed)", title=f"total batch {total}"
        )
        if named:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return [_save(figure, output / "loss.png")]


def _order(results: list[tuple[Run, dict]], run: Run) -> int:
    splits = sorted({other.split for other, _ in results if other.split.total == run.split.total})
    return splits.index(run.split)


def _plot_ap(output: Path, rows: list[Row]) -> list[Path]:
    groups = by_total_batch([row for row in rows if row.ap.get("bbox")])
    if not groups:
        return []
    norms = list(dict.fromkeys(row.norm for row in rows))
    figure, all_axes = plt.subplots(
        1, len(groups), figsize=(6 * len(groups), 4), squeeze=False, layout="constrained"
    )
    for axes, (total, group) in zip(all_axes[0], groups.items(), strict=True):
        if len({row.split for row in group}) > 1:
            _ap_lines(axes, group, norms)
        else:
            _ap_bars(axes, group, norms)
        axes.set(ylabel="box AP", title=f"total batch {total}")
        axes.grid(alpha=0.3, axis="y")
    return [_save(figure, output / "ap.png")]


def _ap_bars(axes, rows: list[Row], norms: list[str]) -> None:
    for place, row in enumerate(rows):
        colour = COLOURS[norms.index(row.norm) % len(COLOURS)]
        plain, precise = row.ap["bbox"], row.ap_precise.get("bbox")
        left = place - 0.2 if precise else place
        bars = [axes.bar(left, plain.mean, 0.4, yerr=plain.std, color=colour, capsize=3)]
        if precise:
            bars.append(
                axes.bar(
                    place + 0.2,
                    precise.mean,
                    0.4,
                    yerr=precise.std,
                    capsize=3,
                    color="white",
                    edgecolor=colour,
                    hatch="///",
                )
            )
        for bar in bars:
            axes.bar_label(bar, fmt="%.1f", fontsize="small", padding=2)
    axes.set_xticks(range(len(rows)), [row.norm for row in rows])
    axes.set_xlabel(f"norm at {rows[0].split.images} images per GPU (hatched: with PreciseBN)")
    axes.margins(y=0.12)


def _ap_lines(axes, rows: list[Row], norms: list[str]) -> None:
    for norm in dict.fromkeys(row.norm for row in rows):
        points = sorted((r for r in rows if r.norm == norm), key=lambda row: row.split.images)
        colour = COLOURS[norms.index(norm) % len(COLOURS)]
        for values, style, suffix in (("ap", "-", ""), ("ap_precise", ":", ", PreciseBN")):
            known = [(p.split.images, getattr(p, values).get("bbox")) for p in points]
            known = [(images, spread) for images, spread in known if spread]
            if known:
                axes.errorbar(
                    [images for images, _ in known],
                    [spread.mean for _, spread in known],
                    yerr=[spread.std or 0.0 for _, spread in known],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    capsize=3,
                    label=norm + suffix,
                )
    images = sorted({row.split.images for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [str(i) for i in images])
    axes.set_xlabel("images per GPU (total batch fixed)")
    axes.legend(fontsize="small")


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
