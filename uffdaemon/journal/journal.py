"""A journal: a memory file with all that a successor has to know."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.journal.area import Area
from uffdaemon.journal.file import JournalFile

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


def number_of(fd: int) -> int:
    """The number of a userfaultfd: its inode, the same in every process that has it open."""
    return os.fstat(fd).st_ino


class Journal:
    """What a successor has to know about the userfaultfds of a daemon, in a memory file.

    Pass it to `open_daemon`.  The file has the page states of each region, the regions themselves,
    and every event that was read and is not in them yet.  It takes 2 bits a page, and 68 KiB for
    each userfaultfd.  Whoever has the file, and the userfaultfds, goes on where the daemon was,
    even if that was killed: see `Daemon.resume`, and `Keeper`, which keeps both.

    `fd` is the descriptor of the file (by default, a new one is made), which is duplicated.  Raises
    `JournalError` if it is not a journal of this version, and OSError.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._file = JournalFile(fd)
        areas = [Area(self._file, offset) for offset in self._file.areas]
        self._areas: dict[int, Area] = {area.number: area for area in areas}

    def __repr__(self) -> str:
        state = "closed" if self.fileno() < 0 else f"fd={self.fileno()}"
        return f"<Journal {state}, {len(self._areas)} userfaultfds>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor of the memory file; -1 after `close`."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the descriptor.  The daemon must have ended."""
        self._file.close()

    @property
    def userfaultfds(self) -> list[int]:
        """The userfaultfds that it has, each as the inode number of its descriptor (fstat(2))."""
        return list(self._areas)

    # -- for the daemon ------------------------------------------------------------------------

    def begin(self, number: int, parent: int = 0, place: int = 0) -> Area:
        """A new area.  Raises `JournalError` if there is one, and OSError."""
        if number in self._areas:
            raise errors.JournalError(
                f"the journal has regions of userfaultfd {number} already: resume it"
            )
        area = Area.make(self._file, number, parent, place)
        self._areas[number] = area
        return area

    def area(self, number: int) -> Area:
        """The area of a userfaultfd.  Raises `JournalError` if there is none."""
        found = self._areas.get(number)
        if found is None:
            raise errors.JournalError(f"the journal has nothing of userfaultfd {number}")
        return found

    def has_child(self, parent: int, place: int) -> bool:
        """Whether the child of a FORK event has an area."""
        return any((area.parent, area.place) == (parent, place) for area in self._areas.values())

    def remove(self, area: Area) -> None:
        """Remove an area."""
        if self._areas.pop(area.number, None) is not None:
            area.remove()
