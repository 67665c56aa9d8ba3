"""Compares norms: runs a plan, resumes what was interrupted, and reports what came out."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Sequence

from ..cli import join, typed_words
from ..progress import say
from ..run.errors import CRASHED, OK, STOPPED, USAGE
from .backbone import extract_backbone
from .plan import Plan, Run, backbone_file
from .processes import interruptible, locked
from .report import Comparison
from .runner import Active, Outcome, run_all

_ENDED = (
    "\nStopped; every started run was ended. The same command goes on from here: finished runs are "
    "kept, interrupted ones resume from their last checkpoint."
)
_WATCHED = (
    "\nStopped watching; submitted jobs go on (squeue shows them, scancel ends them). The same "
    "command finds them again: finished runs are kept, jobs that are gone are submitted anew."
)


def compare(
    plan: Plan,
    jobs: int,
    gpus: Sequence[str] = (),
    submit: Callable[[Run], Active] | None = None,
) -> int:
    """:func:`train` a plan, then print and write the report.

    Returns:
        an exit code: 0, also when a run diverged (that is a result), 1 when a run failed.
    """
    started = time.monotonic()
    outcomes = train(plan, jobs, gpus, submit)
    command, seconds = join(typed_words()), time.monotonic() - started
    comparison = Comparison(plan, outcomes, command, seconds)
    *others, page = comparison.write()
    print("\n" + comparison.text())
    print(f"Files: {', '.join(str(path) for path in others)}. Wall time: {comparison.wall}.")
    print(f"The python for every other command: {sys.executable}")
    print(f"Report with curves and pictures: {page}", flush=True)
    return exit_code(outcomes)


def train(
    plan: Plan,
    jobs: int,
    gpus: Sequence[str] = (),
    submit: Callable[[Run], Active] | None = None,
) -> list[Outcome]:
    """Run everything in a plan that is not finished yet: the recipe's backbone, where it has one,
    then the compared runs side by side.

    `jobs`, `gpus` and `submit` are those of :func:`~cbn_det.study.runner.run_all`.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C, SIGTERM or SIGHUP; every run started here was ended.
        OSError: the disk is full, or a file cannot be read or written.
        RuntimeError: another comparison is running in the same output folder.
        ValueError: the schedule of the config cannot be scaled.
    """
    pretrain, runs = plan.pretrain_run(), plan.runs()
    with locked(plan.output), interruptible():
        if pretrain:
            say(f"training the backbone, once for all, with the {plan.engine} engine")
            result = run_all([pretrain], 1, gpus, submit)[0].result
            if result.get("status") != "finished":
                why = f"the backbone's training {result.get('status')}: {result.get('message')}"
                return [Outcome(run, {"status": "failed", "message": why}) for run in runs]
            if not backbone_file(pretrain).exists():
                extract_backbone(pretrain.folder / "model_final.pth", backbone_file(pretrain))
        at_a_time = max(1, jobs // max(run.ranks for run in runs))
        say(
            f"training {', '.join(dict.fromkeys(plan.norms))} with the {plan.engine} engine: "
            f"{len(runs)} run{'s' * (len(runs) > 1)}, up to {at_a_time} at a time"
            f"{' on GPU ' * bool(gpus)}{' '.join(gpus)}, in {plan.output / 'runs'}"
        )
        return run_all(runs, jobs, gpus, submit)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 where a run failed; a diverged one is a result."""
    return CRASHED if any(o.result.get("status") == "failed" for o in outcomes) else OK


def guarded(tool: str, action: Callable[[], int], watching: bool = False) -> int:
    """Call `action`; what a user can mend becomes one line on stderr and an exit code.

    Args:
        watching: jobs elsewhere go on after Ctrl-C.

    Returns:
        what `action` returns; 1 for a full disk and other trouble with files, 2 for settings that
        cannot be followed, 130 after Ctrl-C.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print(_WATCHED if watching else _ENDED, flush=True)
        return STOPPED
    except FileNotFoundError as error:
        print(f"{tool}: there is no file {error.filename}", file=sys.stderr)
        return USAGE
    except OSError as error:
        print(f"{tool}: {_advice(error)}", file=sys.stderr)
        return CRASHED
    except ModuleNotFoundError:  # the command says what to install
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        # The data room wraps an OSError into words of its own.
        return CRASHED if isinstance(error.__cause__, OSError) else USAGE


def _advice(error: OSError) -> str:
    """One line: what went wrong and what to do."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{place}: free some space (df -h shows how much there is), then run "
            "the same command again; it goes on from here"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"cannot write{place}: {error.strerror}. Choose another folder with --output, or "
            "change the permissions, then run the same command again"
        )
    return f"{error}. Mend that, then run the same command again; it goes on from here"
