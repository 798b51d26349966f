"""Options that make no sense are refused where they are given, by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    AsyncSource,
    ByKind,
    ByRange,
    BytesSource,
    CopyFrom,
    FaultAround,
    FirstOf,
    Hooks,
    Memory,
    Retry,
    Shutdown,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout"),
        ({"shutdown_timeout": math.nan}, ValueError, "shutdown_timeout"),
        ({"shutdown_timeout": "x"}, TypeError, "shutdown_timeout"),
        ({"fetch_limit": 0}, ValueError, "fetch_limit"),
        ({"fetch_limit": "x"}, TypeError, "fetch_limit"),
        ({"rereads": -1}, ValueError, "rereads"),
        ({"watchdog": True}, TypeError, "watchdog"),
        ({"on_fork": "x"}, ValueError, "on_fork"),
        ({"hooks": Hooks()}, TypeError, r"write hooks=\[...\]"),
        ({"hooks": [5]}, TypeError, "each of hooks"),
        ({"log_interval": 0}, ValueError, "log_interval"),
    ],
)
def test_of_a_daemon(options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        open_daemon(**options)


ANY: Any = 5


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AsyncSource(ANY, PAGE), "fetch"),
        (lambda: FaultAround(ANY, 4), "policy"),
        (lambda: FaultAround(ZeroPage(), 1.5), "pages"),  # type: ignore[arg-type]  # the mistake
        (lambda: FirstOf(ZeroPage), r"ZeroPage\(\) makes one"),  # type: ignore[arg-type]  # too
        (lambda: ByKind(missing=ZeroPage), "missing"),  # type: ignore[arg-type]  # too
        (lambda: ByRange([(0, PAGE, ANY)]), "policy"),
        (lambda: Retry(attempts=1.5), "attempts"),  # type: ignore[arg-type]  # too
        (lambda: Hooks(before=ANY), "before is a hook"),
        (lambda: Memory.map("x"), "length"),  # type: ignore[arg-type]  # too
        (lambda: Memory.map(PAGE, "shmem"), "MemoryType.SHMEM"),  # type: ignore[arg-type]  # too
    ],
)
def test_of_what_is_made(make: Callable[[], object], name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make()


@kernel_test()
async def test_of_a_region() -> None:
    policy = CopyFrom(BytesSource(content(1)))
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            mistakes: list[dict[str, Any]] = [
                {"retry": 3},
                {"policy_timeout": "1"},
                {"on_failure": actions.Poison},
                {"name": 5},
            ]
            for options in mistakes:
                with pytest.raises(TypeError, match=next(iter(options))):
                    daemon.guard(memory, policy, **options)
            with pytest.raises(ValueError, match="policy_timeout"):
                daemon.guard(memory, policy, policy_timeout=-1)
            with pytest.raises(TypeError, match="memory is a Memory"):
                daemon.guard(bytearray(PAGE), policy)  # type: ignore[arg-type]  # too
            region = daemon.guard(memory, policy)
            with pytest.raises(TypeError, match="uffd is a Userfaultfd"):
                daemon.add_region(5, region)  # type: ignore[arg-type]  # too
            with pytest.raises(ValueError, match="piece"):
                await daemon.fill(region, piece=0)
            with pytest.raises(ValueError, match="how is"):
                Userfaultfd.open(how="x")  # type: ignore[arg-type]  # too


@kernel_test()
async def test_the_userfaultfd_of_guarded_memory_is_closed_with_it() -> None:
    """Closed by itself, it would leave zeros."""
    data = content(2)
    with Memory.map(2 * PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(data)))
            assert memory.userfaultfd is not None
            with pytest.raises(BufferError, match="guards <Memory"):
                memory.userfaultfd.close()
            assert bytes(region.buffer()) == data


@kernel_test()
async def test_two_daemons_do_not_serve_the_same_memory() -> None:
    data = content(1)
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(data)))
            async with open_daemon() as other:
                with pytest.raises(errors.AlreadyServed):
                    other.guard(memory, ZeroPage())
            assert bytes(region.buffer()) == data
        async with open_daemon() as successor:
            successor.guard(memory, ZeroPage())


@kernel_test()
async def test_the_loops_thread_does_not_wait_for_held_pages() -> None:
    """Nobody resolves them after the removal, which would hang this thread, and the program."""
    with Memory.map(2 * PAGE) as memory:
        async with open_daemon(on_shutdown=Shutdown.HOLD) as daemon:
            region = daemon.guard(memory, lambda fault: actions.Zero())
            daemon.remove_region(region, "hold")
            with pytest.raises(errors.PlacementRefused, match="this thread runs trio"):
                region.read_into(0, bytearray(1))


@kernel_test()
async def test_a_complete_region_needs_no_daemon() -> None:
    data = content(2)
    with Memory.map(2 * PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(data)))
            region.touch()
        assert bytes(region.buffer()) == data
