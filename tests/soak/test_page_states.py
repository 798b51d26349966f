"""A few hundred steps of the model of pages in every placement; ``make soak`` takes 10^5 each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.page_states import PLACINGS, play
from tests.support.kernel_tests import kernel_test
from uffdaemon.lowlevel import Features

NEEDED = Features.EVENT_FORK | Features.EVENT_REMOVE | Features.EVENT_REMAP | Features.EVENT_UNMAP


@pytest.mark.parametrize("placing", PLACINGS)
@kernel_test(features=NEEDED | Features.SIGBUS)
def test_the_book_and_the_pages_are_as_the_model_says(placing: str, helpers: Path) -> None:
    assert play(PLACINGS[placing], helpers, 500, 10) >= 500
