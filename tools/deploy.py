"""Writes the trained model of a run as files that load without this package; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.deploy import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
