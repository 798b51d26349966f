"""Threads that come back to a page for which they were woken: it cannot be there.

The kernel does not tell whether a page is missing once more, since its owner has discarded it, or
has never been placed, since a policy or the work it asked for is wrong.  What tells is time: who
was deceived faults again at once, and does so again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import FaultKind

MAX_REPEATS: Final = 8
"""How often in a row a thread may come back at once after it was woken since there was a page."""
MAX_CLAIMS: Final = 256
"""The same after work that says it has placed the page, which its owner may discard as fast."""
AT_ONCE_NS: Final = 20_000_000
"""Who comes back later than this has got on meanwhile."""
MAX_REMEMBERED: Final = 4096
"""For how many pages that is counted."""


class Refaults:
    """Counts, for each page and thread, how often in a row it came back at once."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, FaultKind], dict[int, tuple[int, int]]] = {}

    def woken(self, fault: Fault, now: int, limit: int) -> int:
        """A thread is going to be woken at the time `now` (nanoseconds).  Returns how often in a
        row, if that is more than `limit`; else 0."""
        if len(self._pages) > MAX_REMEMBERED:  # long gone ones; those that matter come again
            self._pages.clear()
        threads = self._pages.setdefault((fault.address, fault.kind), {})
        count, last = threads.get(fault.thread, (0, 0))
        count = count + 1 if fault.read_at - last < AT_ONCE_NS else 1
        threads[fault.thread] = count, now
        # Without THREAD_ID, it may be that many threads come once each.
        return count if count > (limit if fault.thread else 16 * limit) else 0

    def back_at_once(self, fault: Fault) -> bool:
        """Whether the thread has only just been woken for this page."""
        threads = self._pages.get((fault.address, fault.kind), {})
        _, last = threads.get(fault.thread, (0, 0))
        return fault.read_at - last < AT_ONCE_NS

    def placed(self, fault: Fault) -> None:
        """The page was placed, to our own knowledge."""
        if self._pages:
            self._pages.pop((fault.address, fault.kind), None)

    def removed(self, start: int, end: int) -> None:
        """The pages between two addresses were discarded: who comes back has every reason to."""
        for key in [key for key in self._pages if start <= key[0] < end]:
            del self._pages[key]
