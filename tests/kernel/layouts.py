"""Layouts of the source and the destination of a move: drawn, and what should become of them."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hypothesis import strategies as st

from tests.support.page_contents import PAGE
from uffdaemon import Outcome
from uffdaemon.moves import Cause, Fallback, Moved
from uffdaemon.ranges import HUGE_PAGE_SIZE

IN_HUGE = HUGE_PAGE_SIZE // PAGE
SHARED = ("shared", "shared swap")
CHILD_ENDED = ("child ended", "child ended, swap")
SWAPPED = ("swapped", "shared swap", "child ended, swap")
SOURCES = ("own", "hole", "zero", "marker", "pinned", "swapped", *SHARED, *CHILD_ENDED)
HUGE_SOURCES = ("own", "zero", "pinned", "swapped", "shared", "child ended")
TARGETS = ("empty", "empty", "empty", "empty", "occupied", "marker")
FORETOLD = ("own", "hole", "zero", "marker", "swapped", "shared")
"""What can be seen of the other sources is not all that the kernel knows."""


class Page(NamedTuple):
    """What is at one page of the source, and at its destination."""

    source: str
    target: str
    huge: bool = False
    """Whether it was a part of a transparent huge page."""


class Huge(NamedTuple):
    """A transparent huge page, of which `pages` from `first` on are to move."""

    source: str
    first: int
    pages: int
    targets: dict[int, str]
    """Where the destination is not empty."""


@dataclass(frozen=True)
class Layout:
    """Pages right before a multiple of 2 MiB, perhaps a huge page from there on, and more pages."""

    before: list[tuple[str, str, int]]
    huge: Huge | None
    after: list[tuple[str, str, int]]
    skew: int
    """Pages by which the places in a huge page differ between the two sides."""

    @cached_property
    def pages(self) -> list[Page]:
        """All that are to move."""
        return [*_expand(self.before), *self._huge, *_expand(self.after)]

    @property
    def _huge(self) -> list[Page]:
        huge = self.huge
        if huge is None:
            return []
        taken = {n: huge.targets.get(n, "empty") for n in range(huge.pages)}
        return [Page(huge.source, taken[n], huge=True) for n in range(huge.pages)]

    @property
    def first(self) -> int:
        """Which page of the source's memory is the first to move."""
        inside = self.huge.first if self.huge is not None else 0
        return IN_HUGE + inside - len(_expand(self.before))

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.pages) * PAGE


class Terms(NamedTuple):
    """Under which a layout is moved."""

    fallback: Fallback | None
    allow_source_holes: bool
    registered: bool
    """Whether both sides are registered MISSING and WP, and not only the destination MISSING."""


class Fate(NamedTuple):
    """What became of one page."""

    outcome: Outcome
    cause: Cause | None = None
    error: int = 0


# -- the model ---------------------------------------------------------------------------------

_UNSHARED = Fate(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)
_MOVED = Fate(Outcome.MOVED)


def _refused(cause: Cause, error: int) -> Fate:
    return Fate(Outcome.FAILED, cause, error)


_ALREADY_MOVED = _refused(Cause.ALREADY_MOVED, errno.EEXIST)


def expect(page: Page, terms: Terms) -> Fate:
    """The rules of docs/move.md; the kernel looks at the destination first."""
    fallback = terms.fallback
    if page.target != "empty":
        there = page.source != "hole"
        return _refused(Cause.NOT_EMPTY, errno.EEXIST) if there else _ALREADY_MOVED
    if page.source == "hole" and not terms.allow_source_holes:
        return _refused(Cause.SOURCE_HOLE, errno.ENOENT)
    if page.source == "marker":
        return _refused(Cause.SOURCE_MARKER, errno.EFAULT)
    if page.source == "child ended":
        return _UNSHARED
    if page.source in (*SHARED, *CHILD_ENDED):
        return _UNSHARED if fallback else _refused(Cause.SHARED, errno.EBUSY)
    if page.source == "pinned":
        if fallback is None or not fallback.copy_pinned:
            return _refused(Cause.PINNED, errno.EBUSY)
        if not terms.registered and not fallback.lose_writes:
            return _refused(Cause.UNPROTECTABLE, errno.ENOENT)
        return Fate(Outcome.COPIED_PINNED, Cause.PINNED)
    return _MOVED


def accepts(page: Page, terms: Terms, fate: Fate) -> bool:
    """Whether the page may have had this fate."""
    expected = expect(page, terms)
    if fate == expected:
        return True
    if page.source == "child ended" and page.huge:
        # Making one page of it our own makes all of it our own.
        return expected == _UNSHARED and fate == _MOVED
    # Linux 6.18 finds a page in its own way that it has moved while that was being swapped out.
    return page.source == "swapped" and expected == _MOVED and fate == _ALREADY_MOVED


def gone(page: Page, fate: Fate) -> bool:
    """Whether nothing is at the source after this fate."""
    return page.source == "hole" or fate.outcome is not Outcome.FAILED or fate == _ALREADY_MOVED


def fates_of(moved: Moved, src: int) -> dict[int, Fate]:
    """The fate of each page, by its number from `src` on.  Each has one."""
    fates: dict[int, Fate] = {}
    for run in moved.runs:
        for at in range(run.src - src, run.src - src + run.length, PAGE):
            assert at // PAGE not in fates, moved
            fates[at // PAGE] = Fate(run.outcome, run.cause, run.error)
    return fates


# -- drawing -----------------------------------------------------------------------------------


def _expand(runs: list[tuple[str, str, int]]) -> list[Page]:
    return [Page(source, target) for source, target, count in runs for _ in range(count)]


def _runs(draw: st.DrawFn, smallest: int) -> list[tuple[str, str, int]]:
    # Not a list of sources: most of those would be of one or two kinds.
    order = draw(st.permutations(SOURCES * 2))[: draw(st.integers(smallest, len(SOURCES)))]
    return [(s, draw(st.sampled_from(TARGETS)), draw(st.integers(1, 3))) for s in order]


@st.composite
def layouts(draw: st.DrawFn, source: str | None) -> Layout:
    """With a huge page of this kind, or a part of one; or with none."""
    skew = draw(st.sampled_from([0, 3]))
    if source is None:
        return Layout(_runs(draw, 1), None, _runs(draw, 0), skew)
    first, end = 0, IN_HUGE
    if draw(st.booleans()):
        first = draw(st.integers(0, IN_HUGE - 1))
        end = draw(st.integers(first + 1, IN_HUGE))
    targets = st.dictionaries(
        st.integers(0, end - first - 1), st.sampled_from(["occupied", "marker"]), max_size=2
    )
    huge = Huge(source, first, end - first, draw(targets))
    before = _runs(draw, 0) if first == 0 else []
    after = _runs(draw, 0) if end == IN_HUGE else []
    return Layout(before, huge, after, skew)


FALLBACKS = {
    "strict": None,
    "impatient": Fallback(patience=0.0),
    "patient": Fallback(patience=0.002),
    "copies what is pinned": Fallback(copy_pinned=True, patience=0.0),
    "loses writes": Fallback(copy_pinned=True, patience=0.002, lose_writes=True),
}


def terms(kind: str) -> st.SearchStrategy[Terms]:
    """Terms with this fallback."""
    return st.builds(Terms, st.just(FALLBACKS[kind]), st.booleans(), st.booleans())
