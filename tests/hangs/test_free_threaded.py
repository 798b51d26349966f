"""Without a GIL, in-process Python answers everything, unless it has to stop the world.

Collected by free-threaded interpreters only: see conftest.py.
"""

from __future__ import annotations

import gc

import pytest
import trio

from tests.hangs.hung import A_FEW, InPython, StopsTheWorld, Toucher
from tests.hangs.pattern import Guarded, map_memory, run_and_check
from tests.hangs.patterns import PATTERNS
from tests.support.kernel_tests import kernel_test
from uffdaemon import Watchdog, open_daemon


@kernel_test()
async def test_in_process_works_for_everything_while_nothing_is_collected() -> None:
    gc.disable()  # the collector stops the world, and may run at any time
    async with open_daemon() as daemon:
        for pattern in PATTERNS.values():
            data = pattern.make_data()
            mapping, memory = map_memory(len(data))
            daemon.guard(memory, InPython(data), placement="in_process")
            guarded = Guarded(memoryview(mapping), data, memory.start, mapping)
            await trio.to_thread.run_sync(run_and_check, pattern, guarded)


@pytest.mark.parametrize("name", A_FEW)
@kernel_test()
def test_who_stops_the_world_hangs_and_the_watchdog_ends_it(name: str) -> None:
    toucher = Toucher(name, Watchdog(then="exit"), StopsTheWorld)
    toucher.touch()
    toucher.told_by_the_watchdog()
    toucher.read_all()
    assert toucher.status() == Watchdog.STATUS
