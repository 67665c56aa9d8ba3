#!/usr/bin/env bash
# run.sh NAME PATH_OF_CHECKOUT [--norms CBN ...] [--configs TEXT ...]: a project that uses detectron2, with our
# norms at each of its norm keys, on this machine's CPU. The names are in catalog.py. Nothing in the
# checkout is changed; `$PYTHON` (default python3) needs detectron2 and what the project needs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OMP_NUM_THREADS=1 PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$here/client.py" "$@"
