"""Eight layers of one norm on 4x4 maps, stepped when asked.

python benchmarks/dispatch_worker.py NORM DEVICE
"""

from __future__ import annotations

import sys

import torch
from counting import pairs, training_step
from worker import Workload, serve

PAIRS, CHANNELS, SIZE = 8, 64, 4


def workload(norm: str, device: str) -> Workload:
    """
    Raises:
        ValueError: an unknown norm, or one that does not fit 64 channels.
    """
    model = pairs(norm, PAIRS, CHANNELS, device)
    step = training_step(model, (1, CHANNELS, SIZE, SIZE), device)
    return Workload(step, model, torch.device(device))


if __name__ == "__main__":
    sys.exit(serve(lambda: workload(*sys.argv[1:])))
