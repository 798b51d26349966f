"""The area of one userfaultfd in a journal: checkpoints of its regions, messages, page books."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon import errors
from uffdaemon.journal.packed_region import Unpacked, pack_table, unpack_table
from uffdaemon.journal.packet import Packet
from uffdaemon.model.page_map import PageMap
from uffdaemon.native.message_journal import MESSAGE, RING, SIZE, SLOTS, WINDOW, MessageJournal
from uffdaemon.native.page_book import PageBook, size_of
from uffdaemon.uapi.events import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.journal.file import JournalFile
    from uffdaemon.model.region import FailureAction, Policy
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.uapi.events import Event

_KEPT: Final = struct.Struct("=Q")
_OWNER: Final = struct.Struct("=QQQ")
_OWNER_AT: Final = 8
_CURRENT: Final = struct.Struct("=Q")
_CURRENT_AT: Final = 32
_SLOTS_AT: Final = 64
_OFTEN: Final = SLOTS // 4
"""A checkpoint is made after so many messages."""


class _Checkpoint(NamedTuple):
    """Where a checkpoint is, and which events it includes."""

    offset: int
    capacity: int
    length: int
    place: int


_SLOT: Final = struct.Struct("=4Q")


class Area:
    """What a journal has about one userfaultfd."""

    def __init__(self, file: JournalFile, offset: int) -> None:
        self._file = file
        self.offset: int = offset
        owner: tuple[int, int, int] = _OWNER.unpack(file.read(offset + _OWNER_AT, _OWNER.size))
        self.number: int = owner[0]
        """Which userfaultfd this is."""
        self.parent: int = owner[1]
        """Of a forked child: its parent's number."""
        self.place: int = owner[2]
        """Of a forked child: where the FORK event was in the parent's journal."""
        (self._current,) = _CURRENT.unpack(file.read(offset + _CURRENT_AT, _CURRENT.size))
        self._checkpoints = [
            _Checkpoint(*_SLOT.unpack(file.read(self._slot(index), _SLOT.size))) for index in (1, 2)
        ]
        self._books: dict[int, PageBook] = {}
        """The page books in the file, by their offsets."""
        self.messages: MessageJournal | None = None

    @classmethod
    def make(cls, file: JournalFile, number: int, parent: int = 0, place: int = 0) -> Area:
        """A new area.  It is entered in the directory with the first checkpoint."""
        offset = file.allocate(SIZE)
        file.write(offset + _OWNER_AT, _OWNER.pack(number, parent, place))
        return cls(file, offset)

    def _slot(self, index: int) -> int:
        return self.offset + _SLOTS_AT * index

    # -- writing -------------------------------------------------------------------------------

    def open_messages(self, keeper: int) -> MessageJournal:
        """Map the messages; descriptors of children go to the socket `keeper` (-1: none)."""
        self.messages = MessageJournal(self._file.fileno(), self.offset, self.number, keeper)
        return self.messages

    def home(self, pages: PageMap) -> PageMap:
        """A page map whose states are in the journal, with those of `pages`."""
        if self._books.get(pages.book.offset) is pages.book:
            return pages  # not only at the same offset: it could be one of another file
        offset = self._file.allocate(size_of(pages.pages))
        book = PageBook(pages.pages, file=self._file.fileno(), offset=offset)
        pages.book.copy_into(book)
        self._books[offset] = book
        return PageMap(pages.pages, book=book)

    def is_due(self, place: int) -> bool:
        """Whether a checkpoint that includes the events up to `place` is due."""
        return place - self._saved.place >= _OFTEN

    @property
    def _saved(self) -> _Checkpoint:
        return self._checkpoints[self._current - 1] if self._current else _Checkpoint(0, 0, 0, 0)

    def save(self, table: RegionTable, place: int) -> None:
        """Make a checkpoint: the regions, with all events up to `place` applied.

        Raises OSError; the last checkpoint is in force then.
        """
        data = json.dumps(pack_table(table)).encode()
        first = not self._current
        index = 2 if self._current == 1 else 1
        _, capacity, _, _ = old = self._checkpoints[index - 1]
        new = old._replace(length=len(data), place=place)
        if capacity < len(data):
            new = new._replace(offset=self._file.allocate(2 * len(data)), capacity=2 * len(data))
        self._file.write(new.offset, data)
        self._file.write(self._slot(index), _SLOT.pack(*new))
        self._file.write(self.offset + _CURRENT_AT, _CURRENT.pack(index))
        self._checkpoints[index - 1], self._current = new, index
        if first:
            self._file.enter(self.offset)
        if old.capacity and old.offset != new.offset:
            self._file.free(old.offset, old.capacity)
        used = {segment.region.pages.book.offset for segment in table}
        for offset in self._books.keys() - used:
            self._free_book(offset)

    def remove(self) -> None:
        """The userfaultfd is not served any more: free everything."""
        self._file.strike(self.offset)
        self._file.free(self.offset, SIZE)
        for checkpoint in self._checkpoints:
            if checkpoint.capacity:
                self._file.free(checkpoint.offset, checkpoint.capacity)
        for offset in list(self._books):
            self._free_book(offset)

    def _free_book(self, offset: int) -> None:
        self._file.free(offset, size_of(self._books.pop(offset).pages))

    # -- reading -------------------------------------------------------------------------------

    def load(
        self, policy: Callable[[str], Policy], on_failure: FailureAction | None
    ) -> RegionTable:
        """The regions of the last checkpoint.  Raises `JournalError`, OSError and LookupError."""
        data = self._file.read(self._saved.offset, self._saved.length)
        try:
            return unpack_table(Packet.decode(data), Unpacked(policy, on_failure, self._map))
        except ValueError as error:
            raise errors.JournalError(f"the journal is damaged: {error}") from error

    def _map(self, offset: int, pages: int) -> PageMap:
        book = PageBook(pages, file=self._file.fileno(), offset=offset)
        self._books[offset] = book
        return PageMap(pages, book=book)

    def events(self) -> list[tuple[int, Event]]:
        """What was read since the last checkpoint, with its places, in order."""
        (kept,) = _KEPT.unpack(self._file.read(self.offset, _KEPT.size))
        ring = self._file.read(self.offset + RING, SLOTS * MESSAGE)
        found: list[tuple[int, Event]] = []
        for place in range(self._saved.place, kept + WINDOW):
            at = place % SLOTS * MESSAGE
            raw = ring[at : at + MESSAGE]
            if raw[0]:
                found += [(place + 1, event) for event in parse(raw)]
        return found
