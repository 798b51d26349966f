"""Hooks that have rules written anew, or look after more memory, while events are being taken in.

Nobody but C can answer what they touch: they run in the event loop's thread.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

import trio.testing

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import BytesSource, CopyFrom, Daemon, Hooks, Memory, Region, Resolved, open_daemon
from uffdaemon.lowlevel import Event, Features, RemoveEvent, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

_PAGES = 16
_libc = ctypes.PyDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.argtypes += [ctypes.c_void_p]
_libc.mremap.restype = ctypes.c_void_p
_MREMAP_MAYMOVE_FIXED = 3


def _byte(address: int) -> int:
    return ctypes.string_at(address, 1)[0]


def _discard(address: int) -> None:
    assert _libc.madvise(address, PAGE, mmap.MADV_DONTNEED) == 0


class _Act:
    """Does something once."""

    def __init__(self) -> None:
        self.action: Callable[[], None] | None = None
        self.error: BaseException | None = None

    def __call__(self) -> None:
        action, self.action = self.action, None
        if action is not None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001  # hooks may raise, and this says it
                self.error = error


def _serve(daemon: Daemon, uffd: Userfaultfd, memory: Memory, data: bytes) -> Region:
    region = Region(memory.start, memory.length, CopyFrom(BytesSource(data)))
    return daemon.add_region(uffd, region, resolver="thread")


@kernel_test(features=Features.EVENT_REMOVE)
async def test_an_after_hook_that_has_rules_written_anew_loses_no_discarded_page() -> None:
    """It is told of what came before: what was discarded since, Python has not noted yet."""
    data = content(_PAGES)
    act = _Act()
    seen: list[int] = []

    def after(resolved: Resolved) -> None:
        del resolved
        act()

    uffd = Userfaultfd.open(Features.THREAD_ID | Features.EVENT_REMOVE)
    memory, other = Memory.map(len(data)), Memory.map(len(data))
    async with open_daemon(hooks=[Hooks(after=after)]) as daemon:
        _serve(daemon, uffd, memory, data)
        await trio.testing.wait_all_tasks_blocked()

        def add() -> None:
            _serve(daemon, uffd, other, data)
            seen.append(_byte(memory.start + PAGE))

        act.action = add
        assert _byte(memory.start) == data[0]  # what the hook is told of
        _discard(memory.start + PAGE)
        await trio.testing.wait_all_tasks_blocked()
        assert act.error is None
        assert seen == [0]
        assert _byte(memory.start + 2 * PAGE) == data[2 * PAGE]
    memory.close()
    other.close()
    uffd.close()


@kernel_test(features=Features.EVENT_REMOVE | Features.EVENT_REMAP)
async def test_events_that_a_hook_has_taken_in_come_after_those_before_them() -> None:
    """A page is discarded where memory lies since an event that is still to be applied."""
    data = content(_PAGES)
    act = _Act()

    def remove(event: Event) -> None:
        assert isinstance(event, RemoveEvent)
        act()

    uffd = Userfaultfd.open(Features.THREAD_ID | Features.EVENT_REMOVE | Features.EVENT_REMAP)
    memory, other, room = (Memory.map(len(data)) for _ in range(3))
    async with open_daemon(hooks=[Hooks(remove=remove)]) as daemon:
        region = _serve(daemon, uffd, memory, data)
        await trio.testing.wait_all_tasks_blocked()
        old, new = memory.start, room.start

        def discard_and_add() -> None:
            _discard(new + PAGE)
            _serve(daemon, uffd, other, data)

        act.action = discard_and_add
        _discard(old)
        assert _libc.mremap(old, len(data), len(data), _MREMAP_MAYMOVE_FIXED, new) == new
        await trio.testing.wait_all_tasks_blocked()
        assert act.error is None
        assert region.pages.removed.runs() == [(0, 2)]
        assert [_byte(new + page * PAGE) for page in range(3)] == [0, 0, data[2 * PAGE]]
