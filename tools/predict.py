"""Draws what the trained model of a run finds on images; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.predict import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
