"""In-process Python answers what lets go of the GIL; of what holds it, the watchdog tells."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import trio

from tests.hangs.hung import A_FEW, InPython, Toucher
from tests.hangs.pattern import Guarded, map_memory, run_and_check
from tests.hangs.patterns import HOLDING, PATTERNS, RELEASING
from tests.support.kernel_tests import kernel_test
from uffdaemon import Watchdog, open_daemon

if TYPE_CHECKING:
    from uffdaemon.placement import Then

_AT_A_TIME = 6
"""Processes that hang side by side."""


@kernel_test()
async def test_in_process_works_for_what_lets_go_of_the_gil() -> None:
    async with open_daemon() as daemon:
        for name in RELEASING:
            data = PATTERNS[name].make_data()
            mapping, memory = map_memory(len(data))
            daemon.guard(memory, InPython(data), placement="in_process")
            guarded = Guarded(memoryview(mapping), data, memory.start, mapping)
            await trio.to_thread.run_sync(run_and_check, PATTERNS[name], guarded)


@kernel_test()
def test_in_process_hangs_for_what_holds_the_gil_and_the_watchdog_ends_it() -> None:
    for first in range(0, len(HOLDING), _AT_A_TIME):
        names = HOLDING[first : first + _AT_A_TIME]
        touchers = [Toucher(name, Watchdog(after=0.2, then="exit")) for name in names]
        for toucher in touchers:
            toucher.touch()
        for toucher in touchers:
            text = toucher.read_all()
            assert toucher.status() == Watchdog.STATUS, (toucher.pattern.name, text)
            assert toucher.names_the_place(), (toucher.pattern.name, text)
            assert f"in {toucher.pattern.name}\n" in text, text


@pytest.mark.parametrize("name", A_FEW)
@pytest.mark.parametrize(
    ("then", "status"),
    [("poison", -signal.SIGBUS), ("exit", 70)],  # EX_SOFTWARE, which is in the docs
)
@kernel_test()
def test_the_watchdog_ends_the_wait(name: str, then: Then, status: int) -> None:
    toucher = Toucher(name, Watchdog(then=then))
    toucher.touch()
    toucher.told_by_the_watchdog()
    toucher.read_all()
    assert toucher.status() == status


@pytest.mark.parametrize("name", A_FEW)
@kernel_test()
def test_the_watchdog_reports_and_leaves_it_at_that(name: str) -> None:
    toucher = Toucher(name, Watchdog())
    toucher.touch()
    toucher.told_by_the_watchdog()
    assert toucher.running()
    toucher.kill()
