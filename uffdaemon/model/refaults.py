"""Threads that fault again on a page for which they were woken: the page cannot be there.

The kernel does not report whether a page is missing again, because its owner discarded it, or was
never filled, because a policy or its work is wrong.  Time tells the two apart: in the second case
the thread faults again at once, and does so every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import FaultKind

MAX_REPEATS: Final = 8
"""How often in a row a thread may fault again at once, after it was woken for a present page."""
MAX_CLAIMS: Final = 256
"""The same after work that claims to have filled the page: its owner may discard it as fast."""
AT_ONCE_NS: Final = 20_000_000
"""A thread that faults again later than this has made progress."""
MAX_REMEMBERED: Final = 4096
"""How many pages are remembered."""


class Refaults:
    """Counts for each page and thread how often in a row it faulted again at once."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, FaultKind], dict[int, tuple[int, int]]] = {}

    def woken(self, fault: Fault, now: int, limit: int) -> int:
        """A thread is about to be woken, at the time `now` (nanoseconds).  Returns how often that
        has happened in a row, if more than `limit` times; else 0."""
        if len(self._pages) > MAX_REMEMBERED:
            self._pages.clear()  # mostly old pages; one that still refaults is counted again
        threads = self._pages.setdefault((fault.address, fault.kind), {})
        count, last = threads.get(fault.thread, (0, 0))
        count = count + 1 if fault.read_at - last < AT_ONCE_NS else 1
        threads[fault.thread] = count, now
        # Without THREAD_ID, these may be many threads, once each.
        return count if count > (limit if fault.thread else 16 * limit) else 0

    def back_at_once(self, fault: Fault) -> bool:
        """Whether the thread has only just been woken for this page."""
        threads = self._pages.get((fault.address, fault.kind), {})
        _, last = threads.get(fault.thread, (0, 0))
        return fault.read_at - last < AT_ONCE_NS

    def placed(self, fault: Fault) -> None:
        """An operation of this library has filled the page."""
        if self._pages:
            self._pages.pop((fault.address, fault.kind), None)

    def removed(self, start: int, end: int) -> None:
        """The pages between two addresses were discarded: threads rightly fault again."""
        for key in [key for key in self._pages if start <= key[0] < end]:
            del self._pages[key]
