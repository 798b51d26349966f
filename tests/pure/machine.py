"""A machine for ladders: pages with states, and MOVE, POPULATE_WRITE and copies that obey them."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uffdaemon.moves.ladder import Ladder
from uffdaemon.moves.requests import (
    COPY,
    PROTECT,
    UNPROTECT,
    CopyOver,
    Divide,
    Issue,
    Look,
    Request,
    Unshare,
    Wait,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.outcomes import MOVE_ALLOW_SOURCE_HOLES, Code, result_of
from uffdaemon.uapi.page_facts import PageFacts

if TYPE_CHECKING:
    from uffdaemon.moves.requests import Terms
    from uffdaemon.uapi.moved import Moved

PAGE = PAGE_SIZE
SRC = 8 * HUGE_PAGE_SIZE
DST = 64 * HUGE_PAGE_SIZE

EXCLUSIVE = PageFacts(there=True, exclusive=True, present=True)
LOOKS: dict[str, PageFacts] = {
    "hole": PageFacts(there=False),
    "own": EXCLUSIVE,
    "zero": PageFacts(there=True, zero=True),
    "swapped": PageFacts(there=True),
    "shared swap": PageFacts(there=True),
    "shared": PageFacts(there=True, present=True),
    "child ended": EXCLUSIVE,
    "merged": PageFacts(there=True, merged=True, present=True),
    "pinned": EXCLUSIVE,
    "marker": PageFacts(there=True, marker=True),
}
BUSY = ("shared swap", "shared", "child ended", "merged", "pinned")
CURED = ("shared swap", "shared", "child ended", "merged")


@dataclass
class Machine:
    """`pages` are the source's states; what arrives keeps the number it had."""

    pages: list[str]
    occupied: set[int] = field(default_factory=set)
    """Destination pages that are there before."""
    pin_ends_after: int | None = None
    """Rounds of waiting until pins end; None: never."""
    movable: bool = True
    """Whether MOVE works between these mappings (or at all)."""
    move_error: int = errno.EINVAL
    registered: bool = True
    protectable: bool = True
    parts: list[int] | None = None
    """The lengths in pages of the mappings."""
    in_flight: int = 0
    """How many operations answer EAGAIN."""
    stubborn: bool = False
    """Whether what is shared is shared again at once."""
    failing: tuple[str, int, int] | None = None
    """(what, page, errno): a MOVE or a copy that fails there."""

    def __post_init__(self) -> None:
        self.arrived: dict[int, str] = {}
        self.waited = 0.0
        self.log: list[Request] = []

    def run(self, terms: Terms, *, length: int | None = None, moved: int = 0) -> Moved:
        size = len(self.pages) if length is None else length
        ladder = Ladder(DST, SRC, size * PAGE, terms, moved)
        for ask in ladder.climb():
            self.log.append(ask)
            self.answer(ask)
        return ladder.moved

    def answer(self, ask: Request) -> None:
        if isinstance(ask, Issue):
            done, error = (0, 0) if ask.operation.code is Code.WAKE else self._move(ask)
            ask.result = result_of(ask.operation, error, done, 0)
        elif isinstance(ask, Look):
            side = DST if ask.start >= DST else SRC
            first = (ask.start - side) // PAGE
            numbers = range(first, first + ask.length // PAGE)
            if side == SRC:
                ask.pages = [LOOKS[self.pages[n]] for n in numbers]
            else:
                full = self.occupied | self.arrived.keys()
                ask.pages = [EXCLUSIVE if n in full else LOOKS["hole"] for n in numbers]
        elif isinstance(ask, Unshare):
            self._unshare((ask.start - SRC) // PAGE, ask.length // PAGE)
        elif isinstance(ask, CopyOver):
            ask.done, ask.error, ask.stage = self._copy(ask)
        elif isinstance(ask, Divide):
            ask.parts = self._divide((ask.src - SRC) // PAGE, ask.length // PAGE)
            ask.registered = self.registered
        else:
            assert isinstance(ask, Wait)
            if not ask.reason:
                return
            self.waited += ask.seconds
            if self.pin_ends_after is not None:
                self.pin_ends_after -= 1
                if self.pin_ends_after <= 0:
                    self.pages = ["own" if p == "pinned" else p for p in self.pages]

    def _move(self, ask: Issue) -> tuple[int, int]:
        operation = ask.operation
        assert operation.code is Code.MOVE
        assert operation.dst - DST == operation.src - SRC
        first, count = (operation.src - SRC) // PAGE, operation.length // PAGE
        if self.in_flight:
            self.in_flight -= 1
            return 0, errno.EAGAIN
        if not self.movable or len(self._divide(first, count)) > 1:
            return 0, self.move_error
        if not self.registered:
            return 0, self.move_error
        for n in range(first, first + count):
            error = self._refuses(n, holes=bool(operation.mode & MOVE_ALLOW_SOURCE_HOLES))
            if error:
                return (n - first) * PAGE, error
            self._arrive(n)
        return count * PAGE, 0

    def _refuses(self, n: int, *, holes: bool) -> int:
        state = self.pages[n]
        if self.failing is not None and self.failing[:2] == ("move", n):
            return self.failing[2]
        if n in self.occupied:
            return errno.EEXIST
        if state == "hole":
            return 0 if holes else errno.ENOENT
        if state == "marker":
            return errno.EFAULT
        return errno.EBUSY if state in BUSY else 0

    def _arrive(self, n: int) -> None:
        if self.pages[n] != "hole":
            assert n not in self.arrived
            self.arrived[n] = self.pages[n]
            self.pages[n] = "hole"

    def _unshare(self, first: int, count: int) -> None:
        for n in range(first, first + count):
            assert self.pages[n] not in ("hole", "marker"), "a page of zeros would come into being"
            if self.pages[n] in CURED and not self.stubborn:
                self.pages[n] = "own"

    def _copy(self, ask: CopyOver) -> tuple[int, int, int]:
        first, count = (ask.src - SRC) // PAGE, ask.length // PAGE
        if ask.exact and not self.protectable:
            return 0, errno.ENOENT, PROTECT
        if self.in_flight:
            self.in_flight -= 1
            return 0, errno.EAGAIN, COPY
        for n in range(first, first + count):
            if self.failing is not None and self.failing[0] != "move" and self.failing[1] == n:
                stage = {"copy": COPY, "protect": PROTECT, "release": 3, "unprotect": 4}[
                    self.failing[0]
                ]
                if stage == UNPROTECT:
                    return count * PAGE, self.failing[2], stage
                return (n - first) * PAGE, self.failing[2], stage
            if n in self.occupied:
                return (n - first) * PAGE, errno.EEXIST, COPY
            assert self.pages[n] not in ("hole", "marker"), "the copy would wait for ever"
            self._arrive(n)
        return count * PAGE, 0, 0

    def _divide(self, first: int, count: int) -> list[int]:
        lengths, at = [], 0
        for part in self.parts or [len(self.pages)]:
            low, high = max(at, first), min(at + part, first + count)
            if low < high:
                lengths.append((high - low) * PAGE)
            at += part
        return lengths
