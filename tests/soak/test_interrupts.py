"""A few of those programs; thousands: ``python -m tests.soak.interrupts``."""

from __future__ import annotations

import pytest

from tests.soak.interrupts import HOW, interrupted, run
from tests.support.kernel_tests import kernel_test
from uffdaemon.lowlevel import Features


@pytest.mark.parametrize("seed", range(4))
@kernel_test(features=Features.EVENT_REMOVE)
def test_programs_that_are_interrupted_twice_end(seed: int) -> None:
    assert run(4, seed) == {"interrupted": 4}


@pytest.mark.parametrize("how", HOW)
@kernel_test(features=Features.EVENT_REMOVE)
def test_a_program_that_is_interrupted_again_and_again_ends(how: str) -> None:
    assert interrupted(how, [0, 0, 0]) == "interrupted"
