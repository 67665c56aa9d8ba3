"""What a few training steps tell of a training: norms, burn-in, memory, time, disk, folding."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.findings import NOTE, OK, PROBLEM, Finding
from ..deploy import fold
from ..norms import kn_chain, memory_state_dict, norm_rows, resolve_burn_in
from ..norms.binding import ConvBound
from ..norms.spec import name_of
from ..progress import shown
from ..run.errors import one_line
from ..run.files import read_result
from ..run.measure import peak_memory_mb, reset_peak_memory
from ..run.nonfinite import Diverged
from ..run.trial import Trial

_STEPS = 3  # one as training begins, two as after burn-in: all memory is there then
_PAST_ANY_SCHEDULE = 10**9
_NEARLY_ALL = 0.9  # of a memory
_LESS_MEMORY = "lower SOLVER.IMS_PER_BATCH (with --accumulate for the same total), or INPUT's sizes"


def try_out(trial: Trial, accumulate: int, load_weights: bool) -> Iterator[Finding]:
    """Builds the model and trains it for three steps."""
    reset_peak_memory()  # reading annotations may take more than training
    before = peak_memory_mb()
    on_gpu = trial.cfg.MODEL.DEVICE.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = trial.build(Path(folder), load_weights)
            yield from _norms(trial, model)
            seconds = []
            for step in shown(range(_STEPS), "training steps"):
                if step == 1:
                    resolve_burn_in(model, 1, start_iter=_PAST_ANY_SCHEDULE)
                started = time.perf_counter()
                trial.step(step)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        except (ValueError, Diverged) as error:
            yield Finding(PROBLEM, one_line(error))
            return
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield Finding(
                PROBLEM,
                f"memory: a training step does not fit ({one_line(error)[:120]}): {_LESS_MEMORY}",
            )
            return
        except Exception as error:  # of the model, which may be anybody's
            yield Finding(
                PROBLEM,
                f"a training step fails: {type(error).__name__}: {one_line(error)[:200]}"
                " (cbn-det train with SOLVER.MAX_ITER 1 shows where)",
            )
            return
    used = peak_memory_mb() - (0 if on_gpu else before)
    yield from _chain(model)
    yield _memory(trial, used, accumulate)
    yield _time(trial, seconds[-1])
    yield from _disk(trial, model)
    yield from _folding(model)


def _norms(trial: Trial, model: nn.Module) -> Iterator[Finding]:
    rows = norm_rows(model)
    if not rows:
        yield Finding(NOTE, "norms: the model has none")
    for kind, number in Counter((row.kind, row.trainable) for row in rows).items():
        layers = [model.get_submodule(r.name) for r in rows if (r.kind, r.trainable) == kind]
        bound = [layer for layer in layers if isinstance(layer, ConvBound) and layer.needs_conv]
        text = f"norms: {number} x {kind[0]}{'' if kind[1] else ', frozen'}"
        if bound:
            text += f", {sum(layer.conv is not None for layer in bound)} bound to their convolution"
        yield Finding(OK, text)
    if not any(name_of(type(module)) for module in model.modules()):
        yield Finding(NOTE, "norms: none of this package is in the model")
    for key in trial.unused_norms:
        yield Finding(
            PROBLEM,
            f"{key}: the model has no layer of this norm: set the key of the part that has one"
            ' (MODEL.FPN.NORM, ...), or this one to ""',
        )
    yield from _burn_in(trial, model)


def _burn_in(trial: Trial, model: nn.Module) -> Iterator[Finding]:
    length = trial.cfg.SOLVER.MAX_ITER
    ends = Counter(
        (name_of(type(layer)), layer.burn_in_steps)
        for layer in model.modules()
        if getattr(layer, "burn_in_steps", None)
    )
    for name, end in ends:
        if end < length:
            yield Finding(OK, f"burn-in: {name} is BatchNorm until iteration {end} of {length}")
        else:
            yield Finding(
                PROBLEM,
                f"burn-in: {name} is BatchNorm until iteration {end}, and SOLVER.MAX_ITER is"
                f" {length}: give burn_in as a fraction, as in {name}(burn_in=0.67)",
            )


def _chain(model: nn.Module) -> Iterator[Finding]:
    rows = kn_chain(model)
    ended = Counter(row.follows for row in rows if row.ends)
    if not rows:
        return
    yield Finding(OK, f"KN: {len(rows) - ended.total()} of {len(rows)} layers have a prediction")
    for reason, number in ended.most_common(3):
        yield Finding(NOTE, f"KN: {number} without {reason.removeprefix('- ')}")


def _memory(trial: Trial, used: float, accumulate: int) -> Finding:
    cfg = trial.cfg
    images = cfg.SOLVER.IMS_PER_BATCH // trial.world_size
    if cfg.MODEL.DEVICE.startswith("cuda"):
        have, where, processes = torch.cuda.get_device_properties(0).total_memory, "GPU", 1
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        where, processes = "machine", trial.world_size
    text = (
        f"memory: {used:.0f} MB for {_STEPS} steps of {images} images"
        f"{f' x {accumulate} mini-batches' if accumulate > 1 else ''}"
        f"{f', times {processes} processes' if processes > 1 else ''};"
        f" the {where} has {have / 2**20:.0f} MB"
    )
    if used * processes < _NEARLY_ALL * have / 2**20:
        return Finding(OK, text)
    return Finding(PROBLEM, f"{text}: {_LESS_MEMORY}")


def _time(trial: Trial, seconds: float) -> Finding:
    length = trial.cfg.SOLVER.MAX_ITER
    minutes = round(length * seconds / 60)
    spelled = f"{minutes // 60} h {minutes % 60} min" if minutes else "less than a minute"
    return Finding(
        OK,
        f"time: {seconds:.2f} s an iteration here and now, {spelled} for {length} (one step of one"
        " process, without evaluation)",
    )


def _disk(trial: Trial, model: nn.Module) -> Iterator[Finding]:
    solver, output = trial.cfg.SOLVER, Path(trial.cfg.OUTPUT_DIR)
    state = [model.state_dict(), trial.optimizer.state_dict(), memory_state_dict(model)]
    number = solver.MAX_ITER // solver.CHECKPOINT_PERIOD + 1
    size = _bytes(state) / 1e6
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e6
    text = (
        f"disk: checkpoints are {number} x {size:.4g} MB = {number * size / 1e3:.1f} GB, and"
        f" {free / 1e3:.1f} GB are free for '{output}'"
    )
    if not os.access(place, os.W_OK):
        yield Finding(PROBLEM, f"OUTPUT_DIR {output}: '{place}' cannot be written to")
    elif free < number * size:
        yield Finding(
            PROBLEM,
            f"{text}: free some space, or raise SOLVER.CHECKPOINT_PERIOD, or take another"
            " OUTPUT_DIR",
        )
    else:
        yield Finding(OK, text)
    if read_result(output) is not None:
        yield Finding(
            NOTE, f"OUTPUT_DIR {output} holds an earlier run: training anew replaces its results"
        )


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values: Iterable[Any] = value.values() if isinstance(value, dict) else ()
    values = value if isinstance(value, list | tuple) else values
    return sum(map(_bytes, values))


def _folding(model: nn.Module) -> Iterator[Finding]:
    try:
        done = fold(copy.deepcopy(model).eval())
    except (RuntimeError, ValueError) as error:
        yield Finding(NOTE, f"folding: not possible ({one_line(error)})")
        return
    level = OK if done.folded else NOTE
    yield Finding(level, f"folding: {len(done.folded)} norms go into their convolutions")
    reasons = Counter((row.norm, row.reason) for row in done.left)
    for (norm, reason), number in reasons.most_common(3):
        yield Finding(NOTE, f"folding: {number} {norm} stay: {reason}")
