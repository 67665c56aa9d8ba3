"""How the runs of a comparison are started, and which engine `auto` means here.

The study imports no engine: what is installed is asked of a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cbn_det.engines import ENGINES

LAUNCHER = (sys.executable, "-m", "cbn_det", "train")
#: the folder that this package is imported from
HOME = Path(__file__).resolve().parents[2]


def source_environment() -> dict[str, str]:
    """The environment in which a child process finds this package, installed or not."""
    # an installed package is found anyway, and behind python's own
    if {"site-packages", "dist-packages"} & set(HOME.parts):
        return dict(os.environ)
    paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def resolve_engine(name: str) -> str:
    """The engine that `name`, one of `cbn_det.engines.ENGINES`, stands for on this machine.

    Raises:
        RuntimeError: the process that was asked gave no answer.
    """
    if name != "auto":
        return name
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "cbn_det.engines"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its warnings go to our stderr
        text=True,
        env=source_environment(),
    )
    answer = done.stdout.strip()
    if done.returncode or answer not in ENGINES:
        raise RuntimeError(f"no engine works here: {sys.executable} -m cbn_det.engines says why")
    return answer
