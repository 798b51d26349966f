"""Moves and forks: what children share and see, and processes that are not this one."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess

import pytest

from tests.kernel.scene import outcomes, scene
from tests.support.calls import in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_event, wait_readable
from tests.support.obstacles import BOTH_MODES, PROTECTED, Sharer, call
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, Outcome, errors
from uffdaemon.lowlevel import (
    Features,
    ForkEvent,
    PageCategory,
    RemoveEvent,
    Userfaultfd,
    scan_pages,
)
from uffdaemon.moves import Cause, Fallback, calls, ladder, move
from uffdaemon.moves import driver as mover
from uffdaemon.moves.options import Chosen
from uffdaemon.ranges import HUGE_PAGE_SIZE

FORKED = PROTECTED | Features.EVENT_FORK
REMOVED = PROTECTED | Features.EVENT_REMOVE


# -- shared with a child -----------------------------------------------------------------------


@kernel_test(features=PROTECTED)
def test_what_a_living_child_shares() -> None:
    with scene() as found:
        child = Sharer(found.source)
        error = found.refused()
        assert isinstance(error, errors.PageShared)
        assert error.cause is Cause.SHARED
        assert outcomes(found.move(Fallback())) == [(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]
        found.target.write(0, b"ours")
        assert child.sees() == found.data


@kernel_test(features=PROTECTED)
def test_what_a_child_shared_that_has_ended_moves_strictly() -> None:
    with scene() as found:
        assert Sharer(found.source).sees() == found.data
        assert outcomes(found.move()) == [(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]


@kernel_test(features=PROTECTED)
def test_what_moved_before_a_refusal_stays_moved() -> None:
    with scene() as found:
        child = Sharer(found.source)
        found.source.advise(Advice.POPULATE_WRITE, 0, PAGE)
        with pytest.raises(errors.PageShared) as caught:
            found.move()
        assert outcomes(caught.value.moved) == [
            (Outcome.MOVED, None),
            (Outcome.FAILED, Cause.SHARED),
        ]
        [run] = caught.value.moved.refused
        assert (run.dst, run.length) == (found.target.start + PAGE, 3 * PAGE)
        rest = move(found.uffd, run.dst, run.src, run.length, fallback=Fallback(), verify=True)
        assert rest.bytes(Outcome.UNSHARED_AND_MOVED) == run.length
        assert found.target.read(0, 4 * PAGE) == found.data == child.sees()


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=PROTECTED)
def test_a_huge_page_that_a_child_shares() -> None:
    with scene(huge=True) as found:
        [page] = scan_pages(found.source.start, found.source.length)
        assert page.categories & PageCategory.HUGE
        child = Sharer(found.source)
        assert isinstance(found.refused(), errors.PageShared)
        assert outcomes(found.move(Fallback())) == [(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]
        assert child.sees() == found.data


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=PROTECTED)
def test_a_part_of_a_huge_page_that_a_child_shares() -> None:
    part = 16 * PAGE
    with scene(huge=True) as found:
        child = Sharer(found.source)
        where = found.target.start + part, found.source.start + part, part
        with pytest.raises(errors.PageShared):
            move(found.uffd, *where)
        moved = move(found.uffd, *where, fallback=Fallback(), verify=True)
        assert outcomes(moved) == [(Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]
        assert found.target.read(part, part) == found.data[part : 2 * part]
        # What is left of it is still shared, and moves page by page.
        assert found.source.read(0, part) == found.data[:part]
        for start in (0, 2 * part):
            length = part if start == 0 else HUGE_PAGE_SIZE - 2 * part
            where = found.target.start + start, found.source.start + start, length
            with pytest.raises(errors.PageShared):
                move(found.uffd, *where)
            move(found.uffd, *where, fallback=Fallback(), verify=True)
        assert found.target.read(0, HUGE_PAGE_SIZE) == found.data == child.sees()


@pytest.mark.parametrize("way", ["dont_fork", "vfork", "posix_spawn"])
@kernel_test(features=PROTECTED)
def test_what_children_do_not_share_just_moves(way: str) -> None:
    with scene(dont_fork=way == "dont_fork") as found:
        reading, writing = os.pipe()
        if way == "dont_fork":
            in_child(os.read, reading, 1)
        elif way == "vfork":
            subprocess.Popen(["cat"], stdin=reading)
        else:
            actions = [(os.POSIX_SPAWN_DUP2, reading, 0)]
            os.posix_spawn("/bin/cat", ["cat"], os.environ, file_actions=actions)
        # The child lives until the pipe is closed.
        assert outcomes(found.move()) == [(Outcome.MOVED, None)]
        os.close(writing)


# -- what children see -------------------------------------------------------------------------


@kernel_test(features=PROTECTED)
def test_a_child_has_no_mapping_of_what_is_not_forked() -> None:
    with scene(1, dont_fork=True) as found:
        assert os.WTERMSIG(in_child(found.source.read, 0, 1).wait()) == signal.SIGSEGV
        # Nor after the page has come to where children see it.
        found.move()
        assert in_child(found.target.read, 0, PAGE).result() == found.data
        assert os.WTERMSIG(in_child(found.source.read, 0, 1).wait()) == signal.SIGSEGV


@kernel_test(features=PROTECTED)
def test_a_child_sees_what_had_moved_and_zeros_for_what_was_missing() -> None:
    with scene(2, dont_fork=True) as found:
        move(found.uffd, found.target.start, found.source.start, PAGE, verify=True)
        child = Sharer(found.target)
        # Behind the fork: that page is the parent's alone.
        move(found.uffd, found.target.start + PAGE, found.source.start + PAGE, PAGE, verify=True)
        assert found.target.read(0, 2 * PAGE) == found.data
        assert child.sees() == found.data[:PAGE] + bytes(PAGE)


@kernel_test(features=FORKED)
def test_a_childs_userfaultfd_takes_copies_and_no_moves() -> None:
    with (
        Userfaultfd.open(FORKED) as uffd,
        Memory.map(PAGE, dont_fork=True) as source,
        Memory.map(PAGE) as target,
    ):
        source.write(0, b"seven b")
        for side in (source, target):
            uffd.register(side.start, PAGE, BOTH_MODES)
        forking = in_thread(clone, "strlen", target.start)
        theirs = Userfaultfd.adopt(next_fork(uffd).fd)
        wait_readable(theirs)
        where = target.start, source.start, PAGE
        for fallback, kind in ((None, errors.OtherProcess), (Fallback(), errors.Unprotectable)):
            with pytest.raises(kind):
                move(theirs, *where, fallback=fallback)
        moved = move(theirs, *where, fallback=Fallback(), source_uffd=uffd, verify=True)
        assert outcomes(moved) == [(Outcome.EXACTLY_COPIED, Cause.OTHER_PROCESS)]
        assert os.waitstatus_to_exitcode(os.waitpid(forking.result(), 0)[1]) == 7
        assert scan_pages(target.start, PAGE) == []


def clone(function: str, argument: int) -> int:
    """A child that calls a function of the C library and exits with its result.  os.fork() would
    keep the GIL until the event has been read."""
    library = ctypes.CDLL(None)
    address = ctypes.cast(getattr(library, function), ctypes.c_void_p).value
    assert address is not None
    stack = ctypes.create_string_buffer(1 << 16)
    top = (ctypes.addressof(stack) + len(stack)) & ~15
    return call("clone", address, top, signal.SIGCHLD, argument)


def next_fork(uffd: Userfaultfd) -> ForkEvent:
    event = next_event(uffd)
    assert isinstance(event, ForkEvent)
    return event


# -- other processes ---------------------------------------------------------------------------


@kernel_test(features=PROTECTED)
def test_another_process_gets_an_exact_copy() -> None:
    ours, theirs = socket.socketpair()
    child = in_child(wait_for_page, theirs)
    with scene(1) as found:
        uffd, message = Userfaultfd.receive(ours)
        wait_readable(uffd)
        where = int(message), found.source.start, PAGE
        for fallback, kind in ((None, errors.OtherProcess), (Fallback(), errors.Unprotectable)):
            with pytest.raises(kind):
                move(uffd, *where, fallback=fallback)
        moved = move(uffd, *where, fallback=Fallback(), source_uffd=found.uffd, verify=True)
        assert outcomes(moved) == [(Outcome.EXACTLY_COPIED, Cause.OTHER_PROCESS)]
        assert child.result() == found.data


def wait_for_page(sock: socket.socket) -> bytes:
    with Userfaultfd.open(PROTECTED) as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE, BOTH_MODES)
        uffd.send(sock, b"%d" % memory.start)
        return memory.read(0, PAGE)


# -- events in flight --------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [None, Fallback(patience=0.0)], ids=["strict", "fallback"])
@kernel_test(features=REMOVED)
def test_nothing_moves_while_an_event_is_not_read(fallback: Fallback | None) -> None:
    with (
        Userfaultfd.open(REMOVED) as uffd,
        Memory.map(PAGE, dont_fork=True) as source,
        Memory.map(2 * PAGE) as target,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ladder, "EVENT_PATIENCE", 0.01)
        source.write(0, b"m" * PAGE)
        uffd.register(target.start, target.length)
        where = target.start, source.start, PAGE
        discarding = in_thread(target.advise, Advice.DONTNEED, PAGE, PAGE)
        wait_readable(uffd)
        with pytest.raises(errors.EventInFlight) as caught:
            move(uffd, *where, fallback=fallback)
        assert (caught.value.cause, caught.value.errno) == (Cause.EVENT, errno.EAGAIN)
        assert source.read(0, 1) == b"m"
        assert uffd.read_events() == [RemoveEvent(target.start + PAGE, target.end)]
        discarding.result()
        assert outcomes(move(uffd, *where, verify=True)) == [(Outcome.MOVED, None)]


@kernel_test(features=FORKED)
async def test_a_move_waits_until_the_fork_event_has_been_read() -> None:
    with (
        Userfaultfd.open(FORKED) as uffd,
        Memory.map(PAGE, dont_fork=True) as source,
        Memory.map(PAGE) as target,
    ):
        source.write(0, b"m" * PAGE)
        uffd.register(target.start, PAGE)
        forking = in_thread(clone, "pause", 0)
        wait_readable(uffd)
        climb = calls.ladder_for(
            uffd,
            target.start,
            source.start,
            PAGE,
            Chosen(fallback=None),
        )
        reasons: list[str] = []

        def waiting(reason: str) -> None:
            if not reasons:
                os.close(next_fork(uffd).fd)
            reasons.append(reason)

        assert await mover.climb_in_trio(uffd, None, climb, waiting=waiting)
        assert set(reasons) == {"an event is in flight (EAGAIN)"}
        assert outcomes(climb.moved) == [(Outcome.MOVED, None)]
        os.kill(forking.result(), signal.SIGKILL)
