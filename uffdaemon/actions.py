"""Actions: what a policy returns.

An action describes what to do about a fault.  It has no descriptor and issues nothing, so the
actions of a whole batch can be sorted, merged and carried out in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.outcomes import Outcome

__all__ = [
    "Action",
    "Continue",
    "Copy",
    "Extent",
    "Fill",
    "Hold",
    "Move",
    "Perform",
    "Poison",
    "Span",
    "Unprotect",
    "Wake",
    "Zero",
]


class Span(NamedTuple):
    """A part of a region: `length` bytes from `offset` bytes after the region's start."""

    offset: int
    length: int


Extent: TypeAlias = int | Span
"""How much an action fills.  A number of pages is the aligned window of that size around the fault,
cut at the ends of the region and at present pages.  A `Span` is filled exactly; it must be
page-aligned, lie in the region and contain the fault."""


class Source(Protocol):
    """Where page contents come from: `BytesSource`, `FileSource`, `AsyncSource`, or your own."""

    @property
    def size(self) -> int:
        """The length of the source in bytes."""
        ...

    def address(self, offset: int, length: int) -> int | None:
        """The address of these bytes in memory of this process, or None if they have to be fetched.

        Raises `SourceTooShort` past the end.
        """
        ...

    async def fetch(self, offset: int, length: int) -> Buffer:
        """Return exactly `length` bytes from `offset`.

        It may take long, may be cancelled, and may raise any exception.
        """
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """UFFDIO_COPY: fill with bytes of a source.  Byte `offset` of it goes to the region's start."""

    source: Source
    offset: int = 0
    extent: Extent = 1
    write_protect: bool = False


@dataclass(frozen=True, slots=True)
class Zero:
    """UFFDIO_ZEROPAGE; for hugetlb, which has no zero page, and with `write_protect`, a copy of
    zeros, one page at a time."""

    extent: Extent = 1
    write_protect: bool = False


@dataclass(frozen=True, slots=True)
class Fallback:
    """What may be done when a page cannot be moved.

    With any fallback, a shared or merged page is unshared first, a pinned one is waited for, and
    where MOVE is impossible an exact copy takes its place.  An exact copy loses no write and
    leaves the source empty; both sides must be registered MISSING and WP.  See docs/move.md.
    """

    copy_pinned: bool = False
    """Copy a page that stays pinned.  What its I/O has not delivered yet is lost."""
    patience: float = 1.0
    """Seconds to wait for a page that is pinned or shared again and again."""
    lose_writes: bool = False
    """Where write-protection is not available, copy without it.  Writes to the source between the
    copy and its release are lost."""


@dataclass(frozen=True, slots=True)
class Move:
    """UFFDIO_MOVE within a process: byte 0 of the region comes from address `source` (bytes).

    Without a `fallback` the page is moved or the fault fails.
    """

    source: int
    extent: Extent = 1
    fallback: Fallback | None = None
    length: int | None = None
    """Bytes that may be taken from `source` on; None: no limit is checked."""
    foreign: bool = False
    """Whether the source may be memory that this library did not map."""
    source_uffd: Userfaultfd | None = None
    """The userfaultfd that the source is registered with, if it is not that of the fault."""
    verify: bool = False
    """Check with PAGEMAP_SCAN that the source is empty afterwards.  If it is not, ``failed`` hooks
    get a `SourceNotEmpty`, which is counted and logged; the fault is resolved all the same."""


@dataclass(frozen=True, slots=True)
class Continue:
    """UFFDIO_CONTINUE: map the page that is in the page cache (minor faults)."""

    extent: Extent = 1
    write_protect: bool = False


@dataclass(frozen=True, slots=True)
class Poison:
    """UFFDIO_POISON: touching the page is SIGBUS."""

    extent: Extent = 1


@dataclass(frozen=True, slots=True)
class Unprotect:
    """UFFDIO_WRITEPROTECT without the protect bit: let the write go through."""

    extent: Extent = 1


@dataclass(frozen=True, slots=True)
class Wake:
    """UFFDIO_WAKE: let the thread fault again or continue; the page was placed by other code."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Leave the thread waiting.  `Daemon.open_faults` lists the fault as held, with this reason."""

    reason: str = "held"


@dataclass(frozen=True, slots=True)
class Perform:
    """Call `work`, which issues operations on the userfaultfd itself and returns the outcome.

    It runs in a task.  The thread is woken when it returns an outcome that ends the fault.  If the
    thread keeps faulting on the same page, the fault fails.
    """

    work: Callable[[Userfaultfd, Fault], Awaitable[Outcome]]
    timeout: float | None = None
    """Seconds that `work` may take; None is the region's ``policy_timeout``."""


Action: TypeAlias = Copy | Zero | Move | Continue | Poison | Unprotect | Wake | Hold | Perform

Fill: TypeAlias = Copy | Zero | Move | Continue | Poison | Unprotect
"""The actions that have an extent."""

FILLS: Final = (Copy, Zero, Move, Continue, Poison, Unprotect)
"""`Fill` as a tuple, with which ``isinstance`` is faster than with a union."""

ACTIONS: Final = (*FILLS, Wake, Hold, Perform)
"""All actions, for ``isinstance``."""
