"""Policies put together at random, and what they say of single pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from tests.pure.fakes import FakeSource, a_fault
from uffdaemon import actions
from uffdaemon.actions import Action, Extent, Fallback, Fill, Span
from uffdaemon.policy import (
    ByKind,
    ByRange,
    Continue,
    CopyFrom,
    FaultAround,
    FirstOf,
    MoveOrCopy,
    Poison,
    Reach,
    StrictMove,
    Unprotect,
    ZeroPage,
)
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from uffdaemon.model.region import Fault, Policy, Region

PAGES = 24
"""What the region has that these policies are made for."""

KINDS = st.sampled_from((*FaultKind, FaultKind.MISSING, FaultKind.MISSING, FaultKind.MISSING))


# -- policies of an application's own ----------------------------------------------------------


@dataclass(frozen=True)
class Mine:
    """Answers missing pages, as many as it likes at a time."""

    extent: Extent

    def __call__(self, fault: Fault) -> Action | None:
        return actions.Zero(self.extent) if fault.kind is FaultKind.MISSING else None


@dataclass(frozen=True)
class Striped:
    """Poisons every other stripe of pages, and says how far that holds."""

    pages: int

    def __call__(self, fault: Fault) -> Action | None:
        odd = fault.page // self.pages % 2
        return actions.Poison() if odd else None

    def reach(self, fault: Fault) -> Reach:
        size = self.pages * fault.region.page_size
        start = fault.offset - fault.offset % size
        return start, start + size


class LikeZeroPage(ZeroPage):
    """A subclass may decide otherwise."""

    def __call__(self, fault: Fault) -> Action | None:
        return actions.Hold("not like ZeroPage at all") if super().__call__(fault) else None


def nobody(fault: Fault) -> Action | None:
    """Never answers, which nobody can know."""
    del fault
    return None


WIDE = st.integers(2, 40)

# -- strategies --------------------------------------------------------------------------------


def sources(page_size: int) -> st.SearchStrategy[FakeSource]:
    sizes = st.one_of(st.integers(0, PAGES * 2), st.just(PAGES * 4)).flatmap(
        lambda pages: st.sampled_from((pages * page_size, max(pages * page_size - 100, 0)))
    )
    bases = st.sampled_from((0x10_0000_0000, 0x10_0000_0123, None))
    return st.builds(FakeSource, sizes, bases)


def offsets(page_size: int) -> st.SearchStrategy[int]:
    return st.one_of(
        st.just(0),
        st.integers(-PAGES, PAGES).map(lambda page: page * page_size),
        st.integers(-PAGES * page_size, PAGES * page_size),
    )


def plain_leaves(page_size: int) -> st.SearchStrategy[Policy]:
    """Those that are known to be mappings."""
    return st.one_of(
        st.just(ZeroPage()),
        st.builds(CopyFrom, sources(page_size), offsets(page_size), st.booleans()),
        st.builds(Continue, st.booleans()),
        st.just(Poison()),
        st.just(StrictMove(0x20_0000_0000)),
        st.just(MoveOrCopy(0x20_0000_0000, Fallback(patience=0.5))),
    )


def leaves(page_size: int) -> st.SearchStrategy[Policy]:
    spans = st.just(Span(0, PAGES * page_size))
    return st.one_of(
        plain_leaves(page_size),
        st.just(Unprotect()),
        st.builds(Mine, st.one_of(st.integers(1, 8), spans)),
        st.builds(Striped, st.integers(1, 5)),
        st.just(LikeZeroPage()),
        st.just(nobody),
    )


def _ranges(page_size: int, inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    """Ranges and gaps; some are not made of whole pages, some lie beyond the region."""

    @st.composite
    def build(draw: st.DrawFn) -> Policy:
        jitter = draw(st.sampled_from((0, 0, 0, 100)))
        pages = draw(st.lists(st.integers(0, PAGES + 6), min_size=2, max_size=6, unique=True))
        cuts = [page * page_size + jitter * (page % 2) for page in sorted(pages)]
        ranges = [(low, high - low, draw(inner)) for low, high in pairwise(cuts)]
        kept = draw(st.lists(st.booleans(), min_size=len(ranges), max_size=len(ranges)))
        return ByRange([entry for entry, keep in zip(ranges, kept, strict=True) if keep])

    return build()


def policies(
    page_size: int, leaf: st.SearchStrategy[Policy] | None = None
) -> st.SearchStrategy[Policy]:
    def grow(inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
        maybe = st.none() | inner
        return st.one_of(
            st.lists(inner, max_size=4).map(lambda some: FirstOf(*some)),
            st.builds(ByKind, missing=maybe, minor=maybe, write_protect=maybe),
            _ranges(page_size, inner),
            st.builds(FaultAround, inner, st.integers(1, 40)),
            # What is most often asked for: exceptions first, and wide windows between them.
            st.builds(FirstOf, _ranges(page_size, inner), st.builds(FaultAround, inner, WIDE)),
            st.builds(FirstOf, _ranges(page_size, inner), _ranges(page_size, inner)),
        )

    return st.recursive(leaves(page_size) if leaf is None else leaf, grow, max_leaves=6)


# -- what they say -----------------------------------------------------------------------------


def for_single_pages(policy: Policy) -> Policy:
    """The same policy with nothing in it that widens."""
    if isinstance(policy, FaultAround):
        return for_single_pages(policy.policy)
    if isinstance(policy, FirstOf):
        return FirstOf(*map(for_single_pages, policy.policies))
    if isinstance(policy, ByRange):
        return ByRange([(at, size, for_single_pages(one)) for at, size, one in policy.ranges])
    if isinstance(policy, ByKind):
        missing, minor, protected = (
            None if one is None else for_single_pages(one) for one in policy.policies.values()
        )
        return ByKind(missing=missing, minor=minor, write_protect=protected)
    return Mine(1) if isinstance(policy, Mine) else policy


def alone(action: Action | None) -> Action | None:
    """The action without its extent, so that answers for different pages can be compared."""
    return replace(action, extent=1) if isinstance(action, Fill) else action


def answers(policy: Policy, region: Region, kind: FaultKind) -> list[Action | None]:
    """What is said of each page by itself."""
    single = for_single_pages(policy)
    return [alone(single(a_fault(region, page, kind))) for page in range(region.pages.pages)]
