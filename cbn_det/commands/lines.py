"""Findings as lines: ok, note (nothing has to be done) or PROBLEM (and what to do)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..cli import reader_left
from ..data.findings import PROBLEM, Finding


def tell(tool: str, findings: Iterator[Finding]) -> int:
    """Prints findings as they come, and at the end how many are problems.

    Args:
        tool: named where files cannot be read at all.

    Returns:
        the exit code: 0 ready, 1 problems, 130 stopped by Ctrl-C.
    """
    problems = 0
    try:
        for finding in findings:
            problems += finding.level == PROBLEM
            label = finding.level.upper() if finding.level == PROBLEM else finding.level
            print(f"{label:8s}{finding.text}", flush=True)
    except KeyboardInterrupt:
        print("stopped: nothing was changed", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return reader_left()
    except OSError as error:  # no permission, a disk that went away
        print(f"{tool}: {error}", file=sys.stderr)
        return 1
    print(f"{problems} problem{'s' * (problems != 1)} found" if problems else "ready for training")
    return 1 if problems else 0
