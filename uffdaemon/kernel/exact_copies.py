"""Which ranges of a userfaultfd are being copied exactly, instead of moved.

The loop has to know them.  A write-protect fault in such a range ends with the copy and must not be
resolved earlier.  The REMOVE event of the released source is not a discard by the owner: the page
contents live on at the destination.
"""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator


class ReleaseObserver(Protocol):
    """Applies events itself, and has to tell a release from a discard."""

    def expect_release(self, start: int, length: int) -> None:
        """REMOVE events of this range are going to be those of a release."""
        ...

    def end_release(self, start: int, length: int) -> None:
        """Later events are discards again."""
        ...


class Copies:
    """The copies under way on one userfaultfd; used from several threads."""

    def __init__(self) -> None:
        self.any_yet: bool = False
        """Whether there has been any copy."""
        self.observers: list[ReleaseObserver] = []
        """Told, from any thread, of the events of releases."""
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
        for observer in self.observers.copy():
            observer.expect_release(start, length)
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
        self.end_release(start, length)

    def end_release(self, start: int, length: int) -> None:
        """All events that the release of the range sends have been read."""
        for observer in self.observers.copy():
            observer.end_release(start, length)

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
