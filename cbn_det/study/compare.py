"""Compares norms: runs a plan, resumes what was broken off, and reports what came out."""

from __future__ import annotations

import shlex
import time

from cbn_det.study.backbone import extract_backbone
from cbn_det.study.plan import Plan, Run, backbone_file
from cbn_det.study.progress import console
from cbn_det.study.report import text_report, write_files
from cbn_det.study.results import make_rows
from cbn_det.study.runner import Outcome, interruptible, locked, run_all

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def compare(plan: Plan, jobs: int, dry_run: bool = False) -> int:
    """Run everything in the plan that is not finished yet, then print and write the report.

    Args:
        plan: what to compare.
        jobs: single-rank runs side by side.
        dry_run: only print the commands.

    Returns:
        an exit code: 0, also when a run diverged (that is a result), 1 when a run failed,
        130 when stopped by Ctrl-C.

    Raises:
        RuntimeError: another comparison is running in the same output folder.
        ValueError: the schedule of the config cannot be scaled.
    """
    pretrain, runs = plan.pretrain_run(), plan.runs()
    if dry_run:
        for run in [*([pretrain] if pretrain else []), *runs]:
            print(shlex.join(run.command))
        return 0
    started = time.monotonic()
    with locked(plan.output), interruptible():
        try:
            broken = _train_backbone(pretrain, jobs) if pretrain else None
            if broken:
                outcomes = [Outcome(run, {"status": "failed", "message": broken}) for run in runs]
            else:
                outcomes = run_all(runs, jobs, _announce)
        except KeyboardInterrupt:
            console.print(
                "\nStopped; every started run was ended. The same command goes on from here: "
                "finished runs are kept, the others continue at their last checkpoint.",
                soft_wrap=True,
            )
            return EXIT_INTERRUPTED
        rows = make_rows([(o.run.norm, o.run.split, o.result) for o in outcomes])
        title = f"Comparison of norms, recipe '{plan.recipe}', {plan.config_file.name}"
        results = [(o.run, o.result) for o in outcomes]
        print("\n" + text_report(rows, results, title))
        files = write_files(plan.output, rows, results, title)
    print("Files: " + ", ".join(str(path) for path in files))
    print(f"Run folders: {plan.output / 'runs'}. Wall time {time.monotonic() - started:.0f} s.")
    return EXIT_FAILED if any(o.result.get("status") == "failed" for o in outcomes) else 0


def _announce(outcome: Outcome) -> None:
    result = outcome.result
    boxes = (result.get("results") or {}).get("bbox") or {}
    text = f"AP {boxes['AP']:.1f}" if boxes.get("AP") is not None else result.get("message") or ""
    kept = " (kept from before)" if outcome.reused else ""
    line = f"{outcome.run.label}: {result.get('status')}{kept} {text}"
    if result.get("status") != "finished":
        line += f"; see {outcome.run.folder / 'console.log'}"
    console.print(line, markup=False, soft_wrap=True)


def _train_backbone(pretrain: Run, jobs: int) -> str | None:
    """Train the recipe's backbone once; None, or why the comparison cannot go on."""
    outcome = run_all([pretrain], jobs=1, done=_announce)[0]
    if outcome.result.get("status") != "finished":
        result = outcome.result
        return f"the backbone's training {result.get('status')}: {result.get('message')}"
    if not backbone_file(pretrain).exists():
        extract_backbone(pretrain.folder / "model_final.pth", backbone_file(pretrain))
    return None
