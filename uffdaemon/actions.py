"""What can be done about a fault: the closed union of actions that policies return.

An action says what shall happen, not how: it holds no descriptor and issues nothing, so that the
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


class Span(NamedTuple):
    """A part of a region: `length` bytes from `offset` bytes after the region's start."""

    offset: int
    length: int


Extent: TypeAlias = int | Span
"""How much an action fills: a number of pages, which is the aligned window of so many pages around
the fault, cut at the region's ends and at pages that are filled; or exactly one `Span`, which must
be page-aligned, lie in the region and hold the fault."""


class Source(Protocol):
    """Where pages come from.  `uffdaemon.sources` has the shipped ones."""

    @property
    def size(self) -> int:
        """Bytes that can be had."""
        ...

    def address(self, offset: int, length: int) -> int | None:
        """Where these bytes lie in this process's memory, ready to be copied without waiting;
        None where they have to be fetched.  Raises `SourceTooShort` past the end."""
        ...

    async def fetch(self, offset: int, length: int) -> Buffer:
        """Get exactly `length` bytes from `offset`.  May take its time, may be cancelled, and may
        raise whatever it likes."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """UFFDIO_COPY: fill with the source's bytes.  Byte `offset` of the source belongs at the
    region's start."""

    source: Source
    offset: int = 0
    extent: Extent = 1
    write_protect: bool = False


@dataclass(frozen=True, slots=True)
class Zero:
    """UFFDIO_ZEROPAGE, or a copy of zeros where the memory has no zero page (hugetlb)."""

    extent: Extent = 1


@dataclass(frozen=True, slots=True)
class Fallback:
    """What may be done when a page cannot be moved; the developer's choice, never ours.

    With any fallback a page that is shared or merged is unshared first, one that is pinned is
    waited for, and where MOVE is impossible an exact copy takes its place: it loses no write and
    leaves the source empty, and needs both sides registered MISSING and WP.
    """

    copy_pinned: bool = False
    """Copy a page that is pinned: whatever its I/O has not delivered yet is lost."""
    patience: float = 1.0
    """Seconds to wait for pins to end."""
    lose_writes: bool = False
    """Where write-protection is not to be had, copy without it: whatever is written to the source
    between the copy and its release is lost."""


@dataclass(frozen=True, slots=True)
class Move:
    """UFFDIO_MOVE from the same process: byte 0 of the region comes from address `source`.

    Without a `fallback` it moves or fails; `Fallback` says what may be done with one.
    """

    source: int
    extent: Extent = 1
    fallback: Fallback | None = None
    length: int | None = None
    """Bytes that may be taken from `source` on; None: the caller answers for what lies there."""
    foreign: bool = False
    """Whether the source may be memory that this library has not mapped."""
    source_uffd: Userfaultfd | None = None
    """What watches the source, where that is another userfaultfd than the fault's."""
    verify: bool = False
    """Have PAGEMAP_SCAN prove that the source is empty afterwards; where it is not, the ``failed``
    hooks are told of a `SourceNotEmpty`, which is counted and logged.  The fault has been answered
    all the same."""


@dataclass(frozen=True, slots=True)
class Continue:
    """UFFDIO_CONTINUE: map what the page cache holds (minor faults)."""

    extent: Extent = 1
    write_protect: bool = False


@dataclass(frozen=True, slots=True)
class Poison:
    """UFFDIO_POISON: whoever touches the page gets SIGBUS."""

    extent: Extent = 1


@dataclass(frozen=True, slots=True)
class Unprotect:
    """UFFDIO_WRITEPROTECT without the protect bit: let the write happen."""

    extent: Extent = 1


@dataclass(frozen=True, slots=True)
class Wake:
    """UFFDIO_WAKE: let the thread try again, since somebody else has placed the page."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Leave the thread waiting, listed as stuck with this reason."""

    reason: str = "held"


@dataclass(frozen=True, slots=True)
class Perform:
    """What no action describes: `work` is handed the userfaultfd with its operations, issues them
    itself and returns the outcome that it reached.

    It runs in a task.  When it returns an outcome that lets the thread go, the thread is woken; if
    it then faults again at once, and again, the work is taken for broken.
    """

    work: Callable[[Userfaultfd, Fault], Awaitable[Outcome]]
    timeout: float | None = None
    """Seconds; None is the region's ``policy_timeout``."""


Action: TypeAlias = Copy | Zero | Move | Continue | Poison | Unprotect | Wake | Hold | Perform

Fill: TypeAlias = Copy | Zero | Move | Continue | Poison | Unprotect
"""The actions that work on an extent."""

FILLS: Final = (Copy, Zero, Move, Continue, Poison, Unprotect)
"""The same for ``isinstance``, which is slower with a union."""

ACTIONS: Final = (*FILLS, Wake, Hold, Perform)
"""All actions, for ``isinstance``."""
