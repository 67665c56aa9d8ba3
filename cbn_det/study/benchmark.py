"""Times norms against each other: a worker process a norm, which take turns."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cbn_det.study.benchmark_report import Case, write_report
from cbn_det.study.engine import resolve_engine, source_environment
from cbn_det.study.processes import end_group, interruptible, locked
from cbn_det.study.ratios import FEWEST
from cbn_det.study.recipes import RECIPES, read_yaml

WORKER = (sys.executable, "-W", "ignore", "-m", "cbn_det.benchmark")

#: load average per core from which on others are in the way
BUSY = 0.3


@dataclass(frozen=True)
class Shape:
    """A convolution that keeps height and width: input [n, c, h, w], `out` channels, `kernel`."""

    n: int
    c: int
    h: int
    w: int
    out: int
    kernel: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "N,C,H,W,OUT,KERNEL", e.g. "2,256,100,100,256,3". Raises ValueError otherwise."""
        try:
            shape = cls(*(int(word) for word in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"--shapes {text}: expected N,C,H,W,OUT,KERNEL") from None
        if min(vars(shape).values()) < 1 or shape.kernel % 2 == 0:
            raise ValueError(f"--shapes {text}: numbers must be 1 or more, the kernel odd")
        return shape

    def __str__(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.c}->{self.out}, {self.n}x{self.h}x{self.w}"

    def words(self) -> list[str]:
        return [str(value) for value in vars(self).values()]


#: what norms alone are compared with; see `cbn_det.benchmark.norm`
COPY = "copy"

#: outputs of the convolutions below
MAPS = ["2,256,100,100", "128,256,7,7", "2,256,200,200"]

#: an FPN output and lateral convolution, a RoI head's, and the last of a bottleneck
SHAPES = ["2,256,100,100,256,3", "2,256,100,100,256,1", "128,256,7,7,256,3", "2,64,200,200,256,1"]


@dataclass(frozen=True)
class Settings:
    """How a benchmark is taken.

    Args:
        norms: as in a config; the first is what the others are compared with.
        output: folder for report and logs.
        repetitions: turns of each norm that count.
        seconds: after which a case takes no more turns, if it has `FEWEST`.
        warm_up: steps before anything counts; more where a norm's window is longer.
        turn_seconds: how long a turn of the first norm takes at least.
        threads: of each worker; None: as many as torch takes.
        clock: "wall", or "cpu": processor seconds of the worker.

    Raises:
        ValueError: a setting out of range; names the option of the command line.
    """

    norms: list[str]
    output: Path
    repetitions: int = 30
    seconds: float = 600.0
    warm_up: int = 10
    turn_seconds: float = 0.2
    threads: int | None = None
    clock: str = "wall"

    def __post_init__(self) -> None:
        if len(self.norms) < 2 or len(set(self.norms)) < len(self.norms):
            raise ValueError("--norms: name two or more, each once; the first is the reference")
        if self.repetitions < FEWEST:
            raise ValueError(f"--repetitions {self.repetitions}: an interval needs {FEWEST}")
        if self.warm_up < 1:
            raise ValueError(f"--warm-up {self.warm_up}: 1 or more")
        if self.seconds <= 0 or self.turn_seconds < 0:
            raise ValueError("--seconds must be above 0, --turn-seconds at least 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: 1 or more")


#: glibc gives large freed blocks back to the system or keeps them, depending on the order in which
#: they came, and getting them anew takes as long as a norm does. So workers keep what they once
#: had, as CUDA's caching allocator does: the ratios are then of the norms. The caller's environment
#: takes precedence.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**36),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}


class WorkerFailed(RuntimeError):
    """A worker could not be built, or died."""


class Worker:
    """A process that holds one norm's model and runs its steps when asked.

    Args:
        norm: its name.
        command: that starts the process.
        log: file for what it prints.
        threads: of torch; None: the default.
    """

    def __init__(
        self, norm: str, command: Sequence[str], log: Path, threads: int | None = None
    ) -> None:
        self.norm = norm
        self.log = log
        limit = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=KEEP_FREED_MEMORY | source_environment() | (limit if threads else {}),
                start_new_session=True,
            )

    def answer(self) -> dict:
        """The next line the worker prints.

        Raises:
            WorkerFailed: it says why it cannot go on, or is gone.
        """
        line = self._process.stdout.readline()
        content = json.loads(line) if line else {"error": f"it died; {self.log} may say why"}
        if "error" in content:
            raise WorkerFailed(f"{self.norm}: {content['error']}")
        return content

    def ask(self, request: str) -> dict:
        """Sends a request and waits for the answer; raises as :meth:`answer` does."""
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it had to say is still to be read
        return self.answer()

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        end_group(self._process)
        self._process.stdout.close()


def benchmark_layers(settings: Settings, shapes: list[Shape], device: str) -> int:
    """Convolution and norm at each shape: forward, backward and step. Returns the exit code.

    Raises:
        WorkerFailed: a norm that cannot be built or run.
        OSError: a file cannot be written.
    """
    cases = {
        str(shape): {norm: ["layer", norm, *shape.words(), device] for norm in settings.norms}
        for shape in shapes
    }
    return _benchmark(settings, "layer", cases, unit="step")


def benchmark_norms(settings: Settings, shapes: Sequence[str], device: str) -> int:
    """Norms alone, forward and backward, beside a copy. Returns the exit code.

    Args:
        shapes: "N,C,H,W" each, of the input.

    Raises:
        ValueError: a shape that is none, or "copy" among the norms.
        WorkerFailed: a norm that cannot be built or run.
        OSError: a file cannot be written.
    """
    if COPY in settings.norms:
        raise ValueError(f"--norms {COPY}: it takes part anyway")
    norms = [COPY, *settings.norms]
    cases, moved = {}, {}
    for text in shapes:
        words = text.split(",")
        if len(words) != 4 or not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--shapes {text}: expected N,C,H,W, numbers of 1 or more")
        name, size = "x".join(words), 4 * math.prod(map(int, words))
        cases[name] = {norm: ["norm", norm, *words, device] for norm in norms}
        moved[name] = {norm: size * (2 if norm == COPY else 8) for norm in norms}
    return _benchmark(settings, "norm", cases, unit="step", moved=moved)


@dataclass(frozen=True)
class Detector:
    """A detector on which norms are compared.

    Args:
        recipe: a name of `RECIPES`.
        config: base config in place of the recipe's own.
        norm_keys: config keys that the norms are written to; None: the recipe's.
        engine: a name of `cbn_det.engines.ENGINES`.
        device: "cpu" or "cuda"; None: the config's.
        datasets: (name, annotations, images) triples for `--coco-dataset`.
        overrides: KEY VALUE pairs of the config. Weights are random unless they name
            MODEL.WEIGHTS: how long an iteration takes hardly depends on them.

    Raises:
        ValueError: a setting that cannot be followed; names the option of the command line.
    """

    recipe: str = "scratch"
    config: Path | None = None
    norm_keys: Sequence[str] | None = None
    engine: str = "auto"
    device: str | None = None
    datasets: Sequence[Sequence[str]] = ()
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.overrides) % 2:
            raise ValueError(f"--opts takes KEY VALUE pairs, got {len(self.overrides)} words")

    def words(self, norm: str, *options: str) -> list[str]:
        """The launcher's arguments, with `options` before the config overrides."""
        words = ["--config-file", str(self._path), "--engine", resolve_engine(self.engine)]
        words += [word for triple in self.datasets for word in ("--coco-dataset", *triple)]
        words += ["MODEL.WEIGHTS", "", *options]
        words += ["MODEL.DEVICE", self.device] if self.device else []
        return [*words, *[word for key in self._keys for word in (key, norm)], *self.overrides]

    def batch(self, images: int) -> list[str]:
        """Overrides for an iteration with `images` images."""
        # With the key, the worker would take the share of one process of several.
        scales = read_yaml(self._path).get("SOLVER", {}).get("REFERENCE_WORLD_SIZE")
        alone = ["SOLVER.REFERENCE_WORLD_SIZE", "0"] if scales else []
        return [*alone, "SOLVER.IMS_PER_BATCH", str(images)]

    def title(self, what: str) -> str:
        sites = [key.removeprefix("MODEL.").removesuffix(".NORM") for key in self._keys]
        engine = resolve_engine(self.engine)
        return f"{self._path.stem}, {what}, {engine}; norm in {', '.join(sites)}"

    @property
    def _path(self) -> Path:
        return self.config or RECIPES[self.recipe].config

    @property
    def _keys(self) -> Sequence[str]:
        return self.norm_keys or RECIPES[self.recipe].norm_keys


def benchmark_iterations(settings: Settings, detector: Detector, images: int = 2) -> int:
    """A training iteration of a detector with `images` images. Returns the exit code.

    Raises:
        ValueError: a setting that cannot be followed; names the option of the command line.
        WorkerFailed: a norm that cannot be built or run.
        OSError: a file cannot be read or written.
    """
    if images < 1:
        raise ValueError(f"--images {images}: 1 or more")
    commands = {
        norm: ["iteration", *detector.words(norm, *detector.batch(images))]
        for norm in settings.norms
    }
    title = detector.title(f"{images} images")
    return _benchmark(settings, "iteration", {title: commands}, unit="iteration")


#: what a detector's norms may be when it is timed; see `cbn_det.benchmark.inference`
STAGES = ("trained", "deployed", "folded")


def benchmark_inference(settings: Settings, detector: Detector) -> int:
    """The forward pass over one test image. A norm may be "deployed:NORM" or "folded:NORM". Returns
    the exit code.

    An untrained detector has a box for every class at every place. Unless the overrides say
    otherwise they are below the score threshold, so that sorting them does not hide the network's
    time.

    Raises:
        WorkerFailed: a norm that cannot be built, deployed or run.
        OSError: a file cannot be written.
    """
    commands = {}
    for norm in settings.norms:
        stage, _, name = norm.rpartition(":")
        if stage not in ("", *STAGES):
            raise ValueError(f"--norms {norm}: before the colon stands one of {', '.join(STAGES)}")
        words = detector.words(name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9")
        commands[norm] = ["inference", stage or "trained", *words]
    return _benchmark(settings, "inference", {detector.title("1 image"): commands}, unit="image")


def _benchmark(
    settings: Settings,
    kind: str,
    cases: dict[str, dict[str, list[str]]],
    unit: str,
    moved: dict[str, dict[str, int]] | None = None,
) -> int:
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > BUSY * cores:
        _say(
            f"WARNING: the machine is busy (load average {load:.1f} on {cores} cores): ratios are"
            " still paired, but intervals get wide and seconds too long; --clock cpu is disturbed"
            " less"
        )
    with locked(settings.output), interruptible():
        done = [
            replace(_measure(settings, name, commands), moved=moved and moved[name])
            for name, commands in cases.items()
        ]
        command = shlex.join(["python", *sys.argv])
        loads = load, os.getloadavg()[0]
        text, paths = write_report(
            settings.output, kind, done, unit, settings.clock, command, loads
        )
    print("\n" + text)
    print(f"Files: {', '.join(map(str, paths))}", flush=True)
    return 0


def _measure(settings: Settings, name: str, commands: dict[str, list[str]]) -> Case:
    """All norms at one case."""
    _say(f"{name}: building {', '.join(commands)}")
    workers: list[Worker] = []
    try:
        for norm, words in commands.items():
            log = settings.output / f"worker{len(workers)}.log"
            workers.append(Worker(norm, [*WORKER, *words], log, settings.threads))
        facts = [worker.answer() for worker in workers]
        for worker, fact in zip(workers, facts, strict=True):
            worker.ask(f"run {max(settings.warm_up, fact['warm_up'] + 2)}")
        first = workers[0].ask("time 1")["wall"]
        steps = max(1, math.ceil(settings.turn_seconds / first))
        seconds = take_turns(workers, steps, settings.repetitions, settings.seconds)
        peaks = {worker.norm: worker.ask("memory")["peak_mb"] for worker in workers}
    finally:
        for worker in workers:
            worker.end()
    return Case(name, seconds, peaks, steps, facts[0]["machine"], facts[0]["versions"])


def take_turns(
    workers: Sequence[Worker], steps: int, repetitions: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Lets every worker make `steps` steps in each repetition, in an order drawn anew each time.

    Returns:
        for each norm, what its worker answered: "wall" and "cpu" seconds of a step.
    """
    order = random.Random(0)
    taken: dict[str, list[dict[str, float]]] = {worker.norm: [] for worker in workers}
    started = said = time.monotonic()
    for done in range(repetitions):
        now = time.monotonic()
        if done >= FEWEST and now - started > seconds:
            _say(f"--seconds {seconds:g} are over: {done} repetitions instead of {repetitions}")
            break
        if now - said > 15:
            _say(f"{done} of {repetitions} repetitions")
            said = now
        for worker in order.sample(workers, len(workers)):
            taken[worker.norm].append(worker.ask(f"time {steps}"))
    return taken


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
