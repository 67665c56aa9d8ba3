#!/bin/sh
# A step that a GradScaler skips runs the step hooks of SGD(fused=True), and not those of plain
# SGD.
#
# torch 2.14.1, on a CPU. Expected: no hook runs, or it runs for both. Seen, of SGD with an
# infinite gradient: with fused=True the hook runs although no weight moves, with fused=False it
# does not. Whoever counts steps by register_step_post_hook counts those that were skipped; while
# the hook runs, the optimiser's attribute found_inf tells them apart: 1 in a skipped step, 0 in
# another.
set -eu
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
python3 -m pip install --quiet --target "$packages" torch==2.14.1 numpy
PYTHONPATH="$packages" python3 - <<'END'
import torch


def step(fused, gradient):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
    seen = []

    def after_step(*_):
        found_inf = getattr(optimizer, "found_inf", None)
        seen.append(None if found_inf is None else float(found_inf))

    optimizer.register_step_post_hook(after_step)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * torch.tensor([1.0, gradient, 1.0])).sum()).backward()
    scaler.step(optimizer)
    assert (weight.tolist() == [1.0, 1.0, 1.0]) == (gradient == INFINITE)
    return seen


INFINITE = float("inf")
taken = step(True, 2.0)
fused, plain = step(True, INFINITE), step(False, INFINITE)
print(f"torch {torch.__version__}: found_inf as the hooks saw it: step taken {taken}, skipped")
print(f"{fused}, skipped and not fused {plain}")
assert torch.__version__.startswith("2.14.1"), "another version than the one this is about"
assert taken == [0.0] and fused == [1.0] and plain == [], "it has changed"
END
