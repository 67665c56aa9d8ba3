"""The cores of this machine that this process may use."""

import os


def usable_cores() -> int:
    """How many; fewer than there are in a container or under a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
