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

    With more processes than GPUs, GPUs are shared.

    Args:
        number: of processes side by side.
        gpus: names for CUDA_VISIBLE_DEVICES; none: runs that use no GPU.
    """

    def __init__(self, number: int, gpus: Sequence[str] = ()) -> None:
        self.number = number
        self._gpus = list(gpus) or [""]
        self._taken: list[str] = []

    def take(self, ranks: int) -> list[str] | None:
        """The GPUs of `ranks` processes, or None while that many places are not free.

        A run with more ranks than there are places runs alone, and still gets a GPU for each of its
        ranks, as far as there are.
        """
        if len(self._taken) + min(ranks, self.number) > self.number:
            return None
        chosen = self._choose(ranks)
        self._taken += chosen
        return chosen

    def give_back(self, taken: Sequence[str]) -> None:
        """Free places that :meth:`take` has given."""
        for name in taken:
            self._taken.remove(name)

    def _choose(self, ranks: int) -> list[str]:
        chosen: list[str] = []
        for _ in range(ranks):
            # two ranks of a run on one GPU are worse than two runs on it
            use = {name: (chosen.count(name), self._taken.count(name)) for name in self._gpus}
            chosen.append(min(use, key=use.__getitem__))
        return chosen
