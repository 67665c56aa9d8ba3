"""Which GPUs the runs of a comparison get: CUDA_VISIBLE_DEVICES, one place a process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.split() if done.returncode == 0 else []


class Places:
    """Places for the processes of runs side by side, each with a GPU where there are any.

    With more places than GPUs, GPUs are shared.

    Args:
        number: of processes side by side.
        gpus: names for CUDA_VISIBLE_DEVICES; none: runs that use no GPU.
    """

    def __init__(self, number: int, gpus: Sequence[str] = ()) -> None:
        self.number = number
        self._free = [gpus[place % len(gpus)] if gpus else "" for place in range(number)]

    def take(self, ranks: int) -> list[str] | None:
        """The GPUs of `ranks` places, or None while that many are not free.

        A run with more ranks than there are places gets all of them, once nothing else runs.
        """
        ranks = min(ranks, self.number)
        if len(self._free) < ranks:
            return None
        # GPUs of its own first, as far as there are
        order = sorted(range(len(self._free)), key=lambda i: self._free[:i].count(self._free[i]))
        chosen = sorted(order[:ranks])
        taken = [self._free[i] for i in chosen]
        self._free = [name for i, name in enumerate(self._free) if i not in chosen]
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """Free places that :meth:`take` has given."""
        self._free += taken
