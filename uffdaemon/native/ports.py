"""The C side of serving: rules, ports, and the sleep that serves.

A `Port` belongs to one userfaultfd.  A `Waiter` sleeps in place of the event loop, and serves its
ports by their rules meanwhile.  Only the event loop's thread uses them.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from uffdaemon.native._native import ffi, lib
from uffdaemon.native.page_book import PageBook, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.native import OperationArray
    from uffdaemon.native.message_journal import MessageJournal

_RULE: Final = struct.Struct("=12Q")
_RECORD: Final = struct.Struct("=32sIIQQQ")
MESSAGE_BATCH: Final = 128
"""Messages that C reads at a time; fewer mean that no more were pending."""
_CAPACITY: Final = 4 * MESSAGE_BATCH
_PAGEFAULT: Final = 0x12
_FORK: Final = 0x13
_APPLIED: Final = 1

KINDS: Final = 8
CODES: Final = 16
LOOP: Final = (1 << 64) - 1
"""In place of a port: the event loop's own descriptor."""

WAIT_TIME, WAIT_LOOP, WAIT_PYTHON = 0, 1, 2
"""Why a `Waiter` returned: timeout or signal; the event loop is ready; a port has records."""

ZEROPAGE: Final = 1
"""For `NativeRule.zeros`: discarded pages become the zero page."""


class NativeRule(NamedTuple):
    """``struct uffdaemon_rule``, its fields in order."""

    kind: int
    start: int
    end: int
    code: int
    """0: Python resolves faults at these addresses."""
    mode: int
    source: int
    origin: int
    page_size: int
    window: int
    pages: PageBook
    """The page book of the region, which the rule keeps alive."""
    zeros: int
    """For discarded pages: 0, the same as before; `ZEROPAGE`; or the address of a page of zeros."""
    refusal: int
    """The operation for a page that the rule cannot fill; 0: forward the fault to Python."""


class Record(NamedTuple):
    """A message, and how C resolved it."""

    message: bytes
    code: int
    """0: forwarded to Python; else the operation that resolved the fault."""
    present: int
    """Not 0: the page was present already."""
    latency: int
    """Nanoseconds until it was resolved; if forwarded, the time at which it was read."""
    done: int
    """Bytes that the operation filled; 0 in all but the first record that it resolved."""
    error: int
    """The errno with which a rule failed; 0: none.  Of an event: its place in the journal; 0: there
    is none, or the page books tell all about it."""

    @property
    def applied(self) -> bool:
        """Of an event: whether C has applied it to the page books."""
        return self.present == _APPLIED and self.message[0] != _PAGEFAULT

    def snapshot(self) -> Snapshot | None:
        """The page books that a FORK event carries.  Call it once for each record."""
        return Snapshot(self.done) if self.message[0] == _FORK and self.done else None


class Port:
    """One userfaultfd as C serves it.

    C applies events to the rules and page books itself.  With ``notified``, something other than
    the event loop serves it: an eventfd, `notify`, becomes readable when there are records.
    """

    def __init__(self, fd: int, reread_limit: int, *, notified: bool = False) -> None:
        self.notify: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if notified else -1
        self._records = bytearray(_RECORD.size * _CAPACITY)
        self._pinned_records: Any = ffi.from_buffer("struct uffdaemon_record[]", self._records)
        made = lib.uffdaemon_port_new(fd, reread_limit, self.notify)
        if made == ffi.NULL:
            raise MemoryError
        self._port: Any = ffi.gc(made, lib.uffdaemon_port_free)
        self.events: int = 0
        """How many events C has applied that Python has applied, too."""
        self.place: int = 0
        """The place in the journal of the last event that Python has applied."""
        self._dequeued = 0
        self._dequeued_place = 0
        self._journal: MessageJournal | None = None

    def close(self) -> None:
        """Close its descriptors.  Nothing may serve it any more."""
        lib.uffdaemon_port_close_spare(self._port)
        if self.notify >= 0:
            fd, self.notify = self.notify, -1
            os.close(fd)

    @property
    def address(self) -> int:
        """The address of the C object."""
        return int(ffi.cast("uintptr_t", self._port))

    @property
    def pointer(self) -> Any:  # noqa: ANN401  # cffi's, for `Resolver`
        """The C object, for cffi."""
        return self._port

    @property
    def error(self) -> int:
        """The errno of a read that failed; 0: none."""
        return int(self._port.error)

    @property
    def has_records(self) -> bool:
        """Whether `dequeue` would return anything."""
        return bool(self._port.queue.count)

    @property
    def is_full(self) -> bool:
        """Whether so many records are queued that messages are read slowly."""
        return bool(self._port.queue.count >= self._port.queue.limit)

    @property
    def shortages(self) -> int:
        """How often there was no memory for what reading brings, so that nothing was read."""
        return int(self._port.queue.shortages)

    @property
    def rereads(self) -> int:
        """How often an empty read is repeated at present."""
        return int(self._port.rereads)

    @property
    def record_all(self) -> bool:
        """Whether faults that rules resolve are recorded, too."""
        return bool(self._port.record_all)

    @record_all.setter
    def record_all(self, value: bool) -> None:
        self._port.record_all = value

    def expect_release(self, start: int, length: int) -> None:
        """REMOVE events of this range are those of a release, not of a discard.  At most two ranges
        at a time; any thread may call it."""
        lib.uffdaemon_port_expect_release(self._port, start, start + length)

    def end_release(self, start: int, length: int) -> None:
        """Undo `expect_release`."""
        lib.uffdaemon_port_end_release(self._port, start, start + length)

    def publish(self, rules: list[NativeRule]) -> bool:
        """Replace all rules; they must be sorted by (kind, start) and not overlap.

        False: events were read that may invalidate them; `dequeue` those first.  Raises
        MemoryError.
        """
        packed = bytearray(_RULE.size * len(rules))
        for index, rule in enumerate(rules):
            _RULE.pack_into(packed, index * _RULE.size, *rule[:9], rule.pages.address, *rule[10:])
        pinned = ffi.from_buffer("struct uffdaemon_rule[]", packed)
        number = lib.uffdaemon_port_publish(self._port, pinned, len(rules), self.events)
        if number == -errno.EAGAIN:
            return False
        if number < 0:
            raise MemoryError
        return True

    def withdraw(self) -> None:
        """Withdraw all rules until new ones are published.  Any thread may call it."""
        lib.uffdaemon_port_withdraw(self._port)

    def withdraw_book(self, book: PageBook) -> None:
        """Withdraw the rules of one region, wherever its memory is.  Any thread may call it."""
        lib.uffdaemon_port_withdraw_pages(self._port, book.pointer)

    def withdraw_source(self, start: int, end: int) -> None:
        """Withdraw the rules that move from a range.  Any thread may call it."""
        lib.uffdaemon_port_withdraw_source(self._port, start, end)

    def settle(self) -> None:
        """Wait until events that are being read have been applied and can be taken."""
        lib.uffdaemon_port_settle(self._port)

    def execute(self, operations: OperationArray, count: int) -> None:
        """Carry out the first `count` operations.

        Those that touch what an event was about that Python has not applied end with EAGAIN; all
        do, if that event moved, unmapped or forked memory.
        """
        lib.uffdaemon_port_execute(self._port, operations.pointer, count, self.events)

    def serve(self) -> bool:
        """Read what is pending and resolve it by rules.

        Returns whether more is to be done at once: faults wait for an event's end, or messages
        have followed one another closely.
        """
        return bool(lib.uffdaemon_serve(self._port))

    @property
    def wants_attention(self) -> bool:
        """Whether there are records, or faults that wait for the end of an event, or reading has
        failed."""
        return bool(self._port.queue.count or self._port.postponed or self._port.error)

    def hand_over(self) -> None:
        """Leave what waits for an event's end to Python.  Nothing may serve the port any more."""
        lib.uffdaemon_port_hand_over(self._port)

    def resolve_in_threads(self) -> int:
        """Have faulting threads resolve their faults by rules, in a signal handler: 0 or -errno."""
        return int(lib.uffdaemon_sigbus_add(self._port))

    def leave_threads(self) -> None:
        """Undo `resolve_in_threads`."""
        lib.uffdaemon_sigbus_remove(self._port)

    def release(self, start: int, length: int) -> None:
        """Wake threads that wait in the signal handler for a page of the range."""
        lib.uffdaemon_port_wake(self._port, start, length)

    def dequeue(self, *, at_most: int = sys.maxsize) -> list[Record]:
        """Dequeue the records, the oldest first."""
        if self.notify >= 0:
            with suppress(BlockingIOError):
                os.eventfd_read(self.notify)
        found: list[Record] = []
        capacity = count = min(_CAPACITY, at_most)
        while count == capacity and len(found) < at_most:
            count = int(lib.uffdaemon_port_dequeue(self._port, self._pinned_records, capacity))
            size = _RECORD.size
            for index in range(count):
                record = Record(*_RECORD.unpack_from(self._records, index * size))
                found.append(record)
                if record.present and record.message[0] != _PAGEFAULT:
                    self._dequeued += 1
                    self._dequeued_place = record.error or self._dequeued_place
        return found

    def events_applied(self) -> None:
        """Python has applied all events that it has dequeued."""
        self.events = self._dequeued
        self.place = self._dequeued_place

    def read_through(self, journal: MessageJournal) -> None:
        """Read all messages through a journal.  Called before anything serves the port."""
        self._journal = journal
        self.place = self._dequeued_place = journal.kept
        lib.uffdaemon_port_set_journal(self._port, journal.pointer)

    def saved(self, place: int) -> None:
        """A checkpoint includes the events up to this place in the journal."""
        lib.uffdaemon_port_saved(self._port, place)

    def end_batch(self) -> None:
        """Python has finished what it dequeued; until then it counts as outstanding."""
        if self._port.queue.outstanding_since:
            lib.uffdaemon_port_end_batch(self._port)

    def counts(self) -> Iterable[tuple[int, int, int]]:
        """(fault flags, operation, count) of the faults that rules have resolved; operation 0
        counts pages that were present already, and operation 1
        faults that waited for the end of an event."""
        for flags in range(KINDS):
            row = self._port.counts[flags]
            for code in range(CODES):
                if row[code]:
                    yield flags, code, int(row[code])

    def bytes_by_code(self) -> Iterable[tuple[int, int]]:
        """(operation, bytes that rules filled with it)."""
        for code in range(CODES):
            if self._port.bytes[code]:
                yield code, int(self._port.bytes[code])

    def latencies(self) -> list[int]:
        """Bucket n: faults resolved by rules in less than 2**n nanoseconds, at least half that."""
        return [int(count) for count in self._port.latencies]

    def reads(self) -> tuple[int, int]:
        """(reads of the userfaultfd, empty ones among them)."""
        return int(self._port.reads), int(self._port.empty_reads)


class Waiter:
    """Sleeps in place of the event loop."""

    def __init__(self) -> None:
        self.fd: int = int(lib.uffdaemon_epoll_open())
        if self.fd < 0:
            raise OSError(-self.fd, "epoll_create1")

    def add(self, fd: int, port: int) -> int:
        """Wait for a port's userfaultfd, or with `LOOP` for the loop's epoll: 0 or -errno."""
        return int(lib.uffdaemon_epoll_add(self.fd, fd, port))

    def remove(self, fd: int) -> int:
        """Stop waiting for it: 0 or -errno."""
        return int(lib.uffdaemon_epoll_remove(self.fd, fd))

    def wait(self, timeout: int) -> int:
        """Sleep and serve for at most `timeout` nanoseconds; ``WAIT_*`` or -errno."""
        return int(lib.uffdaemon_epoll_wait(self.fd, timeout, ffi.NULL))


class ResolverThread:
    """A C thread that serves ports without the interpreter."""

    def __init__(self) -> None:
        number = ffi.new("int *")
        self._resolver: Any = lib.uffdaemon_resolver_start(number)
        if self._resolver == ffi.NULL:
            raise OSError(int(number[0]), "starting the resolver's thread")

    @property
    def thread(self) -> int:
        """Its thread id."""
        return int(lib.uffdaemon_resolver_thread(self._resolver))

    def add(self, port: Port) -> int:
        """Serve a port, which has been made with ``notified``: 0 or -errno."""
        return int(lib.uffdaemon_resolver_add(self._resolver, port.pointer))

    def remove(self, port: Port) -> None:
        """Stop serving it; what was pending is in its records."""
        lib.uffdaemon_resolver_remove(self._resolver, port.pointer)

    def stop(self) -> None:
        """End the thread, which must not serve any port."""
        resolver, self._resolver = self._resolver, ffi.NULL
        if resolver != ffi.NULL:
            lib.uffdaemon_resolver_stop(resolver)


def ignore(number: int) -> None:
    """Ignore a signal, unless its action is not the default one."""
    lib.uffdaemon_sigaction_ignore(number)


def read_stacks_from(fd: int) -> None:
    """The watchdog writes to standard error what it can read from `fd`, which must not block."""
    lib.uffdaemon_stall_set_stack_pipe(fd)


class Watch:
    """A userfaultfd that the watchdog monitors, until `end`."""

    def __init__(
        self, fd: int, port: Port | None, name: str, *, after: float, then: int, stacks: int
    ) -> None:
        """`after` is seconds; `stacks` is a signal, or 0.  Raises OSError."""
        number = ffi.new("int *")
        pointer = ffi.NULL if port is None else port.pointer
        self._watch: Any = lib.uffdaemon_watch_add(
            fd, pointer, int(after * 1e9), then, stacks, name.encode(), number
        )
        if self._watch == ffi.NULL:
            raise OSError(int(number[0]), "starting the watchdog's thread")

    def wake(self, start: int, length: int) -> None:
        """Have threads that wait in a range fault again, so that the watchdog sees them."""
        lib.uffdaemon_stall_wake(self._watch, start, length)

    def end(self) -> None:
        """Stop monitoring: the port and the descriptor are not used any more."""
        watch, self._watch = self._watch, ffi.NULL
        if watch != ffi.NULL:
            lib.uffdaemon_watch_remove(watch)
