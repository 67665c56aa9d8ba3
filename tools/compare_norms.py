#!/usr/bin/env python3
"""The command `cbn-det compare` of a clone that is not installed; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.commands.compare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
