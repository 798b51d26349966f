"""What a daemon leaves to its successor: a journal, and descriptors that a keeper holds."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon import errors
from uffdaemon.journal.journal import number_of

if TYPE_CHECKING:
    from uffdaemon.journal.area import Area
    from uffdaemon.journal.journal import Journal
    from uffdaemon.journal.replay import Child
    from uffdaemon.keeper.keeper import Keeper
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.log import Log
    from uffdaemon.model.region_table import RegionTable

_ROOT: Final = "userfaultfd"
_CHILD: Final = "child"
_BOOKS: Final = "books"
_CLIENT: Final = "client"


class Kept(NamedTuple):
    """The descriptors that a keeper held when they were listed, by what they are."""

    roots: dict[int, int]
    """Userfaultfds by their numbers."""
    children: dict[tuple[int, int], int]
    """Those of children, by the parent's number and the place of the FORK event."""
    books: dict[tuple[int, int], int]
    """The page books of children, as the parent's were when it forked."""
    clients: dict[int, int]
    """Process descriptors, by the number of the userfaultfd."""

    def userfaultfd(self, area: Area) -> int | None:
        """Take out the userfaultfd of an area; None if it is not held."""
        if area.parent:
            return self.children.pop((area.parent, area.place), None)
        return self.roots.pop(area.number, None)

    def close(self) -> None:
        """Close what was not taken out."""
        for held in (self.roots, self.children, self.books, self.clients):
            for fd in held.values():
                os.close(fd)


class Handover:
    """The journal and the keeper of a daemon, either of which may be missing."""

    def __init__(self, journal: Journal | None, keeper: Keeper | None, log: Log) -> None:
        self.journal = journal
        self._keeper = keeper
        self._log = log

    def begin(self, uffd: Userfaultfd) -> Area | None:
        """The area of a userfaultfd that is served from now on; the keeper holds it, too.

        None for memory of this process, which a successor would not have.  Raises `JournalError`,
        `KeeperError` and OSError.
        """
        if self.journal is None or uffd.same_process:
            return None
        number = number_of(uffd.fileno())
        area = self.journal.begin(number)
        try:
            self._keep(f"{_ROOT} {number}", uffd.fileno())
        except errors.KeeperError:
            self.journal.remove(area)
            raise
        return area

    def prepare(self, area: Area | None) -> None:
        """An area is about to be used: what is read goes through it.  Raises OSError."""
        if area is not None and area.messages is None:
            area.open_messages(-1 if self._keeper is None else self._keeper.fileno())

    def begin_child(
        self, parent: Area | None, fd: int, place: int, regions: RegionTable
    ) -> Area | None:
        """The area of a forked child, which the parent's next checkpoint will not mention.

        C has sent the userfaultfd to the keeper already.  It is sent again in case that was late;
        if the keeper cannot be reached, the child is served all the same.  Raises OSError.
        """
        if self.journal is None or parent is None:
            return None
        area = self.journal.begin(number_of(fd), parent.number, place)
        try:
            for segment in regions:
                segment.region.pages = area.home(segment.region.pages)
            area.save(regions, 0)
        except OSError:
            self.journal.remove(area)
            raise
        try:
            self._keep(_of_fork(_CHILD, parent.number, place), fd)
        except errors.KeeperError as error:
            self._log.warning("child not kept", userfaultfd=fd, error=str(error))
        self._forget(_of_fork(_BOOKS, parent.number, place))
        return area

    def refuse_child(self, parent: Area | None, place: int) -> None:
        """The userfaultfd of a child is closed."""
        if parent is not None:
            self._forget(_of_fork(_CHILD, parent.number, place))
            self._forget(_of_fork(_BOOKS, parent.number, place))

    def client(self, area: Area | None, pidfd: int) -> None:
        """The process of a userfaultfd is known."""
        if area is not None:
            self._keep(f"{_CLIENT} {area.number}", pidfd)

    def end(self, area: Area | None) -> None:
        """A userfaultfd is not served any more."""
        if area is None or self.journal is None:
            return
        self.journal.remove(area)
        if area.parent:
            self._forget(_of_fork(_CHILD, area.parent, area.place))
        else:
            self._forget(f"{_ROOT} {area.number}")
        self._forget(f"{_CLIENT} {area.number}")

    def lost(self, parent: int, child: Child) -> None:
        """A child was forked, and nobody has its userfaultfd."""
        self._log.error(
            "child lost: its userfaultfd was read and not kept; its missing pages are zeros",
            parent=parent,
            regions=[segment.region.label for segment in child.regions],
        )

    def forget_unused(self, kept: Kept) -> None:
        """Have the keeper close userfaultfds of which the journal says nothing: they had ended."""
        for number in kept.roots:
            self._forget(f"{_ROOT} {number}")
        for parent, place in kept.children:
            self._forget(_of_fork(_CHILD, parent, place))
        for parent, place in kept.books:
            self._forget(_of_fork(_BOOKS, parent, place))
        for number in kept.clients:
            self._forget(f"{_CLIENT} {number}")

    def _keep(self, name: str, fd: int) -> None:
        if self._keeper is not None:
            self._keeper.keep(name, fd)

    def _forget(self, name: str) -> None:
        if self._keeper is not None:
            with suppress(errors.KeeperError):  # it has ended, and all is closed
                self._keeper.forget(name)

    def kept(self) -> Kept:
        """What the keeper holds.  Raises `KeeperError`."""
        found = Kept({}, {}, {}, {})
        for name, fds in ({} if self._keeper is None else self._keeper.kept()).items():
            match name.split(" "), fds:
                case [kind, number], [fd] if kind == _ROOT:
                    found.roots[int(number)] = fd
                case [kind, number], [fd] if kind == _CLIENT:
                    found.clients[int(number)] = fd
                case [kind, parent, place], [fd] if kind == _CHILD:
                    found.children[int(parent), int(place)] = fd
                case [kind, parent, place], [fd] if kind == _BOOKS:
                    found.books[int(parent), int(place)] = fd
                case _:  # the application's own, or the journal
                    for fd in fds:
                        os.close(fd)
        return found


def _of_fork(what: str, parent: int, place: int) -> str:
    return f"{what} {parent} {place}"
