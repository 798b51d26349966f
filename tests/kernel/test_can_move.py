"""What `can_move` says beforehand is what `move` does, page by page; and asking changes nothing."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.support.kernel_tests import kernel_test
from tests.support.obstacles import (
    BOTH_MODES,
    PROTECTED,
    DirectRead,
    Pins,
    Sharer,
    lock,
    merge,
    protect,
    swap_out,
)
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType, Outcome
from uffdaemon.errors import MoveRefused
from uffdaemon.lowlevel import Userfaultfd
from uffdaemon.moves import Cause, Fallback, Run, can_move, move
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# -- foretelling -------------------------------------------------------------------------------


class Scene(NamedTuple):
    """Four pages that move, until something is done to them."""

    uffd: Userfaultfd
    source: Memory
    memory: Memory

    @property
    def third(self) -> tuple[int, int]:
        """The page that is special: where it is, and where it is due."""
        return self.source.start + 2 * PAGE, self.memory.start + 2 * PAGE


def share(found: Scene) -> None:
    share_third(found)


def share_third(found: Scene) -> Sharer:
    """Have a child share the third page, and no other."""
    sharer = Sharer(found.source)
    found.source.advise(Advice.POPULATE_WRITE, 0, 2 * PAGE)
    found.source.advise(Advice.POPULATE_WRITE, 3 * PAGE, PAGE)
    return sharer


def plain(found: Scene) -> None:
    pass


def zero_page(found: Scene) -> None:
    hole(found)
    found.uffd.zeropage(found.third[0], PAGE)


def hole(found: Scene) -> None:
    found.source.advise(Advice.DONTNEED, 2 * PAGE, PAGE)


def poison(found: Scene) -> None:
    hole(found)
    found.uffd.poison(found.third[0], PAGE)


def occupied(found: Scene) -> None:
    found.uffd.zeropage(found.third[1], PAGE)


def poisoned_destination(found: Scene) -> None:
    found.uffd.poison(found.third[1], PAGE)


def already_moved(found: Scene) -> None:
    source, destination = found.third
    move(found.uffd, destination, source, PAGE)


def not_registered(found: Scene) -> None:
    found.uffd.unregister(found.third[1], PAGE)


def read_only(found: Scene) -> None:
    protect(found.third[0], PAGE, 1)


STATES: Final[dict[str, Callable[[Scene], None]]] = {
    state.__name__: state
    for state in (
        plain,
        zero_page,
        share,
        hole,
        poison,
        occupied,
        poisoned_destination,
        already_moved,
        not_registered,
        read_only,
    )
}


def pagemaps(*memories: Memory) -> list[bytes]:
    """All that /proc/self/pagemap says of them."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return [
            os.pread(pagemap.fileno(), memory.length // PAGE * 8, memory.start // PAGE * 8)
            for memory in memories
        ]


def foretell_and_move(
    found: Scene, fallback: Fallback | None, *, allow_source_holes: bool = False
) -> tuple[list[Run], list[Run]]:
    """What `can_move` says, which must change nothing, and what `move` comes to."""
    uffd, source, memory = found
    where = memory.start, source.start, source.length
    before = pagemaps(memory, source)
    foretold = can_move(uffd, *where, fallback=fallback, allow_source_holes=allow_source_holes)
    assert pagemaps(memory, source) == before
    try:
        moved = move(uffd, *where, fallback=fallback, allow_source_holes=allow_source_holes)
    except MoveRefused as refused:
        moved = refused.moved
    return foretold, list(moved.runs)


FALLBACKS: Final = pytest.mark.parametrize(
    "fallback", [None, Fallback(patience=0.0)], ids=["strict", "fallback"]
)


@contextmanager
def scene(length: int = 4 * PAGE, *, huge: bool = False) -> Iterator[Scene]:
    """Both sides are registered for everything, and the source is full."""
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(length, transparent_huge=huge) as source,
        Memory.map(length, transparent_huge=huge) as memory,
    ):
        source.write(0, b"m" * length)
        for side in (source, memory):
            uffd.register(side.start, side.length, BOTH_MODES)
        yield Scene(uffd, source, memory)


@FALLBACKS
@pytest.mark.parametrize("state", STATES)
@kernel_test(features=PROTECTED)
def test_what_is_foretold_comes_true(state: str, fallback: Fallback | None) -> None:
    with scene() as found:
        STATES[state](found)
        foretold, came = foretell_and_move(found, fallback)
        assert foretold == came


@FALLBACKS
@pytest.mark.usefixtures("ksm")
@kernel_test(features=PROTECTED)
def test_a_merged_page_is_foretold(fallback: Fallback | None) -> None:
    with scene() as found:
        merge(found.third[0])
        foretold, came = foretell_and_move(found, fallback)
        assert foretold == came
        assert Cause.MERGED in [run.cause for run in foretold]


@FALLBACKS
@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=PROTECTED)
def test_a_huge_page_that_a_child_shares_is_foretold(fallback: Fallback | None) -> None:
    with scene(HUGE_PAGE_SIZE, huge=True) as found:
        sharer = Sharer(found.source)
        foretold, came = foretell_and_move(found, fallback)
        assert foretold == came
        assert [(run.length, run.cause) for run in foretold] == [(HUGE_PAGE_SIZE, Cause.SHARED)]
        sharer.sees()


@pytest.mark.parametrize("allowed", [False, True])
@kernel_test(features=PROTECTED)
def test_holes_are_foretold_as_they_are_allowed(allowed: bool) -> None:
    with scene() as found:
        hole(found)
        foretold, came = foretell_and_move(found, None, allow_source_holes=allowed)
        assert foretold == came
        assert [run.outcome for run in foretold if not run.arrived] == [Outcome.FAILED] * (
            not allowed
        )


@FALLBACKS
@pytest.mark.parametrize("kind", [MemoryType.SHMEM, MemoryType.SHMEM_PRIVATE])
@kernel_test(features=PROTECTED)
def test_memory_that_is_only_copied_is_foretold(
    kind: MemoryType, fallback: Fallback | None
) -> None:
    with scene() as found, Memory.map(4 * PAGE, kind) as other:
        other.write(0, b"o" * other.length)
        found.uffd.register(other.start, other.length, BOTH_MODES)
        foretold, came = foretell_and_move(found._replace(source=other), fallback)
        assert foretold == came
        [run] = foretold
        expected = Outcome.EXACTLY_COPIED if fallback else Outcome.FAILED
        assert (run.outcome, run.cause) == (expected, Cause.WRONG_MEMORY)


@FALLBACKS
@kernel_test(features=PROTECTED)
def test_another_process_is_foretold(fallback: Fallback | None) -> None:
    with scene() as found:
        theirs = Userfaultfd.adopt(os.dup(found.uffd.fileno()))
        [run] = can_move(
            theirs, found.memory.start, found.source.start, 4 * PAGE, fallback=fallback
        )
        expected = Outcome.EXACTLY_COPIED if fallback else Outcome.FAILED
        assert (run.outcome, run.cause) == (expected, Cause.OTHER_PROCESS)


# -- what cannot be seen -----------------------------------------------------------------------


def pin(found: Scene) -> Pins:
    return Pins(found.third[0])


def read_directly(found: Scene) -> DirectRead:
    return DirectRead(found.source, found.third[0], b"d" * PAGE)


def share_for_a_moment(found: Scene) -> None:
    share_third(found).sees()


def share_swapped(found: Scene) -> None:
    swap_out(found.third[0])
    share_third(found)


def lock_third(found: Scene) -> None:
    lock(found.third[0])


UNSEEN: Final[dict[str, tuple[Callable[[Scene], object], Outcome, Cause]]] = {
    "pinned": (pin, Outcome.FAILED, Cause.PINNED),
    "under O_DIRECT": (read_directly, Outcome.FAILED, Cause.PINNED),
    "its child has ended": (share_for_a_moment, Outcome.UNSHARED_AND_MOVED, Cause.SHARED),
    "swapped out and shared": (share_swapped, Outcome.FAILED, Cause.SHARED),
    "locked": (lock_third, Outcome.FAILED, Cause.WRONG_MEMORY),
}


@pytest.mark.parametrize("state", UNSEEN)
@pytest.mark.usefixtures("swap")
@kernel_test(features=PROTECTED)
def test_what_cannot_be_seen_is_foretold_to_move(state: str) -> None:
    bring_about, outcome, cause = UNSEEN[state]
    with scene() as found:
        busy = bring_about(found)
        foretold, came = foretell_and_move(found, None)
        if isinstance(busy, DirectRead):
            busy.end()  # or else this process could not end
        assert {run.outcome for run in foretold} == {Outcome.MOVED}
        fates = [(run.length // PAGE, run.outcome, run.cause) for run in came]
        moved = Outcome.MOVED, None
        assert fates == [(2, *moved), (1, outcome, cause), (1, *moved)]
