"""A dozen daemons of one client that are killed; thousands: ``python -m tests.soak.kills``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.soak.kills import FEATURES, WAYS
from tests.support.deadline import DEADLINE
from tests.support.requirements import require

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("way", WAYS)
def test_no_byte_is_wrong(way: str) -> None:
    require(FEATURES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.kills", "12", "1", "--way", way],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
