"""The options that all calls which move pages share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict

from uffdaemon.moves.requests import PIECE, Terms
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.moved import Cause

if TYPE_CHECKING:
    from uffdaemon.actions import Fallback
    from uffdaemon.kernel.userfaultfd import Userfaultfd


class CopyOptions(TypedDict, total=False):
    """The options of `copy_exactly`."""

    allow_source_holes: bool
    """Skip pages that are missing at the source, instead of refusing them (default: False)."""
    foreign: bool
    """Take pages out of memory that this library did not map, where their owner will find zeros
    (default: False)."""
    source_uffd: Userfaultfd | None
    """The userfaultfd that the source is registered with, if it is not that of the destination
    (default: None).  An exact copy write-protects the source with it."""
    verify: bool
    """Check with PAGEMAP_SCAN that the source is empty afterwards, and raise `SourceNotEmpty` if it
    is not (default: False)."""
    page_size: int
    """Bytes: that of the memory.  Hugetlb pages are copied only.  The default is the size of base
    pages, and for `Daemon.move` that of the region."""
    piece: int
    """Bytes of one exact copy (default: 256 KiB).  Threads that write to either side wait for that
    long."""


class MoveOptions(CopyOptions, total=False):
    """The options of `move`, `move_in_trio`, `move_many` and `Daemon.move`."""

    fallback: Fallback | None
    """What may be done about a page that cannot be moved (default: None, nothing)."""


class Chosen(NamedTuple):
    """`MoveOptions` with their defaults."""

    allow_source_holes: bool = False
    foreign: bool = False
    source_uffd: Userfaultfd | None = None
    verify: bool = False
    page_size: int = PAGE_SIZE
    piece: int = PIECE
    fallback: Fallback | None = None

    def terms(self, uffd: Userfaultfd) -> Terms:
        """The terms of a move on `uffd`."""
        impossible = None
        if not uffd.same_process:
            impossible = Cause.OTHER_PROCESS
        elif self.page_size != PAGE_SIZE:
            impossible = Cause.WRONG_MEMORY
        return Terms(self.fallback, self.allow_source_holes, impossible, self.page_size, self.piece)


DEFAULTS: Final = Chosen()
