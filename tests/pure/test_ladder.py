"""Each rung of the ladder, and each refusal, by name."""

from __future__ import annotations

import errno

import pytest

from tests.pure.machine import DST, PAGE, SRC, Machine
from uffdaemon.actions import Fallback
from uffdaemon.moves.ladder import ATTEMPTS
from uffdaemon.moves.requests import CopyOver, Issue, Look, Terms, Unshare, Wait
from uffdaemon.ranges import HUGE_PAGE_SIZE
from uffdaemon.uapi.moved import Cause, Run
from uffdaemon.uapi.outcomes import Code, Outcome
from uffdaemon.uapi.page_facts import PageFacts

HUGE_PAGE = HUGE_PAGE_SIZE // PAGE  # pages
STRICT = Terms()
CLIMB = Terms(Fallback())
PATIENT = Terms(Fallback(patience=60.0))


def fates(machine: Machine, terms: Terms) -> list[tuple[int, Outcome, Cause | None, int]]:
    """(pages, outcome, cause, errno) of the runs, which must follow each other."""
    moved = machine.run(terms)
    at = 0
    for run in moved.runs:
        assert (run.dst, run.src) == (DST + at, SRC + at)
        at += run.length
    assert at == len(machine.pages) * PAGE
    return [(run.length // PAGE, run.outcome, run.cause, run.error) for run in moved.runs]


def test_what_moves_moves_in_one_go() -> None:
    machine = Machine(["own", "zero", "swapped"])
    assert fates(machine, STRICT) == [(3, Outcome.MOVED, None, 0)]
    assert len(machine.log) == 1


def test_what_had_arrived_before_is_part_of_it() -> None:
    machine = Machine(["hole", "own"])
    assert machine.run(STRICT, moved=PAGE).runs == (Run(DST, SRC, 2 * PAGE, Outcome.MOVED),)


@pytest.mark.parametrize(
    ("state", "cause", "error"),
    [
        ("shared", Cause.SHARED, errno.EBUSY),
        ("shared swap", Cause.SHARED, errno.EBUSY),
        ("merged", Cause.MERGED, errno.EBUSY),
        ("pinned", Cause.PINNED, errno.EBUSY),
        ("hole", Cause.SOURCE_HOLE, errno.ENOENT),
        ("marker", Cause.SOURCE_MARKER, errno.EFAULT),
    ],
)
def test_a_strict_move_fails_by_name_and_its_neighbours_move(
    state: str, cause: Cause, error: int
) -> None:
    machine = Machine(["own", state, "own"])
    assert fates(machine, STRICT) == [
        (1, Outcome.MOVED, None, 0),
        (1, Outcome.FAILED, cause, error),
        (1, Outcome.MOVED, None, 0),
    ]
    assert machine.waited == 0
    assert not any(isinstance(ask, CopyOver) for ask in machine.log)


def test_a_page_whose_other_process_has_exited_moves_strictly() -> None:
    machine = Machine(["child ended"])
    assert fates(machine, STRICT) == [(1, Outcome.UNSHARED_AND_MOVED, Cause.SHARED, 0)]


@pytest.mark.parametrize(
    ("state", "cause"),
    [("shared", Cause.SHARED), ("shared swap", Cause.SHARED), ("merged", Cause.MERGED)],
)
def test_the_ladder_unshares_and_moves(state: str, cause: Cause) -> None:
    machine = Machine([state] * 3)
    assert fates(machine, CLIMB) == [(3, Outcome.UNSHARED_AND_MOVED, cause, 0)]


def test_pages_shared_alike_are_unshared_together() -> None:
    pages = HUGE_PAGE + 188
    machine = Machine(["shared"] * pages)
    assert fates(machine, CLIMB) == [(pages, Outcome.UNSHARED_AND_MOVED, Cause.SHARED, 0)]
    unshared = [ask for ask in machine.log if isinstance(ask, Unshare)]
    assert [ask.length // PAGE for ask in unshared] == [HUGE_PAGE, 188]


def test_a_run_of_shared_pages_ends_where_something_else_begins() -> None:
    machine = Machine(["shared", "hole", "shared", "merged", "zero", "shared"])
    assert [fate[:3] for fate in fates(machine, CLIMB)] == [
        (1, Outcome.UNSHARED_AND_MOVED, Cause.SHARED),
        (1, Outcome.FAILED, Cause.SOURCE_HOLE),
        (1, Outcome.UNSHARED_AND_MOVED, Cause.SHARED),
        (1, Outcome.UNSHARED_AND_MOVED, Cause.MERGED),
        (1, Outcome.MOVED, None),
        (1, Outcome.UNSHARED_AND_MOVED, Cause.SHARED),
    ]


def test_a_pin_that_ends_is_waited_for() -> None:
    machine = Machine(["pinned", "pinned"], pin_ends_after=5)
    assert [fate[:3] for fate in fates(machine, PATIENT)] == [
        (1, Outcome.WAITED_AND_MOVED, Cause.PINNED),
        (1, Outcome.MOVED, None),
    ]


def test_a_pin_that_does_not_end_is_waited_for_only_so_long() -> None:
    machine = Machine(["pinned"] * 10)
    assert fates(machine, CLIMB) == [(10, Outcome.FAILED, Cause.PINNED, errno.EBUSY)]
    assert 1.0 <= machine.waited < 1.1  # for all of them together


def test_a_pinned_page_is_copied_only_if_allowed() -> None:
    machine = Machine(["pinned"])
    terms = Terms(Fallback(copy_pinned=True, patience=0.0))
    assert fates(machine, terms) == [(1, Outcome.COPIED_PINNED, Cause.PINNED, 0)]
    [copy] = [ask for ask in machine.log if isinstance(ask, CopyOver)]
    assert copy.exact


def test_a_page_that_is_taken_away_while_its_pin_is_waited_for_is_a_hole() -> None:
    class Taken(Machine):
        def answer(self, ask: object) -> None:
            if isinstance(ask, Wait) and "pinned" in ask.reason:
                self.pages = ["hole"]
            super().answer(ask)  # type: ignore[arg-type]

    machine = Taken(["pinned"])
    assert fates(machine, PATIENT) == [(1, Outcome.FAILED, Cause.SOURCE_HOLE, errno.ENOENT)]


def test_what_is_shared_again_and_again_is_copied_exactly() -> None:
    machine = Machine(["shared"], stubborn=True)
    assert fates(machine, CLIMB) == [(1, Outcome.EXACTLY_COPIED, Cause.SHARED, 0)]
    assert sum(isinstance(ask, Unshare) for ask in machine.log) > ATTEMPTS
    assert 1.0 <= machine.waited < 1.1
    machine = Machine(["shared"], stubborn=True)
    machine.run(Terms(Fallback(patience=0.0)))
    assert sum(isinstance(ask, Unshare) for ask in machine.log) == ATTEMPTS


def test_the_more_is_shared_anew_the_less_is_unshared_in_one_go() -> None:
    class Forking(Machine):
        def _unshare(self, first: int, count: int) -> None:
            if count <= some:
                super()._unshare(first, count)

    some = HUGE_PAGE // 8
    machine = Forking(["shared"] * 2 * HUGE_PAGE)
    assert fates(machine, CLIMB) == [(2 * HUGE_PAGE, Outcome.UNSHARED_AND_MOVED, Cause.SHARED, 0)]
    lengths = [ask.length // PAGE for ask in machine.log if isinstance(ask, Unshare)]
    assert lengths[:6] == [8 * some, 4 * some, 2 * some, some, 2 * some, some]
    assert sum(lengths) < 5 * 2 * HUGE_PAGE
    assert machine.waited == 0


def test_what_turns_out_shared_is_refused_when_strict() -> None:
    class SharedLater(Machine):
        def _unshare(self, first: int, count: int) -> None:
            self.pages[first : first + count] = ["shared"] * count

    machine = SharedLater(["child ended"])
    assert fates(machine, STRICT) == [(1, Outcome.FAILED, Cause.SHARED, errno.EBUSY)]


def test_what_vanishes_while_it_is_made_our_own_is_a_hole() -> None:
    class Vanishing(Machine):
        def answer(self, ask: object) -> None:
            super().answer(ask)  # type: ignore[arg-type]
            if isinstance(ask, Look) and sum(isinstance(a, Look) for a in self.log) == 3:
                self.pages[0] = "hole"
                ask.pages = [PageFacts(there=False)]

    machine = Vanishing(["shared"], stubborn=True)
    assert fates(machine, CLIMB) == [(1, Outcome.FAILED, Cause.SOURCE_HOLE, errno.ENOENT)]


def test_a_page_in_the_way_of_an_empty_source_was_moved_before() -> None:
    machine = Machine(["own", "hole", "own"], {1, 2})
    assert fates(machine, STRICT) == [
        (1, Outcome.MOVED, None, 0),
        (1, Outcome.FAILED, Cause.ALREADY_MOVED, errno.EEXIST),
        (1, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST),
    ]
    # Linux 6.18 says so of pages that it has moved just now, too, and then wakes nobody.
    wakes = [a.operation for a in machine.log if isinstance(a, Issue)]
    assert [(w.dst, w.length) for w in wakes if w.code is Code.WAKE] == [(DST + PAGE, PAGE)]


def test_what_looks_empty_and_is_busy_is_asked_about_a_few_times() -> None:
    class Blind(Machine):
        def answer(self, ask: object) -> None:
            super().answer(ask)  # type: ignore[arg-type]
            if isinstance(ask, Look):
                ask.pages = [PageFacts(there=False)] * len(ask.pages)

    machine = Blind(["own"], failing=("move", 0, errno.EBUSY))
    assert fates(machine, CLIMB) == [(1, Outcome.FAILED, Cause.NOT_EXCLUSIVE, errno.EBUSY)]


def test_a_huge_page_is_unshared_and_waited_for_as_a_whole() -> None:
    class Huge(Machine):
        def answer(self, ask: object) -> None:
            super().answer(ask)  # type: ignore[arg-type]
            if isinstance(ask, Look):
                ask.pages = [page._replace(huge=True) for page in ask.pages]

    machine = Huge(["pinned"] * HUGE_PAGE, pin_ends_after=3)
    assert fates(machine, PATIENT) == [(HUGE_PAGE, Outcome.WAITED_AND_MOVED, Cause.PINNED, 0)]
    assert {ask.length for ask in machine.log if isinstance(ask, Unshare)} == {HUGE_PAGE_SIZE}

    # With a hole in what looked huge before: only the page itself.
    machine = Huge(["pinned", *["hole"] * (HUGE_PAGE - 1)], pin_ends_after=3)
    assert fates(machine, PATIENT)[0] == (1, Outcome.WAITED_AND_MOVED, Cause.PINNED, 0)
    assert {ask.length for ask in machine.log if isinstance(ask, Unshare)} == {PAGE}


def test_what_is_there_already_stays_and_its_source_as_well() -> None:
    machine = Machine(["own"] * 3, occupied={1})
    assert fates(machine, CLIMB) == [
        (1, Outcome.MOVED, None, 0),
        (1, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST),
        (1, Outcome.MOVED, None, 0),
    ]
    assert machine.pages == ["hole", "own", "hole"]


def test_what_is_busy_for_the_same_reason_ends_where_the_destination_is_not_empty() -> None:
    shared = Outcome.FAILED, Cause.SHARED, errno.EBUSY
    unshared = Outcome.UNSHARED_AND_MOVED, Cause.SHARED, 0
    there = 1, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST
    for terms, fate in ((STRICT, shared), (CLIMB, unshared)):
        machine = Machine(["shared"] * 4, {2})
        assert fates(machine, terms) == [(2, *fate), there, (1, *fate)]
        # Nor is a copy made of what cannot move.
        assert machine.pages[2] == "shared"


def test_what_is_busy_and_has_no_place_to_go_is_refused_for_that() -> None:
    # A part of a huge page: there MOVE looks at the source first.
    machine = Machine(["shared"], {0}, failing=("move", 0, errno.EBUSY))
    assert fates(machine, CLIMB) == [(1, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST)]
    assert not any(isinstance(ask, Unshare) for ask in machine.log)


def test_holes_end_where_the_destination_is_not_empty() -> None:
    hole = 1, Outcome.FAILED, Cause.SOURCE_HOLE, errno.ENOENT
    moved = 1, Outcome.FAILED, Cause.ALREADY_MOVED, errno.EEXIST
    assert fates(Machine(["hole"] * 3, {1}), STRICT) == [hole, moved, hole]
    # Without a page table at the source MOVE does not look at the destination.
    machine = Machine(["hole"], {0}, failing=("move", 0, errno.ENOENT))
    assert fates(machine, STRICT) == [moved]


def test_holes_can_be_left_as_they_are() -> None:
    machine = Machine(["own", "hole", "own"])
    assert fates(machine, Terms(allow_source_holes=True)) == [(3, Outcome.MOVED, None, 0)]


def test_mappings_are_moved_one_after_the_other() -> None:
    machine = Machine(["own"] * 6, parts=[1, 3, 2])
    assert fates(machine, STRICT) == [(6, Outcome.MOVED, None, 0)]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOENT])
def test_a_destination_that_is_not_registered_is_called_so(error: int) -> None:
    machine = Machine(["own"] * 2, registered=False, move_error=error)
    assert fates(machine, CLIMB) == [(2, Outcome.FAILED, Cause.NOT_REGISTERED, error)]


def test_a_hole_that_is_none_when_looked_at_is_asked_about_again() -> None:
    machine = Machine(["own"], failing=("move", 0, errno.ENOENT))
    assert fates(machine, CLIMB) == [(1, Outcome.FAILED, Cause.SOURCE_HOLE, errno.ENOENT)]
    assert machine.waited > 0


@pytest.mark.parametrize(
    ("error", "cause"), [(errno.EINVAL, Cause.WRONG_MEMORY), (errno.ENOTTY, Cause.NO_MOVE)]
)
def test_where_move_is_impossible_the_copy_is_exact_or_there_is_none(
    error: int, cause: Cause
) -> None:
    strict = Machine(["own", "shared"], movable=False, move_error=error)
    assert fates(strict, STRICT) == [(2, Outcome.FAILED, cause, error)]
    machine = Machine(["own", "shared"], movable=False, move_error=error)
    assert fates(machine, CLIMB) == [(2, Outcome.EXACTLY_COPIED, cause, 0)]


@pytest.mark.parametrize(
    ("cause", "error"), [(Cause.OTHER_PROCESS, errno.EINVAL), (Cause.NO_MOVE, errno.ENOTTY)]
)
def test_where_move_is_known_to_be_impossible_it_is_not_tried(cause: Cause, error: int) -> None:
    terms = STRICT._replace(impossible=cause)
    machine = Machine(["own"])
    assert fates(machine, terms) == [(1, Outcome.FAILED, cause, error)]
    assert machine.log == []
    terms = CLIMB._replace(impossible=cause, piece=2 * PAGE)
    machine = Machine(["own"] * 5)
    assert fates(machine, terms) == [(5, Outcome.EXACTLY_COPIED, cause, 0)]
    copies = [ask.length // PAGE for ask in machine.log if isinstance(ask, CopyOver)]
    assert copies == [2, 2, 1]


def test_without_write_protection_a_copy_has_to_be_allowed_by_name() -> None:
    machine = Machine(["own"] * 2, movable=False, protectable=False)
    assert fates(machine, CLIMB) == [(2, Outcome.FAILED, Cause.UNPROTECTABLE, errno.ENOENT)]
    assert machine.pages == ["own"] * 2
    machine = Machine(["own"] * 2, movable=False, protectable=False)
    terms = Terms(Fallback(lose_writes=True))
    assert fates(machine, terms) == [(2, Outcome.COPIED, Cause.WRONG_MEMORY, 0)]
    machine = Machine(["pinned"], protectable=False)
    terms = Terms(Fallback(lose_writes=True, copy_pinned=True, patience=0.0))
    assert fates(machine, terms) == [(1, Outcome.COPIED_PINNED, Cause.PINNED, 0)]


def test_copies_leave_out_holes_and_markers_and_what_is_there() -> None:
    machine = Machine(["own", "hole", "own", "marker", "own", "own"], {5}, movable=False)
    assert [fate[:3] for fate in fates(machine, CLIMB)] == [
        (1, Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY),
        (1, Outcome.FAILED, Cause.SOURCE_HOLE),
        (1, Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY),
        (1, Outcome.FAILED, Cause.SOURCE_MARKER),
        (1, Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY),
        (1, Outcome.FAILED, Cause.NOT_EMPTY),
    ]
    machine = Machine(["own", "hole", "own"], movable=False)
    terms = CLIMB._replace(allow_source_holes=True)
    assert fates(machine, terms) == [(3, Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY, 0)]


@pytest.mark.parametrize(
    ("what", "error", "cause", "pages"),
    [
        ("copy", errno.EFAULT, Cause.SOURCE_MARKER, 1),
        ("copy", errno.ENOENT, Cause.NOT_REGISTERED, 3),
        ("copy", errno.ENOMEM, Cause.NO_MEMORY, 3),
        ("copy", errno.ESRCH, Cause.CLIENT_GONE, 3),
        ("copy", errno.EINVAL, Cause.UNPROTECTABLE, 3),
        ("protect", errno.EINVAL, Cause.UNPROTECTABLE, 3),
        ("release", errno.EPERM, Cause.OTHER, 3),
        ("unprotect", errno.EAGAIN, Cause.EVENT, 3),
        ("move", errno.ENOMEM, Cause.NO_MEMORY, 3),
        ("move", errno.ESRCH, Cause.CLIENT_GONE, 3),
        ("move", errno.EPERM, Cause.OTHER, 3),
    ],
)
def test_other_refusals_end_it_and_are_named(
    what: str, error: int, cause: Cause, pages: int
) -> None:
    machine = Machine(["own"] * 3, movable=what == "move", failing=(what, 0, error))
    assert fates(machine, CLIMB)[0] == (pages, Outcome.FAILED, cause, error)


@pytest.mark.parametrize("movable", [True, False])
@pytest.mark.parametrize("terms", [STRICT, CLIMB])
def test_an_event_in_flight_is_waited_for(terms: Terms, *, movable: bool) -> None:
    if not movable:
        terms = CLIMB._replace(impossible=Cause.OTHER_PROCESS)
    machine = Machine(["own"], movable=movable, in_flight=6)
    assert fates(machine, terms)[0][1] in (Outcome.MOVED, Outcome.EXACTLY_COPIED)
    assert machine.waited > 0
    machine = Machine(["own"], movable=movable, in_flight=1 << 30)
    assert fates(machine, terms) == [(1, Outcome.FAILED, Cause.EVENT, errno.EAGAIN)]
    assert 1.0 <= machine.waited < 1.1


def test_an_event_while_a_pin_is_waited_for_is_waited_for_as_well() -> None:
    class Eventful(Machine):
        def answer(self, ask: object) -> None:
            if isinstance(ask, Wait):
                self.in_flight = 1
            super().answer(ask)  # type: ignore[arg-type]

    machine = Eventful(["pinned"], pin_ends_after=4)
    assert fates(machine, CLIMB)[0][1] in (Outcome.WAITED_AND_MOVED, Outcome.MOVED, Outcome.FAILED)
