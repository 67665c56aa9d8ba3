"""The report of a benchmark: tables to read, and every single time as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from cbn_det.study.ratios import CONFIDENCE, Ratio, paired_ratio


@dataclass(frozen=True)
class Case:
    """What came out at one shape, or of one detector.

    Args:
        name: what was timed.
        seconds: for each norm, "wall" and "cpu" seconds of a step in each repetition.
        peak_mb: for each norm, the most memory that was in use.
        steps: in a repetition.
        machine: of the first worker.
        versions: likewise.
        moved: for each norm, bytes that a step has to read or write, where that was asked for.
    """

    name: str
    seconds: dict[str, list[dict[str, float]]]
    peak_mb: dict[str, float]
    steps: int
    machine: dict
    versions: dict[str, str]
    moved: dict[str, int] | None = None

    def times(self, norm: str, clock: str) -> list[float]:
        """Seconds of a step, by "wall" or "cpu" clock, in each repetition."""
        return [second[clock] for second in self.seconds[norm]]

    def ratio(self, norm: str, clock: str) -> Ratio:
        """Of a norm's times to those of the first norm."""
        return paired_ratio(self.times(norm, clock), self.times(next(iter(self.seconds)), clock))

    def memory_ratio(self, norm: str) -> float | None:
        """Of a norm's peak memory to that of the first norm; None where that took none to speak
        of."""
        reference = next(iter(self.peak_mb.values()))
        return self.peak_mb[norm] / reference if reference > 0 else None

    def bandwidth(self, norm: str, clock: str) -> tuple[float, float]:
        """Bytes per second, and as a share of the first norm's."""
        first = next(iter(self.seconds))
        more = self.moved[norm] / self.moved[first]
        share = more / self.ratio(norm, clock).median if norm != first else 1.0
        return self.moved[norm] / statistics.median(self.times(norm, clock)), share

    @property
    def share_of_processor(self) -> float:
        """Processor seconds per second and thread while timing; below 1 others, or a GPU, were
        waited for."""
        times = [second for seconds in self.seconds.values() for second in seconds]
        wall = sum(second["wall"] for second in times) * self.machine["threads"]
        return sum(second["cpu"] for second in times) / wall


def text_report(
    cases: list[Case], unit: str, clock: str, command: str, load: tuple[float, float]
) -> str:
    """Tables in Markdown, and what a reader has to know.

    Args:
        unit: what a time is of: "iteration" or "step".
        clock: "wall" or "cpu".
        load: load average before and after.
    """
    parts = [f"```\n{command}\n```"]
    for case in cases:
        rows = [_row(case, norm, unit, clock) for norm in case.seconds]
        table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        parts += [f"**{case.name}**", table]
    return "\n\n".join([*parts, "\n".join(_notes(cases, clock, load))]) + "\n"


def write_report(
    folder: Path,
    kind: str,
    cases: list[Case],
    unit: str,
    clock: str,
    command: str,
    load: tuple[float, float],
) -> tuple[str, list[Path]]:
    """Writes `KIND.md` and `KIND.json` into the folder; returns the text and the paths.

    Raises:
        OSError: a file cannot be written.
    """
    text = text_report(cases, unit, clock, command, load)
    content = {
        "kind": kind,
        "command": command,
        "clock": clock,
        "load_average": {"before": load[0], "after": load[1]},
        "cases": [_plain(case, clock) for case in cases],
    }
    paths = [folder / f"{kind}.md", folder / f"{kind}.json"]
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return text, paths


def _row(case: Case, norm: str, unit: str, clock: str) -> dict[str, str]:
    first = next(iter(case.seconds))
    time = statistics.median(case.times(norm, clock))
    memory = case.memory_ratio(norm)
    short = unit == "step"
    row = {
        "norm": norm,
        f"{'ms' if short else 's'}/{unit}": f"{1000 * time:.2f}" if short else f"{time:.3f}",
        f"ratio to {first}": "1" if norm == first else str(case.ratio(norm, clock)),
    }
    if case.moved:
        speed, share = case.bandwidth(norm, clock)
        row |= {"GB/s": f"{speed / 1e9:.1f}", f"of {first}'s": f"{share:.0%}"}
    return row | {
        "peak MB": f"{case.peak_mb[norm]:.0f}",
        "memory ratio": "-" if memory is None else "1" if norm == first else f"{memory:.3f}",
    }


def _notes(cases: list[Case], clock: str, load: tuple[float, float]) -> list[str]:
    case = cases[0]
    counts = sorted({len(times) for c in cases for times in c.seconds.values()})
    what = "Wall-clock time" if clock == "wall" else "Processor time of the process"
    machine = case.machine
    name = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    busy = min(c.share_of_processor for c in cases)
    notes = [
        f"{what}; ratios: median of paired repetitions, in brackets its {CONFIDENCE:.0%} interval"
        f" ({'-'.join(map(str, counts))} repetitions of {'-'.join(_steps(cases))} steps, in turn).",
        "Norms past their burn-in, windows full. Peak memory, one process a norm: "
        + (
            "of tensors."
            if machine["gpu"]
            else "resident, beyond what imports take; it varies by tens of MB between processes."
            " Freed memory stays with the process, as on a GPU."
        ),
        f"{name}, {machine['threads']} threads; "
        + ", ".join(f"{key} {value}" for key, value in case.versions.items())
        + ".",
        f"Load average {load[0]:.1f} before and {load[1]:.1f} after"
        + ("." if machine["gpu"] else f"; timed threads had {busy:.0%} of a core each."),
    ]
    if case.moved:
        notes.append(
            "GB/s: of what has to be moved. A norm reads its input twice and writes its output,"
            " then reads input and gradient twice and writes one: 8 times the tensor; a copy: 2."
        )
    return notes


def _steps(cases: list[Case]) -> list[str]:
    counts = sorted({case.steps for case in cases})
    return [str(count) for count in (counts if len(counts) < 2 else (counts[0], counts[-1]))]


def _plain(case: Case, clock: str) -> dict:
    return {
        **dataclasses.asdict(case),
        "ratios": {norm: dataclasses.asdict(case.ratio(norm, clock)) for norm in case.seconds},
    }
