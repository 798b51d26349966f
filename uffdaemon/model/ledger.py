"""Which faults are open: one record each, with the state it is in.

The rules:

1. A fault *enters* when its message has been read, before anything else happens to it.
2. It is known by (page, kind).  Further threads that wait for the same page in the same way join
   the record that is open.  A write-protect fault and a missing one never merge.
3. It *leaves* once, in `Ledger.leave`, with one final outcome.  Until then it has one `Waiting`
   state: being decided, waiting for a source, a timer (deferred), a task or a hook, or held.
4. A waiting fault has a reason, so `open_faults` explains every thread that is stuck.
5. A deferred fault is retried when its timer expires, with delays that double up to a limit.  It is
   never retried earlier: an event in flight ends only when its thread runs.
6. When a range is unmapped or its process dies, its faults leave with that outcome.

Times are nanoseconds of the clock that the caller uses.  Nothing here reads a clock, calls the
kernel or knows an event loop.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.actions import Action
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import FaultKind

Key: TypeAlias = "tuple[int, FaultKind]"

FIRST_DELAY_NS = 100_000
MAX_DELAY_NS = 20_000_000
_MAX_DOUBLINGS = 16


class Waiting(Enum):
    """What an open fault waits for."""

    DECISION = "decision"
    SOURCE = "source"
    TIMER = "timer"
    WORK = "work"
    HOOK = "hook"
    NOBODY = "nobody"


class OpenFault(NamedTuple):
    """A snapshot of a fault that has no outcome yet."""

    fault: Fault
    threads: tuple[int, ...]
    """The threads that reported it, the first one first; 0 for unknown."""
    age: int
    """Nanoseconds since it was read."""
    waiting: Waiting
    reason: str
    attempts: int = 0
    """How often it was tried in vain: a source that failed, no memory, an event in flight."""

    def __str__(self) -> str:
        fault = self.fault
        who = ", ".join("unknown thread" if not t else f"thread {t}" for t in self.threads)
        what = "write" if fault.write else "access"
        return (
            f"{who}: {fault.kind.value} {what} at {fault.exact_address:#x} in "
            f"{fault.region.label}, {self.age / 1e9:.6f} s, waits for {self.waiting.value}"
            + (f": {self.reason}" if self.reason else "")
            + (f"; attempts: {self.attempts}" if self.attempts else "")
        )


class Deferred(NamedTuple):
    """A fault whose timer has expired."""

    fault: Fault
    action: Action | None
    """What to carry out again; None: ask the policy again."""


@dataclass(eq=False, slots=True)
class Record:
    """Everything known about one open fault."""

    fault: Fault
    state: Waiting = Waiting.DECISION
    reason: str = ""
    joined: tuple[int, ...] = ()
    """Further threads that reported the same page and kind."""
    failed: bool = False
    """Whether its region's ``on_failure`` has been used already."""
    protects: bool = False
    """Whether its page is to be write-protected."""
    attempts: int = 0
    """Attempts at its source that have failed."""
    shortages: int = 0
    """How often there was no memory for it."""
    short_since: int = 0
    """When there was none for the first time."""
    deferrals: int = 0
    """How often an event in flight has deferred it."""
    action: Action | None = None
    """What to carry out when its timer expires; None: ask the policy again."""
    timer: int = 0
    """The number of its timer; 0: none is set."""


class Ledger:
    """The open faults of one userfaultfd."""

    __slots__ = ("_records", "_timers", "_timers_set", "held")

    def __init__(self) -> None:
        # In the order in which the faults entered.
        self._records: dict[Key, Record] = {}
        self.held: int = 0
        """How many open faults are held."""
        # By due time.  An entry counts as long as its record still has the timer of this number.
        self._timers: list[tuple[int, int, Record]] = []
        self._timers_set = 0

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Fault]:
        """The open faults, in the order in which they entered; a copy, safe against changes."""
        return iter([record.fault for record in self._records.values()])

    # -- in and out ----------------------------------------------------------------------------

    def enter(self, fault: Fault) -> bool:
        """Record `fault`.  False: the same page and kind is open already, and resolving that fault
        resolves this thread's, too."""
        key = (fault.address, fault.kind)
        record = self._records.get(key)
        if record is None:
            self._records[key] = Record(fault)
            return True
        if fault.thread != record.fault.thread and fault.thread not in record.joined:
            record.joined += (fault.thread,)
        return False

    def leave(self, fault: Fault) -> bool:
        """Remove the record of a fault that has its final outcome.  False: it had left before, for
        instance with its range."""
        key = (fault.address, fault.kind)
        record = self._records.get(key)
        if record is None or record.fault is not fault:
            return False
        if record.state is not Waiting.DECISION:
            self._set(record, Waiting.DECISION, "")  # no timer, and not held
        del self._records[key]
        return True

    # -- one fault -----------------------------------------------------------------------------

    def find(self, fault: Fault) -> Record | None:
        """The record of this very fault, not of a later one on the same page; None: it has left."""
        record = self._records.get((fault.address, fault.kind))
        return record if record is not None and record.fault is fault else None

    def at(self, address: int, kind: FaultKind) -> Record | None:
        """The record of the open fault of a page and kind."""
        return self._records.get((address, kind))

    def is_open(self, fault: Fault) -> bool:
        """Whether this very fault is still open."""
        record = self._records.get((fault.address, fault.kind))
        return record is not None and record.fault is fault

    def _set(self, record: Record, state: Waiting, reason: str) -> None:
        """The one place where a record changes its state."""
        self.held += (state is Waiting.NOBODY) - (record.state is Waiting.NOBODY)
        record.state, record.reason, record.timer = state, reason, 0

    def wait(self, fault: Fault, waiting: Waiting, reason: str = "") -> None:
        """Note what an open fault waits for from now on; nothing, if it has left."""
        record = self.find(fault)
        if record is not None:
            self._set(record, waiting, reason)

    def reopen(self, record: Record) -> None:
        """A held fault is decided after all."""
        if record.state is Waiting.NOBODY:
            self._set(record, Waiting.DECISION, "")

    def count_failure(self, fault: Fault) -> int:
        """Another attempt at an open fault's source has failed; returns how many have."""
        record = self.find(fault)
        if record is None:
            return 1
        record.attempts += 1
        return record.attempts

    def count_shortage(self, fault: Fault, now: int) -> tuple[int, int]:
        """There was no memory for an open fault.  Returns how often that was so, and since when."""
        record = self.find(fault)
        if record is None:
            return 1, now
        record.short_since = record.short_since or now
        record.shortages += 1
        return record.shortages, record.short_since

    # -- timers --------------------------------------------------------------------------------

    def protect(self, fault: Fault) -> None:
        """The page of an open fault is to be write-protected, also if it is discarded meanwhile."""
        record = self.find(fault)
        if record is not None:
            record.protects = True

    def defer(self, fault: Fault, action: Action | None, now: int, reason: str) -> int:
        """Have `action` tried again after a delay; returns the delay in nanoseconds.  A fault that
        has left is not deferred."""
        record = self.find(fault)
        times = 0 if record is None else record.deferrals
        delay = min(FIRST_DELAY_NS << min(times, _MAX_DOUBLINGS), MAX_DELAY_NS)
        if record is not None:
            record.deferrals += 1
            self.defer_until(fault, action, now + delay, reason)
        return delay

    def defer_until(self, fault: Fault, action: Action | None, due: int, reason: str) -> None:
        """Have `action` tried again at the time `due`, and nothing that was deferred before."""
        record = self.find(fault)
        if record is None:
            return
        self._set(record, Waiting.TIMER, reason)
        self._timers_set += 1
        record.action, record.timer = action, self._timers_set
        heapq.heappush(self._timers, (due, record.timer, record))

    def next_retry(self) -> int | None:
        """When the first timer expires; None: none is set."""
        # Timers of faults that have left, or wait for something else by now, are dropped here.
        while self._timers:
            due, number, record = self._timers[0]
            if record.timer == number:
                return due
            heapq.heappop(self._timers)
        return None

    def pop_expired(self, now: int) -> list[Deferred]:
        """The faults whose timer has expired, the longest waiting first."""
        found: list[Deferred] = []
        while (due := self.next_retry()) is not None and due <= now:
            _, _, record = heapq.heappop(self._timers)
            self._set(record, Waiting.DECISION, "")
            found.append(Deferred(record.fault, record.action))
        return found

    # -- many ----------------------------------------------------------------------------------

    def inside(self, start: int, end: int) -> list[Fault]:
        """The open faults with an address in the range."""
        return [r.fault for (address, _), r in self._records.items() if start <= address < end]

    def held_faults(self) -> list[Fault]:
        """The open faults that are held."""
        if not self.held:
            return []
        return [r.fault for r in self._records.values() if r.state is Waiting.NOBODY]

    def open_fault(self, fault: Fault, now: int) -> OpenFault:
        """A snapshot of one open fault."""
        return _snapshot(self._records[fault.address, fault.kind], now)

    def open_faults(self, now: int) -> list[OpenFault]:
        """A snapshot of all open faults, the oldest first."""
        found = [_snapshot(record, now) for record in self._records.values()]
        return sorted(found, key=lambda open_fault: -open_fault.age)


def _snapshot(record: Record, now: int) -> OpenFault:
    fault = record.fault
    threads = (fault.thread, *record.joined)
    attempts = record.attempts + record.shortages + record.deferrals
    age = now - fault.read_at
    return OpenFault(fault, threads, age, record.state, record.reason, attempts)
