from __future__ import annotations

import ctypes
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.uapi.events import (
    FORK,
    KIND_OF_FLAGS,
    MESSAGE,
    PAGEFAULT,
    REMAP,
    REMOVE,
    UNMAP,
    Event,
    FaultFlags,
    FaultKind,
    ForkEvent,
    PageFault,
    RemapEvent,
    RemoveEvent,
    UnknownEvent,
    UnmapEvent,
    message,
    parse,
)

CODES = (PAGEFAULT, FORK, REMAP, REMOVE, UNMAP)
WORDS = st.integers(0, (1 << 64) - 1)
HALVES = st.integers(0, (1 << 32) - 1)
STRANGERS = st.binary(min_size=32, max_size=32).filter(lambda raw: raw[0] not in CODES)

KNOWN: st.SearchStrategy[Event] = st.one_of(
    st.builds(PageFault, WORDS, st.sampled_from(FaultKind), st.booleans(), HALVES),
    st.builds(ForkEvent, HALVES),
    st.builds(RemapEvent, WORDS, WORDS, WORDS),
    st.builds(RemoveEvent, WORDS, WORDS),
    st.builds(UnmapEvent, WORDS, WORDS),
    st.builds(UnknownEvent, STRANGERS),
)


class Kernel(ctypes.Structure):
    """``struct uffd_msg`` of the header, its page fault spelled out."""

    _fields_ = (
        ("event", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint8),
        ("reserved2", ctypes.c_uint16),
        ("reserved3", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("ptid", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


def raw(code: int, *words: int) -> bytes:
    head = bytes([code]) + bytes(7)
    body = b"".join(word.to_bytes(8, sys.byteorder) for word in words)
    return (head + body).ljust(32, b"\0")


@given(st.binary(max_size=32 * 6 + 31))
def test_any_bytes_give_one_event_for_every_32_and_one_for_the_tail(data: bytes) -> None:
    events = parse(data)
    assert len(events) == -(-len(data) // 32)
    tail = data[len(data) // 32 * 32 :]
    if tail:
        assert events[-1] == UnknownEvent(tail)
    for index in range(len(data) // 32):
        piece = data[index * 32 : index * 32 + 32]
        assert parse(piece) == [events[index]]
        assert isinstance(events[index], UnknownEvent) == (piece[0] not in CODES)


@given(st.sampled_from(CODES), st.binary(min_size=31, max_size=31))
def test_a_known_code_is_never_an_unknown_event_whatever_follows(code: int, rest: bytes) -> None:
    [event] = parse(bytes([code]) + rest)
    types = (PageFault, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent)
    assert type(event) is types[CODES.index(code)]


@given(st.lists(KNOWN, max_size=6), st.binary(max_size=31))
def test_parse_undoes_message(events: list[Event], tail: bytes) -> None:
    data = b"".join(map(message, events)) + tail
    assert parse(data) == events + [UnknownEvent(tail)] * bool(tail)


@given(st.binary(max_size=128), st.data())
def test_only_the_bytes_that_were_read_count(data: bytes, draw: st.DataObject) -> None:
    length = draw.draw(st.integers(0, len(data)))
    expected = parse(data[:length])
    assert parse(data, length) == expected
    assert parse(bytearray(data), length) == expected
    assert parse(memoryview(data), length) == expected


def test_what_was_parsed_does_not_change_with_the_buffer() -> None:
    buffer = bytearray(b"\xff" * 40)
    events = parse(buffer)
    buffer[:] = bytes(40)
    assert events == [UnknownEvent(b"\xff" * 32), UnknownEvent(b"\xff" * 8)]


@given(st.integers(0, 7), WORDS, HALVES, HALVES)
def test_page_faults_are_read_as_the_kernel_lays_them_out(
    flags: int, address: int, thread: int, padding: int
) -> None:
    sent = Kernel(event=PAGEFAULT, flags=flags, address=address, ptid=thread, padding=padding)
    [event] = parse(bytes(sent))
    assert MESSAGE.size == ctypes.sizeof(Kernel) == 32
    assert event == PageFault(address, KIND_OF_FLAGS[flags], bool(flags & 1), thread)


@pytest.mark.parametrize(
    ("flags", "kind", "write"),
    [
        (0, FaultKind.MISSING, False),
        (FaultFlags.WRITE, FaultKind.MISSING, True),
        (FaultFlags.WP, FaultKind.WP, False),
        (FaultFlags.WP | FaultFlags.WRITE, FaultKind.WP, True),
        (FaultFlags.MINOR, FaultKind.MINOR, False),
        (FaultFlags.MINOR | FaultFlags.WRITE, FaultKind.MINOR, True),
        (FaultFlags.WP | FaultFlags.MINOR, FaultKind.WP, False),
        (FaultFlags.RWP, FaultKind.UNKNOWN, False),
        (FaultFlags.RWP | FaultFlags.WRITE, FaultKind.UNKNOWN, True),
        (FaultFlags.RWP | FaultFlags.WP, FaultKind.UNKNOWN, False),
        (1 << 63, FaultKind.UNKNOWN, False),
    ],
)
def test_fault_flags(flags: int, kind: FaultKind, write: bool) -> None:
    [event] = parse(raw(PAGEFAULT, flags, 0x1234, 7))
    assert event == PageFault(0x1234, kind, write, 7)


BY_HAND = [
    (raw(0x12, 0b001, 0x1234, 7), PageFault(0x1234, FaultKind.MISSING, True, 7)),
    (raw(0x12, 0b010, 0x1234, 7), PageFault(0x1234, FaultKind.WP, False, 7)),
    (raw(0x12, 0b100, 0x1234, 7), PageFault(0x1234, FaultKind.MINOR, False, 7)),
    (raw(0x12, 0b1001, 0x1234, 7), PageFault(0x1234, FaultKind.UNKNOWN, True, 7)),
    (raw(0x13, 5), ForkEvent(5)),
    (raw(0x14, 0x1000, 0x9000, 0x2000), RemapEvent(0x1000, 0x9000, 0x2000)),
    (raw(0x15, 0x1000, 0x3000), RemoveEvent(0x1000, 0x3000)),
    (raw(0x16, 0x1000, 0x3000), UnmapEvent(0x1000, 0x3000)),
    (raw(0x17, 1, 2, 3), UnknownEvent(raw(0x17, 1, 2, 3))),
    (raw(0x11), UnknownEvent(raw(0x11))),
]


@pytest.mark.parametrize(("sent", "event"), BY_HAND)
def test_events_by_hand(sent: bytes, event: Event) -> None:
    assert parse(sent) == [event]
    assert message(event) == sent


def test_nothing_is_no_event() -> None:
    assert parse(b"") == []
