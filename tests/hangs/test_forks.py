"""Children of a process that guards its own memory, and memory that Python itself discards, moves
and unmaps: nobody hangs over an event, and nobody sees zeros where data was due."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import pytest
import trio

from tests.hangs import ending_policies
from tests.hangs.pattern import map_memory, view_of
from tests.support.calls import in_thread
from tests.support.clib import Helpers
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    ByRange,
    BytesSource,
    CopyFrom,
    Daemon,
    Memory,
    Region,
    open_daemon,
)
from uffdaemon.lowlevel import Features, Userfaultfd

_DATA = content(4)
_NONE = Features(0)
_MAYMOVE, _FIXED = 1, 2  # MREMAP_* of include/uapi/linux/mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc_held = ctypes.PyDLL(None)  # keeps the GIL around each call
for _library in (_libc, _libc_held):
    _library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _library.mremap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    _library.mremap.restype = ctypes.c_void_p

Way: TypeAlias = Literal["thread", "in-thread", "external"]
"""Who answers: a resolver of this process, or a daemon of its own."""

every_way = pytest.mark.parametrize("way", get_args(Way))

forking = pytest.mark.parametrize(
    ("way", "event"),
    [
        ("thread", True),
        ("thread", False),
        ("in-thread", False),
        ("external", True),
        ("external", False),
    ],
    ids=["thread-event", "thread-no-event", "in-thread", "external-event", "external-no-event"],
)

# -- children ----------------------------------------------------------------------------------

Look: TypeAlias = Callable[[], bytes]
"""Reads guarded memory, with the GIL held."""

_SEGFAULT = -signal.SIGSEGV


def _os_fork(look: Look) -> bytes | int:
    """What the child has seen, or how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writing, look())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return _seen(reading, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _multiprocessing_fork(look: Look) -> bytes | int:
    reading, writing = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_write_what, args=(writing, look))
    child.start()
    os.close(writing)
    child.join()
    assert child.exitcode is not None
    return _seen(reading, child.exitcode)


def _write_what(writing: int, look: Look) -> None:
    os.write(writing, look())


def _preexec_fn(look: Look) -> bytes | int:
    """subprocess forks for it as it did of old, and holds the GIL meanwhile."""
    reading, writing = os.pipe()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", ""],
            preexec_fn=lambda: _write_what(writing, look),  # what is tested
            check=False,
        )
        status = ended.returncode
    except subprocess.SubprocessError:  # it died before it said anything
        status = _SEGFAULT
    os.close(writing)
    return _seen(reading, status)


def _seen(reading: int, status: int) -> bytes | int:
    with os.fdopen(reading, "rb") as pipe:
        seen = pipe.read()
    return status or seen


def _look(address: int) -> bytes:
    return ctypes.string_at(address, len(_DATA))


@forking
@kernel_test(features=Features.EVENT_FORK | Features.SIGBUS)
async def test_children_see_what_is_right_or_nothing(way: Way, event: bool) -> None:
    async with open_daemon() as daemon:
        for how in (_os_fork, _multiprocessing_fork, _preexec_fn):
            for touched in (0, PAGE, len(_DATA)):
                memory, buffer = _guard_with(daemon, way, event=event)
                assert bytes(buffer[:touched]) == _DATA[:touched]
                look = partial(_look, memory.start)
                seen = await trio.to_thread.run_sync(how, look)
                print(how.__name__, touched, seen if isinstance(seen, int) else len(seen))
                assert seen == (_DATA if event else _SEGFAULT)
                assert bytes(buffer) == _DATA
        assert not daemon.open_faults()


@forking
@kernel_test(features=Features.EVENT_FORK | Features.SIGBUS)
async def test_forks_in_the_loops_own_thread(way: Way, event: bool) -> None:
    """The thread that forks is the one that would have to read of it."""
    async with open_daemon() as daemon:
        memory, buffer = _guard_with(daemon, way, event=event)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if _look(memory.start) == _DATA else 1)
        status = (await trio.to_thread.run_sync(os.waitpid, pid, 0))[1]
        assert os.waitstatus_to_exitcode(status) == (0 if event else _SEGFAULT)
        # Children that do not look hang nobody, whoever starts them.
        fork = multiprocessing.get_context("fork")
        spawn = multiprocessing.get_context("spawn")
        for context in (fork, spawn):
            child = context.Process(target=_nothing)
            child.start()
            child.join()
            assert child.exitcode == 0
        for preexec_fn in (None, _nothing):
            subprocess.run([sys.executable, "-c", ""], preexec_fn=preexec_fn, check=True)  # noqa: ASYNC221  # what is tested
        assert bytes(buffer) == _DATA


def _nothing() -> None:
    """Something for a child to do."""


def _guard_with(daemon: Daemon, way: Way, *, event: bool) -> tuple[Memory, memoryview]:
    """With EVENT_FORK children are served as well; without it they do not get the memory."""
    if event:
        # It is asked for where it may be had.
        return _guard(daemon, way)
    _, memory = map_memory(len(_DATA))
    if way != "in-thread":
        # As for a user who may not have the event.
        memory.userfaultfd = Userfaultfd.open(Features.THREAD_ID)
    return _guard(daemon, way, memory=memory)


def _guard(
    daemon: Daemon, way: Way, features: Features = _NONE, memory: Memory | None = None
) -> tuple[Memory, memoryview]:
    """Fresh memory, unless it is given; it stays until the process ends."""
    if memory is None:
        _, memory = map_memory(len(_DATA))
    features |= Features.THREAD_ID
    if way == "external":
        path = f"{ending_policies.__name__}:copied"
        region = daemon.guard(memory, path, placement="external", features=features)
    else:
        policy = CopyFrom(BytesSource(_DATA))
        region = daemon.guard(memory, policy, resolver=way, features=features)
    return memory, region.buffer()


_FORKS = 200
_REGION = 64 * PAGE
"""With a rule for each page: more than some functions of libc sort without allocating."""


@kernel_test(features=Features.EVENT_FORK | Features.EVENT_REMAP)
async def test_forks_beside_everything_that_changes_rules(helpers: Path) -> None:
    """fork(3) holds malloc's locks until its event has been read: who reads it takes none of them,
    whatever else it does meanwhile."""
    library = Helpers(helpers)
    policy = ByRange([(page * PAGE, PAGE, CopyFrom(BytesSource(_DATA))) for page in range(64)])
    forked = 0

    def fork_often() -> None:
        nonlocal forked
        try:
            forked = library.fork_often(_FORKS)
        finally:
            over.set()

    def move() -> None:
        while not over.is_set():
            memory.remap()

    over = threading.Event()
    memory = Memory.map(_REGION)
    async with open_daemon(on_fork="close") as daemon, trio.open_nursery() as nursery:
        daemon.guard(memory, policy)
        nursery.start_soon(trio.to_thread.run_sync, fork_often)
        nursery.start_soon(trio.to_thread.run_sync, move)
        while not over.is_set():
            with Memory.map(PAGE, dont_fork=True) as other:
                region = daemon.guard(other, CopyFrom(BytesSource(_DATA)))
                await trio.lowlevel.checkpoint()
                daemon.remove_region(region, "release")
    assert forked == _FORKS


# -- discarding, moving, unmapping -------------------------------------------------------------

_EVENTS = {
    "none": _NONE,
    "remove": Features.EVENT_REMOVE,
    "remap": Features.EVENT_REMAP,
    "unmap": Features.EVENT_UNMAP,
    "all": Features.EVENT_REMOVE | Features.EVENT_REMAP | Features.EVENT_UNMAP,
}

every_event = pytest.mark.parametrize(
    ("events", "way"),
    [
        pytest.param(events, way, id=f"{name}-{way}")
        for way in get_args(Way)
        for name, events in _EVENTS.items()
        if way != "external" or name in ("none", "all")  # each of its regions takes half a second
    ],
)


@every_event
@kernel_test(features=_EVENTS["all"] | Features.SIGBUS)
async def test_what_python_discards_is_zeros_afterwards(events: Features, way: Way) -> None:
    """Or, where nobody hears of it, what the policy says."""

    def by_memory(memory: Memory, mapping: mmap.mmap) -> None:
        memory.advise(Advice.DONTNEED, PAGE, 2 * PAGE)

    def by_cdll(memory: Memory, mapping: mmap.mmap) -> None:
        assert _libc.madvise(memory.start + PAGE, 2 * PAGE, mmap.MADV_DONTNEED) == 0

    def by_pydll(memory: Memory, mapping: mmap.mmap) -> None:
        assert _libc_held.madvise(memory.start + PAGE, 2 * PAGE, mmap.MADV_DONTNEED) == 0

    def by_mmap(memory: Memory, mapping: mmap.mmap) -> None:
        mapping.madvise(mmap.MADV_DONTNEED, PAGE, 2 * PAGE)

    zeros = bytes(2 * PAGE)
    discarded = zeros if Features.EVENT_REMOVE in events else _DATA[PAGE : 3 * PAGE]
    expected = _DATA[:PAGE] + discarded + _DATA[3 * PAGE :]
    hows, halves = [by_memory, by_cdll, by_pydll, by_mmap], [False, True]
    if way == "external":  # each of its regions is two processes
        hows, halves = [by_memory, by_pydll], [False]
    async with open_daemon() as daemon:
        for how in hows:
            for touched in (0, len(_DATA)):
                for half in halves:
                    in_worker = half is not (touched == 0)
                    print(how.__name__, touched, in_worker)
                    mapping, memory = map_memory(len(_DATA))
                    _, buffer = _guard(daemon, way, events, memory)
                    assert bytes(buffer[:touched]) == _DATA[:touched]
                    if in_worker:
                        await trio.to_thread.run_sync(how, memory, mapping)
                    else:
                        how(memory, mapping)
                    assert bytes(buffer) == expected
        assert not daemon.open_faults()


@every_way
@pytest.mark.parametrize("held", [False, True], ids=["cdll", "pydll"])
@kernel_test(features=_EVENTS["all"] | Features.SIGBUS)
async def test_what_python_moves_elsewhere_is_served_there(held: bool, way: Way) -> None:
    """With EVENT_REMAP; without it the kernel stops watching what is moved, and tells nobody."""
    library = _libc_held if held else _libc
    async with open_daemon() as daemon:
        for events in (Features.EVENT_REMAP, _EVENTS["all"]):
            for touched in (0, PAGE):
                memory, buffer = _guard(daemon, way, events)
                assert bytes(buffer[:touched]) == _DATA[:touched]
                elsewhere = Memory.map(len(_DATA)).start
                length = len(_DATA)
                to = library.mremap(memory.start, length, length, _MAYMOVE | _FIXED, elsewhere)
                assert to == elsewhere
                assert bytes(view_of(to, length)) == _DATA
        assert not daemon.open_faults()


@every_event
@kernel_test(features=_EVENTS["all"] | Features.SIGBUS)
async def test_what_python_unmaps_takes_nothing_else_with_it(events: Features, way: Way) -> None:
    async with open_daemon() as daemon:
        for library in (_libc, _libc_held):
            for touched in (0, PAGE):
                memory, buffer = _guard(daemon, way, events)
                assert bytes(buffer[:touched]) == _DATA[:touched]
                assert library.munmap(memory.start + 2 * PAGE, PAGE) == 0
                assert bytes(buffer[: 2 * PAGE]) == _DATA[: 2 * PAGE]
                assert bytes(buffer[3 * PAGE :]) == _DATA[3 * PAGE :]
        assert not daemon.open_faults()


@pytest.mark.parametrize("pages", [1, 8])
@pytest.mark.parametrize("way", ["thread", "in-thread"])
@kernel_test(features=Features.EVENT_REMOVE | Features.SIGBUS)
async def test_discards_without_end_starve_nobody(
    way: Literal["thread", "in-thread"], pages: int, helpers: Path
) -> None:
    """Faults are resolved between two events, with the GIL held all the while."""
    data, stop = content(64), ctypes.c_int()
    memory = Memory.map(len(data))
    library = Helpers(helpers)
    async with open_daemon() as daemon:
        region = daemon.guard(
            memory, CopyFrom(BytesSource(data)), features=Features.EVENT_REMOVE, resolver=way
        )
        buffer = region.buffer()
        discarding = in_thread(library.discard_until, memory.start, pages * PAGE, stop)
        while not daemon.statistics().events.get("remove"):  # the thread has begun
            await trio.lowlevel.checkpoint()
        for page in range(8, 64):
            assert buffer[page * PAGE] == data[page * PAGE]
        stop.value = 1
        assert await trio.to_thread.run_sync(discarding.result)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["rules", "fetched"])
@pytest.mark.parametrize("native_sleep", [True, False], ids=["in-c", "in-trio"])
@kernel_test(features=Features.EVENT_REMOVE)
async def test_discards_without_end_do_not_stop_the_loop(
    native_sleep: bool, asynchronous: bool, helpers: Path
) -> None:
    """The same where trio serves: what it has fetched is copied between two events as well."""
    data, stop = content(64), ctypes.c_int()

    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return data[offset : offset + length]

    memory = Memory.map(len(data))
    library = Helpers(helpers)
    source = AsyncSource(fetch, len(data)) if asynchronous else BytesSource(data)
    with Userfaultfd.open(Features.EVENT_REMOVE) as uffd:
        async with open_daemon(native_sleep=native_sleep) as daemon:
            daemon.add_region(uffd, Region(memory.start, memory.length, CopyFrom(source)))
            discarding = in_thread(library.discard_until, memory.start, PAGE, stop)
            for page in range(8, 64):
                seen = await trio.to_thread.run_sync(memory.read, page * PAGE, PAGE)
                assert seen == data[page * PAGE : (page + 1) * PAGE]
            stop.value = 1
            assert await trio.to_thread.run_sync(discarding.result)
            memory.close()
