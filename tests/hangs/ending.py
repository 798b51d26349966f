"""Programs that end while they guard memory: ``python -m tests.hangs.ending name``.

Each is a whole interpreter, since it is the end of one that is tested: how it ends is what its
parent looks at.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from tests.daemon.support import PAGE, Asked, content
from tests.hangs.hung import InPython
from uffdaemon import (
    BytesSource,
    CopyFrom,
    GuardedRegion,
    Memory,
    Resolver,
    Shutdown,
    Watchdog,
    actions,
    errors,
    open_daemon,
)

if TYPE_CHECKING:
    from uffdaemon.placement import ResolverName

DATA = content(4)
_LONG = 15.0  # seconds
_COPY = CopyFrom(BytesSource(DATA))

PROGRAMS: dict[str, Callable[[], Awaitable[None]]] = {}


def program(run: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """A program, by the name of its function."""
    PROGRAMS[run.__name__] = run
    return run


async def _waiting(hold: Asked, region: GuardedRegion, *, daemon: bool) -> threading.Thread:
    """A thread, of which it is certain that it waits for a page that nobody brings."""
    thread = threading.Thread(target=region.touch, daemon=daemon)
    thread.start()
    await hold.times(1)
    return thread


def _hold() -> Asked:
    return Asked(lambda fault: actions.Hold("for the test"))


# -- threads that end --------------------------------------------------------------------------


@program
async def a_thread_ends_in_the_middle() -> None:
    """By sys.exit, and by an error: that is the end of the thread, and of nothing else."""
    async with open_daemon() as daemon:
        region = daemon.guard(Memory.map(len(DATA)), _COPY)
        buffer = region.buffer()

        def leave(how: BaseException, offset: int) -> None:
            assert buffer[offset] == DATA[offset]
            raise how

        for thread in (
            threading.Thread(target=leave, args=(SystemExit(3), 0)),
            threading.Thread(target=leave, args=(LookupError("in the middle"), PAGE)),
        ):
            thread.start()
            await trio.to_thread.run_sync(thread.join)
        assert bytes(buffer) == DATA


@program
async def the_block_raises_under_a_reader() -> None:
    """A thread that is being answered gets its answer, and the error comes out."""
    async with open_daemon() as daemon, trio.open_nursery() as nursery:
        region = daemon.guard(Memory.map(len(DATA)), InPython(DATA))
        found = bytearray(len(DATA))

        async def read() -> None:
            await trio.to_thread.run_sync(region.read_into, 0, found)
            assert found == DATA
            print("read", flush=True)

        nursery.start_soon(read)
        await trio.lowlevel.checkpoint()
        raise LookupError("in the block")


# -- the main thread ends ----------------------------------------------------------------------


@program
async def main_exits_in_the_middle() -> None:
    async with open_daemon() as daemon:
        region = daemon.guard(Memory.map(len(DATA)), _COPY)
        assert region.buffer()[PAGE] == DATA[PAGE]
        sys.exit(3)


@program
async def main_exits_with_a_daemon_thread_waiting() -> None:
    hold = _hold()
    async with open_daemon() as daemon:
        region = daemon.guard(Memory.map(PAGE), hold, placement="in_process")
        await _waiting(hold, region, daemon=True)
        sys.exit(3)


@program
async def main_exits_with_a_daemon_thread_waiting_in_native() -> None:
    hold = _hold()
    async with open_daemon() as daemon:
        await _waiting(hold, daemon.guard(Memory.map(PAGE), hold), daemon=True)
        sys.exit(3)


@program
async def main_exits_with_a_thread_waiting_that_is_poisoned() -> None:
    """One that the interpreter would join."""
    hold = _hold()
    async with open_daemon(on_shutdown=Shutdown.POISON) as daemon:
        await _waiting(hold, daemon.guard(Memory.map(PAGE), hold), daemon=False)
        sys.exit(3)


@program
async def main_exits_with_a_thread_waiting_whose_memory_is_closed() -> None:
    hold = _hold()
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            await _waiting(hold, daemon.guard(memory, hold), daemon=False)
            sys.exit(3)


# -- the loop's own thread ---------------------------------------------------------------------


@program
async def the_loops_thread_touches_native_memory() -> None:
    async with open_daemon() as daemon:
        for resolver in (Resolver.THREAD, Resolver.IN_THREAD):
            region = daemon.guard(Memory.map(len(DATA)), _COPY, resolver=resolver)
            assert bytes(region.buffer()) == DATA


@program
async def the_loops_thread_touches_what_it_answers_for() -> None:
    async with open_daemon(watchdog=Watchdog(after=0.2, then="exit")) as daemon:
        memory = Memory.map(len(DATA))
        region = daemon.guard(memory, _COPY, placement="in_process", name="ours")
        found = bytearray(1)
        for access in (
            lambda: region.read_into(0, found),
            lambda: region.write_from(0, b"x"),
            region.touch,
            region.prefault,
            region.buffer,
        ):
            try:
                access()
            except errors.PlacementRefused as refused:
                print(refused, flush=True)
            else:
                raise AssertionError("not refused")
        ctypes.string_at(memory.start, 1)


# -- the daemon ends before the buffer ---------------------------------------------------------


async def _end_under_a_buffer(resolver: ResolverName, how: Shutdown) -> None:
    async with open_daemon(on_shutdown=how) as daemon:
        region = daemon.guard(Memory.map(len(DATA)), _COPY, resolver=resolver, name="ours")
        buffer = region.buffer()
        assert buffer[0] == DATA[0]
    assert buffer[0] == DATA[0]
    print("there:", buffer[PAGE] == DATA[PAGE], flush=True)


@program
async def the_daemon_ends_under_a_buffer() -> None:
    await _end_under_a_buffer("thread", Shutdown.HOLD)


@program
async def the_daemon_ends_under_a_buffer_in_thread() -> None:
    await _end_under_a_buffer("in-thread", Shutdown.HOLD)


@program
async def the_daemon_ends_under_a_buffer_and_poisons() -> None:
    await _end_under_a_buffer("thread", Shutdown.POISON)


@program
async def the_daemon_ends_under_a_buffer_that_is_complete() -> None:
    """It needs nobody any more, not even when the interpreter shuts down."""
    async with open_daemon() as daemon:
        region = daemon.guard(Memory.map(len(DATA)), _COPY)
        array = region.array()
        region.prefault()

    @atexit.register
    def look() -> None:
        print("there:", array.tobytes() == DATA, flush=True)


if __name__ == "__main__":
    # One that hangs says where.  This needs no GIL.
    faulthandler.dump_traceback_later(_LONG, exit=True)
    trio.run(PROGRAMS[sys.argv[1]])
