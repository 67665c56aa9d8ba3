"""Twenty steps of a small net with each norm, against the numbers that were written down."""

from __future__ import annotations

import pytest
from same_numbers import CASES, Case, deviations, read, train

RECORD = read()


def test_the_record_has_each_case_and_no_other() -> None:
    assert list(RECORD) == [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_norm_computes_what_it_computed(case: Case) -> None:
    found = deviations(train(case), RECORD[case.name])
    assert found.pop("losses") <= case.losses
    far = {key: value for key, value in found.items() if not value <= case.state}
    assert not far


def test_the_cases_differ() -> None:
    """A window, compensation, rule or second pass that did nothing would be tested in vain."""
    alike = ("channels_last", "GKN", "burn_in=100")  # as contiguous; no buffers; as BN
    names = [name for name in RECORD if not any(part in name for part in alike)]
    assert len({tuple(RECORD[name]["13.running_var"]) for name in names}) == len(names)
