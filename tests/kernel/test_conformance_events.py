"""The kernel's tests sigbus, sigbus-wp, events and events-wp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kernel.conformance import (
    WP,
    Counts,
    Handler,
    conformance,
    content,
    discard,
    map_area,
    page_offsets,
    placed,
)
from tests.support.calls import in_child
from tests.support.clib import Helpers
from uffdaemon import FaultKind, Memory, MemoryType
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.uapi.events import PageFault

_BUS_ADRERR = 2  # asm-generic/siginfo.h
_SIGBUS = Features.SIGBUS | Features.EVENT_FORK
_EVENTS = Features.EVENT_FORK | Features.EVENT_REMAP | Features.EVENT_REMOVE
_MISSING_AND_WP = RegisterMode.MISSING | RegisterMode.WP


def _no_fault(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
    raise AssertionError(fault)


def _sigbus(kind: MemoryType, library: Helpers, *, write_protect: bool) -> None:
    """One SIGBUS a page and access, and no message: not even in a fork."""
    features = _SIGBUS | (WP if write_protect else Features(0))
    with Userfaultfd.open(features) as uffd, map_area(kind) as memory:
        handler = Handler(memory.start, memory.page_size, _no_fault)
        reader = in_child(handler.run, uffd)
        uffd.register(
            memory.start,
            memory.length,
            _MISSING_AND_WP if write_protect else RegisterMode.MISSING,
        )
        page = memory.page_size
        for offset in page_offsets(memory):
            address = memory.start + offset
            assert library.touch(address) == _BUS_ADRERR
            placed(uffd.copy(address, content(offset, page), write_protect=write_protect))
            assert library.touch(address) == 0
            if write_protect:
                assert library.touch(address, write=True) == _BUS_ADRERR
                placed(uffd.write_protect(address, page, protect=False))
            assert library.touch(address, write=True) == 0
            assert memory.read(offset, page) == content(offset, page)

        discard(memory)
        signalled = in_child(_touch_all, library, memory).result()
        handler.stop.cross()
        counts = reader.result()
        assert signalled == memory.length // page
        assert counts == Counts(forks=1)


def _touch_all(library: Helpers, memory: Memory) -> int:
    return sum(
        library.touch(memory.start + offset, write=True) == _BUS_ADRERR
        for offset in page_offsets(memory)
    )


@conformance("sigbus", _SIGBUS)
def test_sigbus(kind: MemoryType, helpers: Path) -> None:
    _sigbus(kind, Helpers(helpers), write_protect=False)


@conformance("sigbus-wp", _SIGBUS | WP)
def test_sigbus_wp(kind: MemoryType, helpers: Path) -> None:
    _sigbus(kind, Helpers(helpers), write_protect=True)


def _use(memory: Memory) -> None:
    """Fault, move the memory in the middle, discard it, and find zeros."""
    page, half = memory.page_size, memory.length // 2
    for offset in page_offsets(memory):
        if offset == half:
            memory.remap()
        assert memory.read(offset, page) == content(offset, page)
        memory.touch(offset, page, write=True)
    discard(memory)
    assert memory.read(0, memory.length) == bytes(memory.length)


def _events(kind: MemoryType, *, write_protect: bool) -> None:
    """A fork that nobody told of userfaultfd forks, remaps and discards under a handler's eyes."""
    features = _EVENTS | (WP if write_protect else Features(0))
    with Userfaultfd.open(features) as uffd, map_area(kind) as memory:
        page = memory.page_size

        def answer(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            start = fault.address // page * page
            if fault.kind is FaultKind.WP:
                assert fault.write
                placed(uffd.write_protect(start, page, protect=False))
            else:
                data = content(offset, page)
                placed(uffd.copy(start, data, write_protect=write_protect))

        handler = Handler(memory.start, page, answer)
        reader = in_child(handler.run, uffd)
        uffd.register(
            memory.start,
            memory.length,
            _MISSING_AND_WP if write_protect else RegisterMode.MISSING,
        )
        in_child(_use, memory).result()
        handler.stop.cross()
        counts = reader.result()
        pages = memory.length // page
        assert counts == Counts(
            missing=pages,
            write_protect=pages if write_protect else 0,
            forks=1,
            remaps=1,
            removes=1,
        )


@conformance("events", _EVENTS)
def test_events(kind: MemoryType) -> None:
    _events(kind, write_protect=False)


@conformance("events-wp", _EVENTS | WP)
def test_events_wp(kind: MemoryType) -> None:
    _events(kind, write_protect=True)
