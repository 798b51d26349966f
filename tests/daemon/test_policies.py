"""Combined policies: the same in C and in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.daemon.client import Client, Inside, region_of
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    ByRange,
    BytesSource,
    CopyFrom,
    FaultAround,
    FirstOf,
    Hooks,
    Outcome,
    Poison,
    ZeroPage,
    open_daemon,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.smoke
@pytest.mark.parametrize("lowered", [True, False])
@kernel_test(features=Features.POISON)
async def test_combined_policies_do_the_same_in_c_and_in_python(
    lowered: bool, helpers: Path
) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(16)
    memory = await client.guarded(len(data))
    policy = FirstOf(
        ByRange([(2 * PAGE, PAGE, Poison()), (4 * PAGE, 4 * PAGE, FaultAround(ZeroPage(), 4))]),
        FaultAround(CopyFrom(BytesSource(data)), 8),
    )
    # A hook that is asked before keeps all faults in Python, and changes nothing.
    hooks = [] if lowered else [Hooks(before=lambda fault, action: None)]
    async with open_daemon(hooks=hooks) as daemon:
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.sigbus, helpers, 2 * PAGE) != 0
        expected = data[: 4 * PAGE] + bytes(4 * PAGE) + data[8 * PAGE :]
        for page in (5, 3, 0, 1, 4, 6, 7, 15, *range(8, 15)):
            found = await client.run(Inside.read, page * PAGE, PAGE)
            assert found == expected[page * PAGE : (page + 1) * PAGE], page
        counted = daemon.statistics()
    assert counted.bytes_done == {
        Outcome.POISONED: PAGE,
        Outcome.ZEROED: 4 * PAGE,
        Outcome.COPIED: 11 * PAGE,
    }
    assert counted.resolved == 5
