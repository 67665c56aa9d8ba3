#!/usr/bin/env python3
"""Trains and evaluates a LazyConfig with the norms of cbn_det; detectron2's arguments."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("cbn_det") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from cbn_det.plugin.lazy import main

    sys.exit(main())
