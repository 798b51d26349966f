"""Whatever lies at both sides of a move: each page fares as docs/move.md says, and no byte changes.

Layouts are drawn, and built by the kernel's own means: forks, swap, huge pages, pins and poison.
"""

from __future__ import annotations

import os
from array import array
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.kernel.layouts import (
    CHILD_ENDED,
    FALLBACKS,
    FORETOLD,
    HUGE_SOURCES,
    IN_HUGE,
    SHARED,
    SWAPPED,
    Fate,
    Layout,
    Terms,
    accepts,
    expect,
    fates_of,
    gone,
    layouts,
    terms,
)
from tests.support import system
from tests.support.calls import Barrier, in_child
from tests.support.kernel_tests import kernel_test
from tests.support.obstacles import Pins, swap_out
from tests.support.page_contents import PAGE, content
from tests.support.properties import UNTIMED
from uffdaemon import Advice, Memory, Outcome
from uffdaemon.errors import MoveRefused
from uffdaemon.kernel.page_probe import look
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages
from uffdaemon.moves import Moved, can_move, move, move_many
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

FEATURES = Features.MOVE | Features.POISON | Features.PAGEFAULT_FLAG_WP
BOTH = RegisterMode.MISSING | RegisterMode.WP
LENGTH = 3 * HUGE_PAGE_SIZE
ORIGINAL = content(LENGTH // PAGE)
OTHER = content(1, seed=1)
PRESENT = ("own", "pinned", "shared", "child ended")
"""Sources with a page in memory that is no page of zeros."""
EMPTY = [False] * (LENGTH // PAGE)
HUGE = slice(HUGE_PAGE_SIZE, 2 * HUGE_PAGE_SIZE)
"""Where a layout's huge page is."""


@pytest.fixture(scope="module")
def swap_space() -> Iterator[None]:
    """Somewhere to swap to."""
    with system.swap():
        yield


@pytest.mark.usefixtures("swap_space", "transparent_huge_pages")
@pytest.mark.parametrize("kind", FALLBACKS)
@kernel_test(features=FEATURES)
def test_every_page_fares_as_the_rules_say(kind: str) -> None:
    # What is still on its way to the lists of another CPU is not paged out.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    let_go = Barrier()

    for number, huge in enumerate((None, *HUGE_SOURCES)):
        # The same each time, and something else for each kind.  To make what fails smaller would
        # take longer than a test may.
        @seed(10 * number + list(FALLBACKS).index(kind))
        @settings(UNTIMED, max_examples=8, database=None, phases=[Phase.generate])
        @given(layouts(huge), terms(kind), st.lists(st.integers(1, 2 * IN_HUGE), max_size=4))
        def check(layout: Layout, asked: Terms, cuts: list[int]) -> None:
            with Userfaultfd.open(FEATURES) as uffd:
                with built(uffd, layout, asked, let_go) as made:
                    made.check_foretold(uffd, asked)
                    made.check_moved(made.move(uffd, asked), asked)
                with built(uffd, layout, asked, let_go) as made:
                    made.check_moved(made.move_many(uffd, asked, cuts), asked)

        check()


@dataclass
class Built:
    """A layout in memory; `content` is what each page of the source's memory is to hold."""

    layout: Layout
    source: Memory
    target: Memory
    content: dict[int, bytes] = field(default_factory=dict[int, bytes], repr=False)

    @property
    def src(self) -> int:
        return self.source.start + self.layout.first * PAGE

    @property
    def dst(self) -> int:
        return self.target.start + (self.layout.first + self.layout.skew) * PAGE

    # -- moving --------------------------------------------------------------------------------

    def move(self, uffd: Userfaultfd, terms: Terms) -> Moved:
        try:
            return move(
                uffd,
                self.dst,
                self.src,
                self.layout.length,
                fallback=terms.fallback,
                allow_source_holes=terms.allow_source_holes,
            )
        except MoveRefused as error:
            return _refused(error)

    def move_many(self, uffd: Userfaultfd, terms: Terms, cuts: list[int]) -> Moved:
        edges = sorted({0, len(self.layout.pages), *(c % len(self.layout.pages) for c in cuts)})
        flat = array("Q")
        for begin, end in pairwise(edges):
            flat.extend(
                (self.dst + begin * PAGE, self.src + begin * PAGE, (end - begin) * PAGE),
            )
        try:
            return move_many(
                uffd,
                flat,
                fallback=terms.fallback,
                allow_source_holes=terms.allow_source_holes,
            )
        except MoveRefused as error:
            return _refused(error)

    # -- what should hold ----------------------------------------------------------------------

    def check_foretold(self, uffd: Userfaultfd, terms: Terms) -> None:
        """What can be seen beforehand is seen, and looking changes nothing."""
        before = self._looks()
        runs = can_move(
            uffd,
            self.dst,
            self.src,
            self.layout.length,
            fallback=terms.fallback,
            allow_source_holes=terms.allow_source_holes,
        )
        assert self._looks() == before
        fates = fates_of(Moved(tuple(runs)), self.src)
        for n, page in enumerate(self.layout.pages):
            if page.source in FORETOLD or page.target != "empty":
                assert fates[n] == expect(page, terms), (n, page, runs)
            else:
                assert fates[n].outcome is not Outcome.FAILED, (n, page, runs)

    def check_moved(self, moved: Moved, terms: Terms) -> None:
        """Each page had its fate, and is where that says, unchanged."""
        fates = fates_of(moved, self.src)
        pages = self.layout.pages
        assert sorted(fates) == list(range(len(pages)))
        for n, page in enumerate(pages):
            assert accepts(page, terms, fates[n]), (n, page, fates[n], expect(page, terms), moved)
        self._check_source(fates)
        self._check_target(fates)

    def _check_source(self, fates: dict[int, Fate]) -> None:
        first, pages = self.layout.first, self.layout.pages
        there = list(EMPTY)
        for at in self.content:
            there[at] = True
        for n, page in enumerate(pages):
            there[first + n] = not gone(page, fates[n])
        found = look(self.source.start, LENGTH)
        assert [page.there for page in found] == there
        for n, page in enumerate(pages):
            assert found[first + n].marker == (there[first + n] and page.source == "marker")
        for at, data in self.content.items():
            if there[at]:
                assert self.source.read(at * PAGE, PAGE) == data

    def _check_target(self, fates: dict[int, Fate]) -> None:
        first, pages = self.layout.first, self.layout.pages
        there = list(EMPTY)
        expected: dict[int, bytes] = {}
        for n, page in enumerate(pages):
            at = first + n + self.layout.skew
            there[at] = page.target != "empty"
            if page.target == "occupied":
                expected[at] = OTHER
            elif page.target == "empty" and gone(page, fates[n]) and page.source != "hole":
                there[at] = True
                expected[at] = self.content[first + n]
        found = look(self.target.start, LENGTH)
        assert [page.there for page in found] == there
        for n, page in enumerate(pages):
            at = first + n + self.layout.skew
            assert found[at].marker == (page.target == "marker")
        for at, data in expected.items():
            assert self.target.read(at * PAGE, PAGE) == data

    def _looks(self) -> object:
        return look(self.source.start, LENGTH), look(self.target.start, LENGTH)

    # -- making --------------------------------------------------------------------------------

    def make(self, *sources: str) -> None:
        """Bring all pages of these kinds into being."""
        swapped: list[tuple[int, int]] = []
        for n, page in enumerate(self.layout.pages):
            if page.source in sources and not page.huge:
                at = self.layout.first + n
                self._make(at, page.source)
                if page.source in SWAPPED:
                    swapped.append((at * PAGE, PAGE))
        huge = self.layout.huge
        if huge is not None and huge.source in sources:
            self._make_huge(huge.source)
            if huge.source in SWAPPED:
                swapped.append((HUGE.start, HUGE_PAGE_SIZE))
        for offset, length in swapped:
            swap_out(self.source.start + offset, length)

    def _make(self, at: int, source: str) -> None:
        if source == "zero":
            self.source.touch(at * PAGE, PAGE)
            self.content[at] = bytes(PAGE)
        else:
            self.content[at] = ORIGINAL[at * PAGE : (at + 1) * PAGE]
            self.source.write(at * PAGE, self.content[at])

    def _make_huge(self, source: str) -> None:
        # Only for as long as it takes: nothing else is to become huge.
        self.source.advise(Advice.HUGEPAGE, HUGE.start, HUGE_PAGE_SIZE)
        if source == "zero":
            self.source.touch(HUGE.start, PAGE)
        else:
            self.source.write(HUGE.start, ORIGINAL[HUGE])
        self.source.advise(Advice.NOHUGEPAGE, HUGE.start, HUGE_PAGE_SIZE)
        [found] = scan_pages(self.source.start + HUGE.start, HUGE_PAGE_SIZE)
        assert found.categories & PageCategory.HUGE
        for at in range(IN_HUGE, 2 * IN_HUGE):
            data = ORIGINAL[at * PAGE : (at + 1) * PAGE]
            self.content[at] = bytes(PAGE) if source == "zero" else data

    @property
    def shared(self) -> list[int]:
        """Which pages of the source's memory a child shares."""
        first = self.layout.first
        return [first + n for n, page in enumerate(self.layout.pages) if page.source in SHARED]

    def pinned(self) -> list[int]:
        """Addresses of what is to be pinned; one is enough for a huge page."""
        pages = self.layout.pages
        found = [n for n, page in enumerate(pages) if page.source == "pinned" and not page.huge]
        huge = [n for n, page in enumerate(pages) if page.source == "pinned" and page.huge]
        return [self.src + n * PAGE for n in found + huge[-1:]]


@contextmanager
def built(uffd: Userfaultfd, layout: Layout, terms: Terms, let_go: Barrier) -> Iterator[Built]:
    """The layout; the child that shares pages lives until the end, and then looks at them."""
    with ExitStack() as stack:
        source, target = stack.enter_context(_mapped()), stack.enter_context(_mapped())
        made = Built(layout, source, target)

        def look_on() -> list[bytes]:
            let_go.wait()
            return [source.read(at * PAGE, PAGE) for at in made.shared]

        # A fork shares all that is there: first what the living child is to share.
        made.make(*SHARED)
        child = in_child(look_on)
        try:
            made.make(*CHILD_ENDED)
            assert in_child(lambda: None).result() is None
            made.make("own", "zero", "swapped", "pinned")
            _mark(uffd, made, terms)
            stack.enter_context(Pins(*made.pinned()))
            found = look(made.src, layout.length)
            for n, (page, facts) in enumerate(zip(layout.pages, found, strict=True)):
                assert facts.present == (page.source in PRESENT), (n, page, facts)
            yield made
        finally:
            let_go.cross()
            seen = child.result()
        assert seen == [made.content[at] for at in made.shared]


def _mapped() -> Memory:
    """Memory in which huge pages can be, and none comes into being by itself."""
    memory = Memory.map(LENGTH, transparent_huge=True)
    memory.advise(Advice.NOHUGEPAGE)
    return memory


def _mark(uffd: Userfaultfd, made: Built, terms: Terms) -> None:
    """Register what is to be registered, with what stands at the destination and all poison."""
    mode = BOTH if terms.registered else RegisterMode.MISSING
    uffd.register(made.source.start, LENGTH, mode)
    uffd.register(made.target.start, LENGTH, mode)
    for n, page in enumerate(made.layout.pages):
        if page.source == "marker":
            uffd.poison(made.src + n * PAGE, PAGE)
        if page.target == "marker":
            uffd.poison(made.dst + n * PAGE, PAGE)
        elif page.target == "occupied":
            uffd.copy(made.dst + n * PAGE, OTHER)
    if not terms.registered:
        uffd.unregister(made.source.start, LENGTH)


def _refused(error: MoveRefused) -> Moved:
    """What the error says of all pages; it is that of the first that was refused."""
    first = error.moved.refused[0]
    assert (error.cause, error.errno) == (first.cause, first.error)
    assert (error.address, error.length) == (first.dst, first.length)
    return error.moved
