"""The C side of serving: rules, ports, and the sleep that serves.

A `Port` belongs to one userfaultfd; a `Waiter` sleeps in the event loop's place and serves its
ports by their rules meanwhile.  Both are used by the event loop's thread alone.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from uffdaemon.native import PinnedBuffer
from uffdaemon.native._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable
    from mmap import mmap

_RULE: Final = struct.Struct("=10Q")
_RECORD: Final = struct.Struct("=32sIIQQ8x")
MESSAGE_BATCH: Final = 128
"""Messages that C reads in one go; fewer mean that no more were pending."""
_CAPACITY: Final = 4 * MESSAGE_BATCH

KINDS: Final = 8
CODES: Final = 16
LOOP: Final = (1 << 64) - 1
"""Stands for the event loop's own descriptor among the ports of a `Waiter`."""

WAIT_TIME, WAIT_LOOP, WAIT_PYTHON = 0, 1, 2
"""Why a `Waiter` came back: time or signal; the loop has something to do; a port has."""


class NativeRule(NamedTuple):
    """``struct uffdaemon_rule``, its fields in order."""

    kind: int
    start: int
    end: int
    code: int
    mode: int
    source: int
    origin: int
    page_size: int
    window: int
    pages: PinnedBuffer
    """The region's bitmap of present pages, which the rule keeps alive."""


class Record(NamedTuple):
    """A message, and what C did about it."""

    message: bytes
    code: int
    """0: it is Python's; else the operation that answered it."""
    present: int
    """Not 0: the page had been there before."""
    latency: int
    """Nanoseconds."""
    done: int
    """Bytes that the operation brought about; 0 in all but the first record it answered."""


class Port:
    """One userfaultfd as C serves it."""

    def __init__(self, fd: int, reread_limit: int) -> None:
        self._records = bytearray(_RECORD.size * _CAPACITY)
        self._keep: list[Any] = []
        self._port: Any = ffi.new("struct uffdaemon_port *")
        self._port.fd = fd
        self._port.capacity = _CAPACITY
        self._port.reread_limit = reread_limit
        self._pinned_records: Any = ffi.from_buffer(self._records)
        self._port.records = int(ffi.cast("uintptr_t", self._pinned_records))

    @property
    def address(self) -> int:
        """Where C finds it."""
        return int(ffi.cast("uintptr_t", self._port))

    @property
    def error(self) -> int:
        """The errno of a read that failed; 0: none."""
        return int(self._port.error)

    @property
    def has_records(self) -> bool:
        """Whether `take` would return anything."""
        return bool(self._port.count)

    @property
    def rereads(self) -> int:
        """How often an empty read is repeated at the moment."""
        return int(self._port.rereads)

    @property
    def record_all(self) -> bool:
        """Whether faults that rules answer are recorded as well."""
        return bool(self._port.record_all)

    @record_all.setter
    def record_all(self, value: bool) -> None:
        self._port.record_all = value

    def set_rules(self, rules: list[NativeRule]) -> None:
        """Replace all rules; they must be sorted by (kind, start) and not overlap."""
        packed = bytearray(_RULE.size * len(rules))
        for index, rule in enumerate(rules):
            _RULE.pack_into(packed, index * _RULE.size, *rule[:9], rule.pages.address)
        pinned = ffi.from_buffer(packed)
        self._port.rule_count = 0
        self._keep = [pinned, [rule.pages for rule in rules]]
        self._port.rules = int(ffi.cast("uintptr_t", pinned))
        self._port.rule_count = len(rules)

    def drop_rules(self) -> None:
        """Have C answer nothing any more, until there are new rules.  From any thread."""
        self._port.rule_count = 0

    def serve(self) -> None:
        """Read and answer by rules whatever is pending.  Never sleeps."""
        lib.uffdaemon_serve(self._port)

    def take(self) -> list[Record]:
        """The records since the last time."""
        count = int(self._port.count)
        if not count:
            return []
        size = _RECORD.size
        found = [
            Record(*_RECORD.unpack_from(self._records, index * size)) for index in range(count)
        ]
        self._port.count = 0
        self._port.forwarded = 0
        return found

    def counts(self) -> Iterable[tuple[int, int, int]]:
        """(fault flags, operation, how often) of the faults that rules have answered; operation 0
        counts pages that had been there before."""
        for flags in range(KINDS):
            row = self._port.counts[flags]
            for code in range(CODES):
                if row[code]:
                    yield flags, code, int(row[code])

    def bytes_by_code(self) -> Iterable[tuple[int, int]]:
        """(operation, bytes that rules brought about by it)."""
        for code in range(CODES):
            if self._port.bytes[code]:
                yield code, int(self._port.bytes[code])

    def latencies(self) -> list[int]:
        """How many faults rules answered in under 2**n nanoseconds, and no less than half that."""
        return [int(count) for count in self._port.latencies]

    def reads(self) -> tuple[int, int]:
        """(reads of the userfaultfd, those that found nothing)."""
        return int(self._port.reads), int(self._port.empty_reads)


class Waiter:
    """Sleeps in the place of the event loop."""

    def __init__(self) -> None:
        self.fd = int(lib.uffdaemon_wait_open())
        if self.fd < 0:
            raise OSError(-self.fd, "epoll_create1")

    def add(self, fd: int, port: int) -> int:
        """Wait for a port's userfaultfd, or with `LOOP` for the loop's epoll: 0 or -errno."""
        return int(lib.uffdaemon_wait_add(self.fd, fd, port))

    def remove(self, fd: int) -> int:
        """Wait for it no more: 0 or -errno."""
        return int(lib.uffdaemon_wait_remove(self.fd, fd))

    def wait(self, timeout: int) -> int:
        """Sleep and serve for at most `timeout` nanoseconds; ``WAIT_*`` or -errno."""
        return int(lib.uffdaemon_wait(self.fd, timeout))


def pin(buffer: bytearray | mmap) -> PinnedBuffer:
    """Keep a bitmap in place."""
    return PinnedBuffer(buffer, writable=True)
