"""How a daemon sleeps, and what it shows of its faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffdaemon import Daemon, OpenFault
both_sleeps = pytest.mark.parametrize("native_sleep", [True, False], ids=["in-c", "in-trio"])
"""The same whether C sleeps in trio's place or trio sleeps by itself."""


def the_open_fault(daemon: Daemon) -> OpenFault:
    """The only one."""
    [found] = daemon.open_faults()
    return found


def failure_lines(logs: Sequence[object]) -> list[dict[str, object]]:
    """What was logged of faults that failed."""
    return [line for line in logs if isinstance(line, dict) and line["event"] == "fault failed"]
