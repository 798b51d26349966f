"""Whatever the layout: every page has one fate, and nothing is lost, doubled or made up."""

from __future__ import annotations

import errno

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.machine import BUSY, CURED, DST, PAGE, SRC, Machine
from uffdaemon.actions import Fallback
from uffdaemon.moves.ladder import EVENT_PATIENCE
from uffdaemon.moves.requests import CopyOver, Terms, Unshare, Wait
from uffdaemon.uapi.moved import Cause
from uffdaemon.uapi.outcomes import Outcome

STATES = ("own", "own", "hole", "zero", "swapped", *BUSY, "marker")
FALLBACKS = st.one_of(
    st.none(),
    st.builds(
        Fallback,
        copy_pinned=st.booleans(),
        patience=st.sampled_from([0.0, 0.01, 1.0]),
        lose_writes=st.booleans(),
    ),
)
LAYOUTS = st.lists(
    st.tuples(st.sampled_from(STATES), st.integers(1, 5), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=400)
@given(LAYOUTS, FALLBACKS, st.data())
def test_every_page_has_one_fate(
    layout: list[tuple[str, int, bool]], fallback: Fallback | None, data: st.DataObject
) -> None:
    holes = data.draw(st.booleans())
    pages = [state for state, count, _ in layout for _ in range(count)]
    taken = [full for _, count, full in layout for _ in range(count)]
    occupied = {n for n, full in enumerate(taken) if full and pages[n] != "own"}
    machine = Machine(
        list(pages),
        occupied,
        movable=data.draw(st.booleans()),
        in_flight=data.draw(st.integers(0, 4)),
        protectable=data.draw(st.booleans()),
        pin_ends_after=data.draw(st.sampled_from([None, 3])),
        stubborn=data.draw(st.booleans()),
        parts=None if len(pages) < 2 else [1, len(pages) - 1],
    )
    moved = machine.run(Terms(fallback, allow_source_holes=holes, piece=2 * PAGE))

    at = 0
    for run in moved.runs:
        assert (run.dst, run.src) == (DST + at, SRC + at)
        assert run.arrived == (run.error == 0)
        for n in range(at // PAGE, (at + run.length) // PAGE):
            if run.arrived and pages[n] != "hole":
                assert machine.pages[n] == "hole"
                assert n in machine.arrived
            elif not run.arrived:
                assert n not in machine.arrived
                assert (machine.pages[n] == "hole") == (pages[n] == "hole")
        at += run.length
    assert at == len(pages) * PAGE

    assert machine.waited <= max(EVENT_PATIENCE, fallback.patience if fallback else 0) + 1.0
    if fallback is None:
        assert not any(isinstance(ask, CopyOver) for ask in machine.log)
        assert {run.outcome for run in moved.runs} <= {
            Outcome.MOVED,
            Outcome.UNSHARED_AND_MOVED,
            Outcome.FAILED,
        }
        pinned = any(isinstance(ask, Wait) and "pinned" in ask.reason for ask in machine.log)
        assert not pinned
    else:
        for ask in machine.log:
            assert not (isinstance(ask, CopyOver) and not ask.exact) or fallback.lose_writes
        if not fallback.copy_pinned:
            assert not moved.bytes(Outcome.COPIED_PINNED)
    for run in moved.runs:
        if run.cause is Cause.SOURCE_HOLE:
            assert run.error == errno.ENOENT


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["own", "hole", "zero", *CURED]), min_size=1, max_size=30))
def test_without_pins_all_that_is_there_moves(pages: list[str]) -> None:
    machine = Machine(list(pages))
    moved = machine.run(Terms(Fallback(), allow_source_holes=True))
    assert moved.complete
    assert machine.pages == ["hole"] * len(pages)
    assert not any(isinstance(ask, CopyOver) for ask in machine.log)
    assert all(ask.length for ask in machine.log if isinstance(ask, Unshare))
