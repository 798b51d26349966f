"""Each reason for which a page does not simply move: forced, named, and cured."""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.scene import Scene, outcomes, scene
from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.obstacles import (
    BOTH_MODES,
    PROTECTED,
    DirectRead,
    Pins,
    Sharer,
    call,
    guard,
    lock,
    merge,
    protect,
    swap_out,
)
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, MemoryType, Outcome, errors, native
from uffdaemon.lowlevel import PageCategory, Userfaultfd, scan_pages
from uffdaemon.moves import Cause, Fallback, calls, move
from uffdaemon.moves import driver as mover
from uffdaemon.moves.options import Chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.errors import MoveRefused

OTHERS: Final = [kind for kind in MemoryType if kind is not MemoryType.ANONYMOUS]

A_PAUSE = 0.0005
"""Seconds: the shortest wait for a pin to end.  What is held for a moment is waited for less."""


# -- EBUSY: merged, swapped out -----------------------------------------------------------------


@pytest.mark.usefixtures("ksm")
@kernel_test(features=PROTECTED)
def test_what_ksm_merged() -> None:
    with scene(1, dont_fork=True) as found:
        merge(found.source.start)
        error = found.refused()
        assert isinstance(error, errors.PageMerged)
        assert error.cause is Cause.MERGED
        assert outcomes(found.move(Fallback())) == [(Outcome.UNSHARED_AND_MOVED, Cause.MERGED)]


@pytest.mark.usefixtures("swap")
@kernel_test(features=PROTECTED)
def test_a_swap_entry_that_is_shared() -> None:
    with scene(1) as found:
        swap_out(found.source.start)
        child = Sharer(found.source)
        where = found.target.start, found.source.start, PAGE
        with pytest.raises(errors.PageShared):
            move(found.uffd, *where)
        [page] = scan_pages(found.source.start, PAGE)
        assert page.categories & PageCategory.SWAPPED  # to refuse it, it is not read in
        assert outcomes(found.move(Fallback())) == [(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]
        assert child.sees() == found.data


@pytest.mark.usefixtures("swap")
@kernel_test(features=PROTECTED)
def test_a_swap_entry_of_our_own_moves() -> None:
    with scene(1) as found:
        swap_out(found.source.start)
        assert outcomes(found.move()) == [(Outcome.MOVED, None)]


# -- EBUSY: pinned -----------------------------------------------------------------------------


@kernel_test(features=PROTECTED)
def test_what_is_pinned_is_refused_by_name() -> None:
    with scene(1, dont_fork=True) as found:
        pin = Pins(found.source.start)
        for fallback in (None, Fallback(patience=0.0), Fallback(patience=0.01)):
            error = found.refused(fallback)
            assert isinstance(error, errors.PagePinned)
            assert error.cause is Cause.PINNED
        pin.end()
        assert outcomes(found.move()) == [(Outcome.MOVED, None)]


@kernel_test(features=PROTECTED)
def test_a_pin_that_ends_while_it_is_waited_for() -> None:
    with scene(1, dont_fork=True) as found, pytest.MonkeyPatch.context() as patch:
        pin = Pins(found.source.start)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            if seconds < A_PAUSE:
                return
            if not pauses:
                in_thread(pin.end).result()
            pauses.append(seconds)

        patch.setattr(time, "sleep", pause)
        moved = found.move(Fallback(patience=60.0))
        assert outcomes(moved) == [(Outcome.WAITED_AND_MOVED, Cause.PINNED)]
        assert len(pauses) == 1


@kernel_test(features=PROTECTED)
async def test_a_pin_that_ends_while_trio_goes_on() -> None:
    with scene(1, dont_fork=True) as found:
        pin = Pins(found.source.start)
        climb = calls.ladder_for(
            found.uffd,
            found.target.start,
            found.source.start,
            PAGE,
            Chosen(fallback=Fallback(patience=60.0)),
        )
        reasons: list[str] = []

        def waiting(reason: str) -> None:
            if not reasons:
                pin.end()
            reasons.append(reason)

        assert await mover.climb_in_trio(found.uffd, None, climb, waiting=waiting)
        assert reasons == ["the source page is pinned for I/O"]
        assert outcomes(climb.moved) == [(Outcome.WAITED_AND_MOVED, Cause.PINNED)]
        assert found.target.read(0, PAGE) == found.data


@kernel_test(features=PROTECTED)
def test_what_is_pinned_is_copied_only_if_that_was_asked_for() -> None:
    with scene(1, dont_fork=True) as found:
        pin = Pins(found.source.start)
        moved = found.move(Fallback(copy_pinned=True, patience=0.0))
        assert outcomes(moved) == [(Outcome.COPIED_PINNED, Cause.PINNED)]
        pin.end()


@kernel_test(features=PROTECTED)
def test_a_read_in_flight_arrives_at_where_the_page_is_moved() -> None:
    with scene(1, dont_fork=True) as found, pytest.MonkeyPatch.context() as patch:
        arriving = content(1, seed=1)
        read = DirectRead(found.source, found.source.start, arriving)
        try:
            assert isinstance(found.refused(), errors.PagePinned)
            where = found.target.start, found.source.start, PAGE

            def pause(seconds: float) -> None:
                if seconds >= A_PAUSE:
                    read.end()

            patch.setattr(time, "sleep", pause)
            moved = move(found.uffd, *where, fallback=Fallback(patience=60.0), verify=True)
            assert outcomes(moved) == [(Outcome.WAITED_AND_MOVED, Cause.PINNED)]
            assert found.target.read(0, PAGE) == arriving
        finally:
            read.end()


@kernel_test(features=PROTECTED)
def test_a_read_in_flight_is_lost_to_a_copy() -> None:
    with scene(1, dont_fork=True) as found:
        read = DirectRead(found.source, found.source.start, content(1, seed=1))
        try:
            moved = found.move(Fallback(copy_pinned=True, patience=0.0))
            assert outcomes(moved) == [(Outcome.COPIED_PINNED, Cause.PINNED)]
        finally:
            read.end()
        assert found.target.read(0, PAGE) == found.data
        assert scan_pages(found.source.start, PAGE) == []


# -- EINVAL: memory that does not move -----------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("side", ["source", "target", "both"])
@kernel_test(features=PROTECTED)
def test_memory_of_another_kind_is_copied_exactly(kind: MemoryType, side: str) -> None:
    plain = MemoryType.ANONYMOUS
    source, target = (kind, plain) if side == "source" else (plain, kind)
    with scene(4, kind if side == "both" else source, target) as found:
        error = found.refused()
        assert isinstance(error, errors.WrongMemory)
        assert error.cause is Cause.WRONG_MEMORY
        moved = found.move(Fallback())
        assert outcomes(moved) == [(Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY)]


@pytest.mark.parametrize("what", ["source locked", "target locked", "source read-only"])
@kernel_test(features=PROTECTED)
def test_mappings_that_differ(what: str) -> None:
    with scene(dont_fork=True) as found:
        side = found.target if what == "target locked" else found.source
        if what == "source read-only":
            protect(side.start, side.length, 1)
        else:
            lock(side.start, side.length)
        assert isinstance(found.refused(), errors.WrongMemory)
        assert outcomes(found.move(Fallback())) == [(Outcome.EXACTLY_COPIED, Cause.WRONG_MEMORY)]


@pytest.mark.parametrize("side", ["source", "target"])
@kernel_test(features=PROTECTED)
def test_without_write_protection_a_copy_has_to_be_asked_for(side: str) -> None:
    with scene(4, MemoryType.SHMEM) as found:
        unprotected = found.source if side == "source" else found.target
        found.uffd.unregister(unprotected.start, unprotected.length)
        if side == "target":
            found.uffd.register(unprotected.start, unprotected.length)
        error = found.refused(Fallback())
        assert isinstance(error, errors.Unprotectable)
        assert error.cause is Cause.UNPROTECTABLE
        moved = found.move(Fallback(lose_writes=True))
        assert outcomes(moved) == [(Outcome.COPIED, Cause.WRONG_MEMORY)]


# -- the other refusals ------------------------------------------------------------------------


@kernel_test(features=PROTECTED)
def test_a_kernel_without_move() -> None:
    with scene() as found:
        without_move()
        error = found.refused()
        assert isinstance(error, errors.MoveMissing)
        assert (error.cause, error.errno) == (Cause.NO_MOVE, errno.ENOTTY)
        assert outcomes(found.move(Fallback())) == [(Outcome.EXACTLY_COPIED, Cause.NO_MOVE)]


def without_move() -> None:
    """Let this thread's UFFDIO_MOVE be ENOTTY from now on, as before Linux 6.8, by seccomp(2)."""
    load, equal, leave = 0x20, 0x15, 0x06  # linux/bpf_common.h
    steps = [
        (load, 0, 0, 24),  # the lower half of the second argument
        (equal, 0, 1, 0xC028AA05),  # UFFDIO_MOVE
        (leave, 0, 0, 0x50000 | errno.ENOTTY),  # SECCOMP_RET_ERRNO
        (leave, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("prctl", 22, 2, program)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def poison(found: Scene) -> None:
    found.source.advise(Advice.DONTNEED, PAGE, PAGE)
    found.uffd.poison(found.source.start + PAGE, PAGE)


REFUSED: Final[dict[str, tuple[Callable[[Scene], object], type[MoveRefused], Cause]]] = {
    "hole": (
        lambda found: found.source.advise(Advice.DONTNEED, PAGE, PAGE),
        errors.SourceHole,
        Cause.SOURCE_HOLE,
    ),
    "guard": (
        lambda found: guard(found.source.start + PAGE),
        errors.SourceMarker,
        Cause.SOURCE_MARKER,
    ),
    "poison": (poison, errors.SourceMarker, Cause.SOURCE_MARKER),
    "page at the destination": (
        lambda found: found.uffd.zeropage(found.target.start + PAGE, PAGE),
        errors.DestinationNotEmpty,
        Cause.NOT_EMPTY,
    ),
    "poison at the destination": (
        lambda found: found.uffd.poison(found.target.start + PAGE, PAGE),
        errors.DestinationNotEmpty,
        Cause.NOT_EMPTY,
    ),
    "moved before": (
        lambda found: move(found.uffd, found.target.start + PAGE, found.source.start + PAGE, PAGE),
        errors.AlreadyMoved,
        Cause.ALREADY_MOVED,
    ),
}
"""What is done to the second page, and what comes of it, with a fallback or without."""


@pytest.mark.parametrize("fallback", [None, Fallback()], ids=["strict", "fallback"])
@pytest.mark.parametrize("what", REFUSED)
@kernel_test(features=PROTECTED)
def test_one_page_is_refused_and_the_others_move(what: str, fallback: Fallback | None) -> None:
    bring_about, kind, cause = REFUSED[what]
    with scene() as found:
        bring_about(found)
        with pytest.raises(kind) as caught:
            found.move(fallback)
        assert type(caught.value) is kind
        assert caught.value.cause is cause
        assert outcomes(caught.value.moved) == [
            (Outcome.MOVED, None),
            (Outcome.FAILED, cause),
            (Outcome.MOVED, None),
        ]
        assert [run.length for run in caught.value.moved.refused] == [PAGE]
        assert found.target.read(2 * PAGE, 2 * PAGE) == found.data[2 * PAGE :]


@pytest.mark.parametrize("where", ["nowhere", "elsewhere", "not mapped"])
@kernel_test(features=PROTECTED)
def test_a_destination_that_is_not_registered_with_this_userfaultfd(where: str) -> None:
    with scene(1) as found, Userfaultfd.open(PROTECTED) as other:
        found.uffd.unregister(found.target.start, PAGE)
        if where == "elsewhere":
            other.register(found.target.start, PAGE, BOTH_MODES)
        elif where == "not mapped":
            found.target.unmap(0, PAGE)
        for fallback in (None, Fallback()):
            with pytest.raises(errors.NotRegistered) as caught:
                found.move(fallback)
            assert caught.value.cause is Cause.NOT_REGISTERED
            assert found.source.read(0, PAGE) == found.data


@kernel_test(features=PROTECTED)
def test_foreign_memory_is_taken_only_knowingly() -> None:
    with scene(1) as found:
        _, start = native.map_memory(-1, PAGE, 0, PAGE)
        native.write_memory(start, memoryview(found.data))
        for fallback in (None, Fallback()):
            with pytest.raises(errors.ForeignMemory, match="foreign=True"):
                move(found.uffd, found.target.start, start, PAGE, fallback=fallback)
        assert native.read_memory(start, PAGE) == found.data
        move(found.uffd, found.target.start, start, PAGE, foreign=True, verify=True)
        assert found.target.read(0, PAGE) == found.data
