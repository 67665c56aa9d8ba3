"""Kills a training at random moments until it is through, and compares it with one that was not.

By hand; `make test` has four fixed moments. Every kill is SIGKILL to the whole process group, data
loader and all ranks, at a moment drawn anew: one time in eight while it starts, otherwise within
the next part of the training, wherever that is: in a step, in a save, in an evaluation. The run is
resumed, and killed again, until it ends. Losses, predictions, results, weights and the states of
optimiser, schedule and norms must then be those of the undisturbed run, bit for bit.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/kill_at_random.py --norm MBN --ranks 2
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from same_run import differences
from tiny_run import REPOSITORY, arguments, write_mixed_inputs

ENGINES = {"detectron2": "tiny.yaml", "standalone": "standalone.yaml"}
# what the log says when a phase begins
PHASES = {
    "Training from iteration": "training",
    "Saving checkpoint to": "training, not long after a save",
    "Start inference on": "evaluating",
    "Evaluating": "evaluating",
    "Evaluation results for": "training",
    "copypaste: ": "training",
    "iter: ": "training",
    "finished: ": "after the end",
}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=list(ENGINES), default="detectron2")
    parser.add_argument("--kills", type=int, default=20, help="at least so many (default: 20)")
    parser.add_argument(
        "--norm",
        default="CBN(window=3, burn_in=5)",
        help='of FPN and box head (default: "%(default)s")',
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="loading, a rank (default: 1)")
    parser.add_argument("--iterations", type=int, default=60, help="of the run (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--folder", type=Path, help="for the runs; must be empty (default: a temporary one)"
    )
    return parser.parse_args()


class Run:
    """A training in a folder of its own, started as often as needed."""

    def __init__(self, args: argparse.Namespace, inputs: Path, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.txt"
        words = [
            *("--engine", args.engine, "--resume"),
            *(("--num-gpus", str(args.ranks)) if args.ranks > 1 else ()),
            *("MODEL.FPN.NORM", args.norm, "MODEL.ROI_BOX_HEAD.NORM", args.norm),
            *("SOLVER.MAX_ITER", str(args.iterations), "SOLVER.CHECKPOINT_PERIOD", "3"),
            *("SOLVER.WARMUP_ITERS", str(args.iterations // 2)),
            *("SOLVER.STEPS", f"({args.iterations * 3 // 4},)"),
            *("TEST.EVAL_PERIOD", "15", "DATALOADER.NUM_WORKERS", str(args.workers)),
        ]
        script = str(REPOSITORY / "tools" / "train_net.py")
        words = arguments(inputs, folder, *words, config=ENGINES[args.engine])
        self.command = [sys.executable, script, *words]

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known = self.log.stat().st_size if self.log.exists() else 0
        self._halves = self.halves()
        with open(self.folder / "output.txt", "ab") as output:
            return subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True
            )

    def said(self) -> str:
        """What the log has got since the last start."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self._known :].decode("utf-8", errors="replace")

    def halves(self) -> set[Path]:
        """Files that were being written when the run was killed."""
        return {path for path in self.folder.glob(".*") if path.is_file()}

    def wait_for_training(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and "Training from iteration" not in self.said():
            time.sleep(0.01)

    def phase(self) -> str:
        """What the run was at when it was killed, as far as its files tell."""
        if self.halves() - self._halves:
            return "saving"
        found = re.findall("|".join(map(re.escape, PHASES)), self.said())
        return PHASES[found[-1]] if found else "starting"

    def last_checkpoint(self) -> str:
        path = self.folder / "last_checkpoint"
        return path.read_text() if path.exists() else "none"

    def checked_end(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() != 0:
            said = (self.folder / "output.txt").read_text(errors="replace")
            sys.exit(f"{self.folder} ended with {process.returncode}:\n{said[-3000:]}")


def main() -> int:
    args = parsed_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        inputs = folder / "inputs"
        write_mixed_inputs(inputs)
        whole = Run(args, inputs, folder / "whole")
        started = time.monotonic()
        process = whole.start()
        whole.wait_for_training(process)
        starting = time.monotonic() - started
        whole.checked_end(process)
        training = time.monotonic() - started - starting
        print(f"undisturbed: {starting:.1f} s to start, {training:.1f} s to train", flush=True)

        draw = random.Random(args.seed)
        phases: Counter[str] = Counter()
        bad = runs = 0
        while phases.total() < args.kills:
            runs += 1
            run = Run(args, inputs, folder / f"broken{runs}")
            while kill_once(run, draw, starting, training / 4):
                phases[run.phase()] += 1
                last = run.last_checkpoint()
                print(f"kill {phases.total()}: {run.phase()}; resumes from {last}", flush=True)
                if last == "model_final.pth" or phases.total() >= args.kills:
                    run.checked_end(run.start())
                    break
            found = differences(run.folder, whole.folder)
            bad += bool(found)
            print(
                f"run {runs}: {', '.join(found) or 'bit for bit the undisturbed one'}", flush=True
            )
        print(f"{phases.total()} kills: {dict(phases)}; {runs} runs, {bad} of them differ")
    return 1 if bad else 0


def kill_once(run: Run, draw: random.Random, starting: float, part: float) -> bool:
    """Starts the run and kills it, unless it ends before; says whether it was killed."""
    process = run.start()
    if draw.random() < 0.125:
        seconds = draw.uniform(0.0, starting)
    else:
        seconds = draw.uniform(0.0, part)
        run.wait_for_training(process)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    run.checked_end(process)
    return False


if __name__ == "__main__":
    sys.exit(main())
