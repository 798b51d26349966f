"""What a move came to, and the errors that say so."""

from __future__ import annotations

import errno
from array import array

import pytest

from uffdaemon import errors
from uffdaemon.errors import error_of
from uffdaemon.moves.refusals import marker_in_the_way, refusal
from uffdaemon.uapi.moved import AllMoved, Cause, Moved, Run, joined
from uffdaemon.uapi.outcomes import Code, Operation, Outcome, result_of

PAGE = 4096
DST, SRC = 0x10000, 0x50000
MOVED = Run(DST, SRC, PAGE, Outcome.MOVED)
SHARED = Run(0x11000, 0x51000, PAGE, Outcome.FAILED, Cause.SHARED, errno.EBUSY)


def test_runs_of_one_fate_that_follow_each_other_are_one() -> None:
    further = MOVED._replace(dst=0x11000, src=0x51000)
    assert joined([MOVED, further]) == (MOVED._replace(length=2 * PAGE),)
    assert joined([MOVED, SHARED]) == (MOVED, SHARED)
    assert joined([MOVED, further._replace(src=0x90000)]) == (
        MOVED,
        further._replace(src=0x90000),
    )
    assert joined([]) == ()


def test_moved_tells_which_pages_arrived() -> None:
    moved = Moved((MOVED, SHARED))
    assert not moved.complete
    assert moved.refused == [SHARED]
    assert moved.bytes(Outcome.MOVED) == PAGE
    assert moved.bytes(Outcome.COPIED) == 0
    assert repr(moved) == (
        "<Moved: 4096 bytes from 0x50000 to 0x10000 moved; 4096 bytes from 0x51000 to 0x11000 "
        "failed: shared with another process (EBUSY)>"
    )
    assert repr(Moved(())) == "<Moved: nothing>"
    assert Moved(()).complete


def test_runs_of_a_batch_that_all_moved_are_made_when_asked_for() -> None:
    flat = array("Q", [0x10000, 0x50000, PAGE, 0x11000, 0x51000, PAGE, 0x20000, 0x60000, PAGE])
    moved = AllMoved(flat)
    assert moved.complete
    assert moved.refused == []
    assert moved.runs == (
        MOVED._replace(length=2 * PAGE),
        Run(0x20000, 0x60000, PAGE, Outcome.MOVED),
    )
    assert moved.runs is moved.runs


@pytest.mark.parametrize("cause", Cause)
def test_every_refusal_names_its_cause_and_where(cause: Cause) -> None:
    run = SHARED._replace(cause=cause)
    moved = Moved((MOVED, run))
    error = refusal(moved, run)
    assert isinstance(error, errors.MoveRefused)
    assert (error.cause, error.moved) == (cause, moved)
    assert (error.address, error.length, error.errno) == (0x11000, PAGE, errno.EBUSY)
    assert cause.value in str(error)


def test_busy_pages_have_one_class_above_their_three() -> None:
    for cause in (Cause.SHARED, Cause.MERGED, Cause.PINNED, Cause.NOT_EXCLUSIVE):
        error = refusal(Moved((SHARED,)), SHARED._replace(cause=cause))
        assert isinstance(error, errors.PageNotExclusive)
    error = refusal(Moved((SHARED,)), SHARED._replace(cause=Cause.NOT_EMPTY))
    assert not isinstance(error, errors.PageNotExclusive)


def test_a_run_without_a_cause_is_refused_all_the_same() -> None:
    error = refusal(Moved(()), SHARED._replace(cause=None))
    assert (type(error), error.cause) == (errors.MoveRefused, Cause.OTHER)


@pytest.mark.parametrize("done", [0, PAGE])
def test_ebusy_of_a_single_ioctl_reports_its_progress(done: int) -> None:
    operation = Operation(Code.MOVE, 0x10000, 3 * PAGE, 0x50000)
    error = error_of(result_of(operation, errno.EBUSY, done, 0))
    assert isinstance(error, errors.PageNotExclusive)
    assert error.cause is Cause.NOT_EXCLUSIVE
    assert error.moved.bytes(Outcome.MOVED) == done
    assert [run.length for run in error.moved.refused] == [3 * PAGE - done]


def test_a_long_story_is_cut_short() -> None:
    runs = [Run(DST + n * PAGE, SRC, PAGE, Outcome.FAILED, Cause.SHARED, 16) for n in range(12)]
    moved = Moved(tuple(runs))
    assert repr(moved).count("failed") == 8
    assert repr(moved).endswith("and 4 more runs>")


def test_a_refusal_mentions_that_there_are_more() -> None:
    runs = [
        Run(DST, SRC, PAGE, Outcome.FAILED, Cause.SOURCE_HOLE, 2),
        Run(DST + PAGE, SRC + PAGE, PAGE, Outcome.MOVED),
        Run(DST + 2 * PAGE, SRC + 2 * PAGE, PAGE, Outcome.FAILED, Cause.SHARED, 16),
    ]
    error = refusal(Moved(tuple(runs)), runs[0])
    assert "1 more runs of pages were refused" in str(error)
    assert error.advice in str(error)
    assert "more runs" not in str(refusal(Moved(tuple(runs[:2])), runs[0]))


def test_a_marker_at_the_destination_is_named() -> None:
    operation = Operation(Code.MOVE, DST, 2 * PAGE, SRC)
    error = marker_in_the_way(result_of(operation, errno.EEXIST, PAGE, 0))
    assert type(error) is errors.DestinationNotEmpty
    assert error.cause is Cause.NOT_EMPTY
    assert [(run.dst, run.length) for run in error.moved.runs] == [(DST + PAGE, PAGE)]
    assert "a marker" in str(error)
