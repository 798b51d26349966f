"""Which faults are open, since when, and what they wait for.

The rules:

1. A fault *enters* when its message was read, before anything else can happen to it.
2. It is known by (page, kind).  Further threads that wait for the same page in the same way join
   the fault that is open; a write-protect fault and a missing one never merge.
3. It *leaves* once, with one final outcome.  In between it is being decided, or it waits: for a
   source, for a timer (deferred), for somebody's work, or for nobody (held).
4. A fault that waits says why.  `open_faults` is therefore the whole truth about who is stuck.
5. Deferred faults come back when their timer says so, with delays that double up to a cap; never
   earlier, since an event in flight ends only when its thread runs.
6. When a range goes away or its process dies, its faults leave with that outcome.

Time is whatever clock the caller uses, in nanoseconds.  Nothing here reads a clock, knows a kernel
or an event loop.
"""

from __future__ import annotations

import heapq
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import FaultKind

Key: TypeAlias = "tuple[int, FaultKind]"
Note: TypeAlias = "tuple[Waiting, str]"

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
    """A fault that has not left yet."""

    fault: Fault
    threads: tuple[int, ...]
    """The threads that reported it, the first one first; 0 for unknown."""
    age: int
    """Nanoseconds since it was read."""
    waiting: Waiting
    reason: str

    def __str__(self) -> str:
        fault = self.fault
        who = ", ".join("unknown thread" if not t else f"thread {t}" for t in self.threads)
        what = "write" if fault.write else "access"
        return (
            f"{who}: {fault.kind.value} {what} at {fault.exact_address:#x} in "
            f"{fault.region.label}, {self.age / 1e9:.6f} s, waits for {self.waiting.value}"
            + (f": {self.reason}" if self.reason else "")
        )


class Deferred(NamedTuple):
    """A fault whose timer has run out: carry out `action` again."""

    fault: Fault
    action: Action


_DECIDING = (Waiting.DECISION, "")


class Ledger:
    """The open faults of one userfaultfd."""

    __slots__ = ("_deferred", "_delays", "_failures", "_joined", "_sequence", "_waiting", "faults")

    def __init__(self) -> None:
        self.faults: dict[Key, Fault] = {}
        """The open faults by (page, kind), in the order in which they entered."""
        self._joined: dict[Key, list[int]] = {}
        self._waiting: dict[Key, Note] = {}
        # By due time.  An entry counts as long as its fault still waits with this very note.
        self._deferred: list[tuple[int, int, Key, Action, Note]] = []
        self._delays: dict[Key, int] = {}
        self._failures: dict[Key, int] = {}
        self._sequence = 0

    def __len__(self) -> int:
        return len(self.faults)

    def enter(self, fault: Fault) -> bool:
        """Record `fault`.  False: the same page is awaited in the same way already, and whoever
        answers the first fault answers this thread, too."""
        key = (fault.address, fault.kind)
        if key in self.faults:
            threads = self._joined.setdefault(key, [])
            if fault.thread not in threads and fault.thread != self.faults[key].thread:
                threads.append(fault.thread)
            return False
        self.faults[key] = fault
        return True

    def is_open(self, fault: Fault) -> bool:
        """Whether this very fault is still open (not a later one on the same page)."""
        return self.faults.get((fault.address, fault.kind)) is fault

    def leave(self, fault: Fault) -> bool:
        """The fault has ended.  False: it had ended before, for instance with its range."""
        key = (fault.address, fault.kind)
        if self.faults.get(key) is not fault:
            return False
        del self.faults[key]
        if self._waiting:
            self._waiting.pop(key, None)
        if self._joined:
            self._joined.pop(key, None)
        if self._delays:
            self._delays.pop(key, None)
        if self._failures:
            self._failures.pop(key, None)
        return True

    def wait(self, fault: Fault, waiting: Waiting, reason: str = "") -> None:
        """Note what an open fault waits for from now on; nothing, if it has left."""
        if self.is_open(fault):
            self._waiting[fault.address, fault.kind] = waiting, reason

    def defer(self, fault: Fault, action: Action, now: int, reason: str) -> int:
        """Let `action` be tried again after a delay; returns the delay in nanoseconds.  A fault
        that has left is not deferred."""
        key = (fault.address, fault.kind)
        times = self._delays.get(key, 0)
        delay = min(FIRST_DELAY_NS << min(times, _MAX_DOUBLINGS), MAX_DELAY_NS)
        if self.is_open(fault):
            self._delays[key] = times + 1
            self.defer_until(fault, action, now + delay, reason)
        return delay

    def defer_until(self, fault: Fault, action: Action, due: int, reason: str) -> None:
        """Let `action` be tried again at the time `due`, and nothing that was deferred before."""
        if not self.is_open(fault):
            return
        key = (fault.address, fault.kind)
        note = self._waiting[key] = (Waiting.TIMER, reason)
        self._sequence += 1
        heapq.heappush(self._deferred, (due, self._sequence, key, action, note))

    def count_failure(self, fault: Fault) -> int:
        """Another attempt at an open fault has failed; returns how many have."""
        if not self.is_open(fault):
            return 1
        key = (fault.address, fault.kind)
        count = self._failures[key] = self._failures.get(key, 0) + 1
        return count

    def next_due(self) -> int | None:
        """When the first deferred fault wants to be tried again; None: there is none."""
        # Entries of faults that have left, or wait for something else by now, are dropped here.
        while self._deferred:
            due, _, key, _, note = self._deferred[0]
            if self._waiting.get(key) is note:
                return due
            heapq.heappop(self._deferred)
        return None

    def take_due(self, now: int) -> list[Deferred]:
        """The deferred faults whose time has come, the longest waiting first."""
        found: list[Deferred] = []
        while (due := self.next_due()) is not None and due <= now:
            _, _, key, action, _ = heapq.heappop(self._deferred)
            del self._waiting[key]
            found.append(Deferred(self.faults[key], action))
        return found

    def inside(self, start: int, end: int) -> list[Fault]:
        """The open faults with an address in the range."""
        return [fault for (address, _), fault in self.faults.items() if start <= address < end]

    def open_fault(self, fault: Fault, now: int) -> OpenFault:
        """What is known about one open fault."""
        key = (fault.address, fault.kind)
        waiting, reason = self._waiting.get(key, _DECIDING)
        threads = (fault.thread, *self._joined.get(key, ()))
        return OpenFault(fault, threads, now - fault.read_at, waiting, reason)

    def open_faults(self, now: int) -> list[OpenFault]:
        """All open faults, the oldest first."""
        found = [self.open_fault(fault, now) for fault in self.faults.values()]
        return sorted(found, key=lambda open_fault: -open_fault.age)
