"""Which ranges of a userfaultfd are being copied exactly, instead of moved.

The loop has to know them.  A write-protect fault in such a range ends with the copy and must not be
resolved earlier.  The REMOVE event of the released source is not a discard by the owner: the page
contents live on at the destination.
"""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class Copies:
    """The copies under way on one userfaultfd; used from several threads."""

    def __init__(self) -> None:
        self.any_yet: bool = False
        """Whether there has been any copy."""
        self.before_release: list[Callable[[], None]] = []
        """Called, from any thread, before a release sends its event."""
        self.marking: Lock = Lock()
        """Held while a copy is added, and while no copy may begin."""
        self._lock = Lock()
        self._ranges: list[tuple[int, int]] = []
        self._released: list[tuple[int, int]] = []

    @contextmanager
    def copying(self, start: int, length: int) -> Generator[None]:
        """While a copy has the range write-protected."""
        with self.marking:
            self.any_yet = True
            self._ranges.append((start, start + length))
        try:
            yield
        finally:
            self._ranges.remove((start, start + length))

    @property
    def under_way(self) -> bool:
        """Whether anything is being copied."""
        return bool(self._ranges)

    def overlap(self, start: int, length: int) -> bool:
        """Whether a part of the range is being copied."""
        end = start + length
        return any(low < end and start < high for low, high in self._ranges.copy())

    def expect_release(self, start: int, length: int) -> None:
        """The release of a part of the range is going to send a REMOVE event."""
        for call in self.before_release.copy():
            call()
        with self._lock:
            self._released.append((start, start + length))

    def settle_release(self, start: int, length: int, done: int) -> None:
        """Only the first `done` bytes of the range were released."""
        reached, end = start + done, start + length
        with self._lock:
            self._released = [
                (low, min(high, reached)) if start <= low and high <= end else (low, high)
                for low, high in self._released
                if not (start <= low and high <= end and low >= reached)
            ]

    def consume_release(self, start: int, end: int) -> bool:
        """Whether a copy caused the REMOVE event for `start` to `end`.  Called once for each
        event; a range of several mappings sends several."""
        with self._lock:
            for low, high in self._released:
                if low <= start and end <= high:
                    self._released.remove((low, high))
                    if end < high:
                        self._released.append((end, high))
                    return True
        return False
