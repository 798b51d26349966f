"""Programs that end while they guard memory: ``python -m tests.hangs.ending name way``.

Each is a whole interpreter, since it is the end of one that is tested: how it ends is what its
parent looks at.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import trio

from tests.hangs import ending_policies
from tests.hangs.ending_policies import DATA
from tests.support.deadline import DEADLINE
from tests.support.page_contents import PAGE
from uffdaemon import (
    CopyFrom,
    Daemon,
    FileSource,
    GuardedRegion,
    Memory,
    Shutdown,
    Watchdog,
    actions,
    errors,
    open_daemon,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from uffdaemon.placement import Then

Way: TypeAlias = Literal["thread", "in-thread", "external", "in_process"]
"""Who answers: one of the resolvers of placement="native", or another placement."""
WAYS: tuple[Way, ...] = get_args(Way)

PROGRAMS: dict[str, Callable[[Way], Awaitable[None]]] = {}


def program(run: Callable[[Way], Awaitable[None]]) -> Callable[[Way], Awaitable[None]]:
    """A program, by the name of its function."""
    PROGRAMS[run.__name__] = run
    return run


def _guard(
    daemon: Daemon, way: Way, policy: str = "copied", memory: Memory | None = None
) -> GuardedRegion:
    memory = memory or Memory.map(len(DATA))
    if way == "external":
        path = f"{ending_policies.__name__}:{policy}"
        return daemon.guard(memory, path, placement="external", name="ours")
    answer = getattr(ending_policies, policy)
    if way == "in_process":
        return daemon.guard(memory, answer, placement="in_process", name="ours")
    return daemon.guard(memory, answer, resolver=way, name="ours")


async def _waiting(daemon: Daemon, region: GuardedRegion, *, daemonic: bool) -> None:
    """Start a thread; when this returns, it is certain to wait for a page that nobody brings."""
    threading.Thread(target=region.touch, daemon=daemonic).start()
    while not daemon.open_faults():
        if region in daemon.external:
            await daemon.external[region].refresh()
        await trio.lowlevel.checkpoint()


def _byte(region: GuardedRegion, offset: int) -> int:
    """By a plain access where there is one."""
    if region.placement.value != "in_process":
        return region.buffer()[offset]
    found = bytearray(1)
    region.read_into(offset, found)
    return found[0]


# -- threads that end --------------------------------------------------------------------------


@program
async def a_thread_ends_in_the_middle(way: Way) -> None:
    """By sys.exit, and by an error: that is the end of the thread, and of nothing else."""
    async with open_daemon() as daemon:
        region = _guard(daemon, way)

        def leave(how: BaseException, offset: int) -> None:
            assert _byte(region, offset) == DATA[offset]
            raise how

        for thread in (
            threading.Thread(target=leave, args=(SystemExit(3), 0)),
            threading.Thread(target=leave, args=(LookupError("in the middle"), PAGE)),
        ):
            thread.start()
            await trio.to_thread.run_sync(thread.join)
        found = bytearray(len(DATA))
        await trio.to_thread.run_sync(region.read_into, 0, found)
        assert found == DATA


@program
async def a_worker_exits_in_the_middle(way: Way) -> None:
    """What it raises comes out of trio, as it is."""
    async with open_daemon() as daemon:
        region = _guard(daemon, way)

        def leave() -> None:
            assert _byte(region, PAGE) == DATA[PAGE]
            sys.exit(3)

        await trio.to_thread.run_sync(leave)


@program
async def the_block_raises_under_a_reader(way: Way) -> None:
    """A thread that is being answered gets its answer, and the error comes out."""
    async with open_daemon() as daemon, trio.open_nursery() as nursery:
        region = _guard(daemon, way, "answered")
        found = bytearray(len(DATA))
        reading = trio.Event()

        def read() -> None:
            trio.from_thread.run_sync(reading.set)
            region.read_into(0, found)
            assert found == DATA
            print("read", flush=True)

        nursery.start_soon(trio.to_thread.run_sync, read)
        await reading.wait()
        raise LookupError("in the block")


# -- the main thread ends ----------------------------------------------------------------------


@program
async def main_exits_in_the_middle(way: Way) -> None:
    async with open_daemon() as daemon:
        region = _guard(daemon, way)
        assert await trio.to_thread.run_sync(_byte, region, PAGE) == DATA[PAGE]
        sys.exit(3)


@program
async def main_exits_with_an_array_at_hand(way: Way) -> None:
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            array = _guard(daemon, way, memory=memory).array()
            assert array[PAGE] == DATA[PAGE]
            sys.exit(3)


@program
async def main_is_interrupted(way: Way) -> None:
    async with open_daemon() as daemon:
        region = _guard(daemon, way)
        assert await trio.to_thread.run_sync(_byte, region, PAGE) == DATA[PAGE]
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()


@program
async def main_exits_with_a_daemon_thread_waiting(way: Way) -> None:
    async with open_daemon() as daemon:
        await _waiting(daemon, _guard(daemon, way, "held"), daemonic=True)
        sys.exit(3)


@program
async def main_exits_with_a_daemon_thread_waiting_and_takes_long(way: Way) -> None:
    """The interpreter has ended, and with it faulthandler, when the watchdog asks for a stack."""
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.pause, None, None)
    async with open_daemon(watchdog=Watchdog(after=1.0, then="exit")) as daemon:
        await _waiting(daemon, _guard(daemon, way, "held"), daemonic=True)
        sys.exit(3)


@program
async def main_exits_with_a_thread_waiting_that_is_poisoned(way: Way) -> None:
    """One that the interpreter would join."""
    async with open_daemon(on_shutdown=Shutdown.POISON) as daemon:
        await _waiting(daemon, _guard(daemon, way, "held"), daemonic=False)
        sys.exit(3)


@program
async def main_exits_with_a_thread_waiting_whose_memory_is_closed(way: Way) -> None:
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            region = _guard(daemon, way, "held", memory)
            await _waiting(daemon, region, daemonic=False)
            sys.exit(3)


async def _exit_under_a_thread(way: Way, then: Then) -> None:
    """Nobody answers any more, and the interpreter joins the thread: it is the watchdog's."""
    # On a busy machine the daemon is to end sooner than the watchdog speaks.
    async with open_daemon(watchdog=Watchdog(after=1.0, then=then)) as daemon:
        await _waiting(daemon, _guard(daemon, way, "held"), daemonic=False)
        sys.exit(3)


@program
async def main_exits_with_a_thread_waiting_and_is_ended(way: Way) -> None:
    await _exit_under_a_thread(way, "exit")


@program
async def main_exits_with_a_thread_waiting_and_poisons(way: Way) -> None:
    await _exit_under_a_thread(way, "poison")


@program
async def main_exits_with_a_thread_waiting_and_hangs(way: Way) -> None:
    await _exit_under_a_thread(way, "report")


@program
async def main_exits_with_a_thread_waiting_and_nobody_reads_of_it(way: Way) -> None:
    """Standard error is a full pipe: the watchdog's line is lost, and nothing else is."""
    _, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (PAGE, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(size))
    os.set_blocking(writing, True)
    os.dup2(writing, 2)
    await _exit_under_a_thread(way, "exit")


# -- the loop's own thread ---------------------------------------------------------------------


@program
async def the_loops_thread_touches(way: Way) -> None:
    async with open_daemon() as daemon:
        assert bytes(_guard(daemon, way).buffer()) == DATA


@program
async def the_loops_thread_touches_what_it_answers_for(way: Way) -> None:
    async with open_daemon(watchdog=Watchdog(after=0.2, then="exit")) as daemon:
        region = _guard(daemon, way)
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
        ctypes.string_at(region.start, 1)


# -- SIGBUS that is meant ----------------------------------------------------------------------


@program
async def a_page_that_cannot_be_had_is_poisoned(way: Way) -> None:
    """By C, while this thread holds the GIL."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        source = FileSource(file.name)
        file.truncate(PAGE)
        async with open_daemon() as daemon:
            assert way in ("thread", "in-thread")
            region = daemon.guard(
                Memory.map(len(DATA)), CopyFrom(source), resolver=way, on_failure=actions.Poison()
            )
            assert ctypes.string_at(region.start, PAGE) == DATA[:PAGE]
            ctypes.string_at(region.start + PAGE, 1)


@program
async def a_policy_that_fails_has_the_page_poisoned(way: Way) -> None:
    """The thread holds the GIL, and the program ends before it hears of the reason."""
    async with open_daemon() as daemon:
        memory = Memory.map(PAGE)
        path = f"{ending_policies.__name__}:broken"
        region = daemon.guard(memory, path, placement="external", on_failure=actions.Poison())
        await daemon.external[region].ready()
        print(region.buffer()[0])


@program
async def a_page_is_poisoned_by_a_rule(way: Way) -> None:
    async with open_daemon() as daemon:
        ctypes.string_at(_guard(daemon, way, "poisoned").start, 1)


@program
async def a_page_is_poisoned_by_python(way: Way) -> None:
    async with open_daemon() as daemon:
        await trio.to_thread.run_sync(_guard(daemon, way, "poisoned_by_python").touch)


@program
async def a_page_was_poisoned_before(way: Way) -> None:
    """Who would bring zeros finds that something is there, and must not try for ever."""
    async with open_daemon() as daemon:
        region = _guard(daemon, way, "zeros")
        assert region.memory.userfaultfd is not None
        region.memory.userfaultfd.poison(region.start, PAGE)
        ctypes.string_at(region.start, 1)


@program
async def a_page_is_poisoned_by_the_watchdog(way: Way) -> None:
    async with open_daemon(watchdog=Watchdog(after=0.2, then="poison")) as daemon:
        ctypes.string_at(_guard(daemon, way, "answered").start, 1)


@program
async def memory_of_somebody_elses_is_lost(way: Way) -> None:
    """Who has handled SIGBUS before is told of what is none of ours."""
    with tempfile.TemporaryFile() as file:
        file.write(DATA)
        file.flush()
        mapped = mmap.mmap(file.fileno(), len(DATA))
        async with open_daemon() as daemon:
            region = _guard(daemon, way)
            assert bytes(region.buffer()) == DATA
            file.truncate(0)
            print(mapped[0])


# -- the interpreter ends before the daemon ----------------------------------------------------


@program
async def the_interpreter_ends_while_the_daemon_serves(way: Way) -> None:
    """Its loop runs in a daemon thread, which stands still when the last objects are looked after;
    who touches guarded memory then is answered without it."""
    ready = threading.Event()

    async def serve() -> None:
        async with open_daemon(watchdog=Watchdog(after=0.2, then="exit")) as daemon:
            # What is answered by rules would be answered by C, where that loop sleeps.
            policy = "answered" if way == "in_process" else "copied"
            Last.region = _guard(daemon, way, policy)
            ready.set()
            await trio.sleep_forever()

    threading.Thread(target=trio.run, args=(serve,), daemon=True).start()
    await trio.to_thread.run_sync(ready.wait)
    sys.modules["last"] = Last()  # type: ignore[assignment]  # of these it is sure to be let go


class Last:
    """Something that is let go of when the interpreter shuts down."""

    region: GuardedRegion

    def __del__(self, string_at: Callable[[int, int], bytes] = ctypes.string_at) -> None:
        assert sys.is_finalizing()
        found = string_at(self.region.start, len(DATA))
        os.write(1, b"there: %r\n" % (found == DATA))


# -- the daemon ends before the buffer ---------------------------------------------------------


async def _end_under_a_buffer(way: Way, how: Shutdown) -> None:
    async with open_daemon(on_shutdown=how) as daemon:
        buffer = _guard(daemon, way).buffer()
        assert buffer[0] == DATA[0]
    assert buffer[0] == DATA[0]
    print("there:", buffer[PAGE] == DATA[PAGE], flush=True)


@program
async def the_daemon_ends_under_a_buffer(way: Way) -> None:
    await _end_under_a_buffer(way, Shutdown.HOLD)


@program
async def the_daemon_ends_under_a_buffer_and_poisons(way: Way) -> None:
    await _end_under_a_buffer(way, Shutdown.POISON)


@program
async def the_daemon_ends_under_a_buffer_that_is_complete(way: Way) -> None:
    """It needs nobody any more, not even when the interpreter shuts down."""
    async with open_daemon() as daemon:
        region = _guard(daemon, way)
        array = region.array()
        region.prefault()

    @atexit.register
    def look() -> None:
        print("there:", array.tobytes() == DATA, flush=True)


if __name__ == "__main__":
    # Of the thread that gets SIGBUS alone: to look at the stack of one that runs may crash.
    faulthandler.enable(all_threads=False)
    # One that hangs says where, before the test that runs it is killed.  This needs no GIL.
    faulthandler.dump_traceback_later(DEADLINE / 2, exit=True)
    _name, _way = sys.argv[1:]
    assert _way in WAYS
    trio.run(PROGRAMS[_name], _way)
