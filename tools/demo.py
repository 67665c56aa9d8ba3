"""What `make demo` runs: GN, BN and CBN compared; without detectron2, what is possible then."""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.data.digits import write_digits  # noqa: E402
from cbn_det.study.compare import compare  # noqa: E402
from cbn_det.study.plan import Plan, Split  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=600, help="iterations of each run")
    parser.add_argument("--jobs", type=int, default=2, help="one-thread runs side by side")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    args = parser.parse_args()
    write_digits()
    probe = [sys.executable, "-c", "import detectron2.layers"]
    if subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        print(
            "*** NO DETECTION TRAINING: detectron2 is missing (`make detectron2` builds it). The "
            "digits set is written; the norms follow on a small classifier instead. ***",
            flush=True,
        )
        from cbn_det.study import layer_demo

        layer_demo.main(iterations=min(2 * args.iters, layer_demo.ITERATIONS))
        return 0
    plan = Plan(args.output, ["GN", "BN", "CBN"], [Split(1, 2)], [1], iterations=args.iters)
    return compare(plan, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
