"""Compares norms: runs a plan, resumes what was interrupted, and reports what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from cbn_det.cli import typed_words
from cbn_det.shell import join
from cbn_det.study.backbone import extract_backbone
from cbn_det.study.disk import advice
from cbn_det.study.files import write_files
from cbn_det.study.plan import Plan, Run, backbone_file
from cbn_det.study.processes import interruptible, locked
from cbn_det.study.progress import say
from cbn_det.study.recipes import config_iterations
from cbn_det.study.report import Comparison
from cbn_det.study.results import make_rows, reason_of
from cbn_det.study.runner import Active, Outcome, run_all
from cbn_det.study.tables import text_report

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

STOPPED = (
    "\nStopped; every started run was ended. The same command goes on from here: finished runs are "
    "kept, interrupted ones resume from their last checkpoint."
)
STOPPED_WATCHING = (
    "\nStopped watching; submitted jobs go on (squeue shows them, scancel ends them). The same "
    "command finds them again: finished runs are kept, jobs that are gone are submitted anew."
)


def compare(
    plan: Plan,
    jobs: int,
    dry_run: bool = False,
    steps_before: int = 0,
    gpus: Sequence[str] = (),
    submit: Callable[[Run], Active] | None = None,
) -> int:
    """Run everything in the plan that is not finished yet, then print and write the report.

    Args:
        plan: what to compare.
        jobs: single-rank runs side by side.
        dry_run: only print the commands.
        steps_before: steps that the caller has shown already, for the numbers of those to come.
        gpus: names for CUDA_VISIBLE_DEVICES, shared out among the runs.
        submit: starts a run elsewhere, in place of a process here.

    Returns:
        an exit code: 0, also when a run diverged (that is a result), 1 when a run failed.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C, SIGTERM or SIGHUP; every run started here was ended.
        OSError: the disk is full, or a file cannot be read or written.
        RuntimeError: another comparison is running in the same output folder.
        ValueError: the schedule of the config cannot be scaled.
    """
    pretrain, runs = plan.pretrain_run(), plan.runs()
    if dry_run:
        plan.print_commands()
        return 0
    started = time.monotonic()
    steps = steps_before + 2 + bool(pretrain)
    with locked(plan.output), interruptible():
        broken = None
        if pretrain:
            say(f"[{steps - 2}/{steps}] the backbone, once for all, with the {plan.engine} engine")
            broken = train_backbone(pretrain, gpus, submit)
        if broken:
            outcomes = [Outcome(run, {"status": "failed", "message": broken}) for run in runs]
        else:
            names = ", ".join(dict.fromkeys(plan.norms))
            amount = f"{len(runs)} run{'s' * (len(runs) > 1)}, {side_by_side(runs, jobs, gpus)}"
            say(
                f"[{steps - 1}/{steps}] training {names} with the {plan.engine} engine: {amount}, "
                f"in {plan.output / 'runs'}"
            )
            outcomes = run_all(runs, jobs, announce, gpus=gpus, submit=submit)
        say(f"[{steps}/{steps}] report")
        # A whole schedule, scaled to more images a step, has fewer iterations and is not short.
        shortened = plan.iterations or "SOLVER.MAX_ITER" in plan.overrides[::2]
        length = config_iterations(plan.config_of(plan.norms[0])) if shortened else None
        comparison = Comparison(
            plan,
            results=[(o.run, o.result) for o in outcomes],
            rows=make_rows([(o.run.norm, o.run.split, o.result) for o in outcomes]),
            command=join(typed_words()),
            seconds=time.monotonic() - started,
            reused=sum(o.reused for o in outcomes),
            config_iterations=length,
        )
        *others, page = write_files(comparison)
    rows, results = comparison.rows, comparison.results
    text = text_report(
        rows, results, comparison.title, config_iterations=length, expected=plan.expected
    )
    print("\n" + text)
    print(f"Files: {', '.join(str(path) for path in others)}. Wall time: {comparison.wall}.")
    print(f"Report with curves and pictures: {page}", flush=True)
    return EXIT_FAILED if any(o.result.get("status") == "failed" for o in outcomes) else 0


def guarded(tool: str, action: Callable[[], int], stopped: str = STOPPED) -> int:
    """Call `action`; what a user can mend becomes one line on stderr and an exit code.

    Args:
        stopped: printed after Ctrl-C.

    Returns:
        what `action` returns; 1 for a full disk and other trouble with files, 2 for settings that
        cannot be followed, 130 after Ctrl-C.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print(stopped, flush=True)
        return EXIT_INTERRUPTED
    except FileNotFoundError as error:
        print(f"{tool}: there is no file {error.filename}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        print(f"{tool}: {advice(error)}", file=sys.stderr)
        return EXIT_FAILED
    except (RuntimeError, ValueError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        # The data room wraps an OSError into words of its own.
        return EXIT_FAILED if isinstance(error.__cause__, OSError) else EXIT_REFUSED


def side_by_side(runs: list[Run], jobs: int, gpus: Sequence[str]) -> str:
    """How many runs at a time, and on which GPUs, for a reader."""
    ranks = max(run.ranks for run in runs)
    where = f" on GPU {' '.join(gpus)}" if gpus else ""
    return f"up to {max(1, jobs // ranks)} at a time{where}"


def announce(outcome: Outcome) -> None:
    result, kept = outcome.result, " (kept from before)" if outcome.reused else ""
    boxes = (result.get("results") or {}).get("bbox") or {}
    if result.get("status") != "finished":
        text = f"{reason_of(result)}{kept}; see {outcome.run.folder / 'console.log'}"
    elif boxes.get("AP") is not None:
        text = f"finished{kept} AP {boxes['AP']:.1f}"
    else:
        text = f"finished{kept} without AP"
    say(f"{outcome.run.label}: {text}")


def train_backbone(
    pretrain: Run, gpus: Sequence[str] = (), submit: Callable[[Run], Active] | None = None
) -> str | None:
    """Train the recipe's backbone once; None, or why the comparison cannot go on."""
    outcome = run_all([pretrain], 1, announce, gpus=gpus, submit=submit)[0]
    if outcome.result.get("status") != "finished":
        result = outcome.result
        return f"the backbone's training {result.get('status')}: {result.get('message')}"
    if not backbone_file(pretrain).exists():
        extract_backbone(pretrain.folder / "model_final.pth", backbone_file(pretrain))
    return None
