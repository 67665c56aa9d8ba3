"""What a layer prints of itself."""

from __future__ import annotations

import pytest

from cbn_det.norms import build_norm, resolve_burn_in


@pytest.mark.parametrize(
    ("spec", "before", "after"),
    [
        ("CBN", "burn_in=0.667", "burn_in=1600"),
        ("MBN(burn_in=0.25)", "burn_in=0.25", "burn_in=600"),
        ("BRN", "burn_in=0.1, ramp=0.3", "burn_in=240, ramp=720"),
        ("CBN(burn_in=7)", "burn_in=7", "burn_in=7"),
    ],
)
def test_times_are_in_optimiser_steps_once_the_schedule_is_known(
    spec: str, before: str, after: str
) -> None:
    layer = build_norm(spec, 4)
    assert f"{before}," in repr(layer)
    resolve_burn_in(layer, 2400)
    assert f"{after}," in repr(layer)
    assert layer.options() == build_norm(spec, 4).options()
