"""One worker, as ``tools/benchmark.py`` starts it.

python -m cbn_det.benchmark layer NORM N C H W OUT KERNEL DEVICE
python -m cbn_det.benchmark norm NORM N C H W DEVICE
python -m cbn_det.benchmark iteration LAUNCHER-ARGUMENTS
python -m cbn_det.benchmark inference trained|deployed|folded LAUNCHER-ARGUMENTS
"""

from __future__ import annotations

import sys

from .worker import serve


def main(words: list[str]) -> int:
    """Runs a worker until its stdin ends and returns its exit code."""
    kind, *rest = words
    if kind == "layer":
        from .layer import layer_workload

        norm, *numbers, device = rest
        n, c, h, w, out, kernel = map(int, numbers)
        return serve(lambda: layer_workload(norm, (n, c, h, w), out, kernel, device))
    if kind == "norm":
        from .norm import norm_workload

        norm, *numbers, device = rest
        n, c, h, w = map(int, numbers)
        return serve(lambda: norm_workload(norm, (n, c, h, w), device))
    from .iteration import iteration_workload, parse

    if kind == "inference":
        from .inference import inference_workload

        stage, *rest = rest
        args = parse(rest)
        return serve(lambda: inference_workload(stage, args))
    args = parse(rest)
    return serve(lambda: iteration_workload(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
