#!/usr/bin/env python3
"""Checks COCO 2017, or sets of your own, before days are spent on training; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.commands.check_coco import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
