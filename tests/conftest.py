"""What all tests share: whoever needs a userfaultfd skips with the reason where none can be had."""

from __future__ import annotations

import pytest

from tests.kernel.harness import require
from uffdaemon import Features


@pytest.fixture(autouse=True)
def _kernel_or_its_reason(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("kernel") is not None:
        require(Features(0))
