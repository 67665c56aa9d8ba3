"""What runs are compared by: all that they leave but what a clock measured or chance named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_run import result_of

CLOCKS = ("time", "data_time", "rank_data_time", "eta_seconds")


def same(a: Any, b: Any) -> bool:
    """Bit for bit; NaN is NaN."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in a nest of dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Of ``metrics.json``: losses, learning rate, evaluations, what norms report."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def predictions_of(output: Path) -> dict[str, str]:
    """By file; AP says little of a model that has learned nothing yet."""
    paths = output.rglob("coco_instances_results.json")
    return {str(path.relative_to(output)): path.read_text() for path in paths}


def state_of(output: Path) -> dict[str, Any]:
    """The last checkpoint, of either engine."""
    name = (output / "last_checkpoint").read_text()
    state = torch.load(output / name, weights_only=True)
    if "trainer" in state:  # detectron2
        training = state["trainer"]
        del training["run"], training["clock"]
        values = list(training["storage"].values())
    else:
        del state["training"]["clock"]
        values = [state["training"]["metrics"]["latest"]]
    for clock in CLOCKS:
        for by_name in values:
            by_name.pop(clock, None)
    return state


def rank_files_of(output: Path) -> dict[str, Any]:
    """What other ranks than 0 left."""
    files = {path.name: torch.load(path, weights_only=True) for path in output.glob("rank*.pth")}
    for state in files.values():
        del state["run"]
    return files


def differences(ours: Path, expected: Path) -> list[str]:
    """What two finished runs differ in."""
    pairs = {
        "losses": (lines_of(ours), lines_of(expected)),
        "predictions": (predictions_of(ours), predictions_of(expected)),
        "results": (result_of(ours)["results"], result_of(expected)["results"]),
        "checkpoint": (state_of(ours), state_of(expected)),
        "files of other ranks": (rank_files_of(ours), rank_files_of(expected)),
    }
    found = [name for name, (a, b) in pairs.items() if not same(a, b)]
    if "checkpoint" in found:
        found += [f"checkpoint: {where}" for where in _different(*pairs["checkpoint"])]
    return found


def _different(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [w for key in a for w in _different(a[key], b[key], f"{where}/{key}")]
    return [] if same(a, b) else [where]
