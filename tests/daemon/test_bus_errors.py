"""SIGBUS around resolver="in-thread": forked children, signals that were sent, blocked signals."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import BytesSource, CopyFrom, GuardedRegion, Memory, errors, open_daemon
from uffdaemon.lowlevel import Features

DATA = content(8)
SOURCE = BytesSource(DATA)


async def _read_own() -> bytes:
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(SOURCE), resolver="in-thread")
            with region.buffer() as view:
                return bytes(view)


def _status_of_child(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@kernel_test(features=Features.SIGBUS)
def test_a_forked_child_guards_memory_of_its_own_like_its_parent() -> None:
    assert trio.run(_read_own) == DATA
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            same = trio.run(_read_own) == DATA
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if trio.run(_read_own) == DATA else 3)
            os._exit(_status_of_child(grandchild) if same else 4)
        assert _status_of_child(pid) == 0
    assert trio.run(_read_own) == DATA


@kernel_test(features=Features.SIGBUS)
async def test_a_child_of_one_that_guards_memory_guards_its_own() -> None:
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(SOURCE), resolver="in-thread")
            with region.buffer() as view:
                assert bytes(view[:PAGE]) == DATA[:PAGE]
                pid = await trio.to_thread.run_sync(_fork_and_read)
                assert await trio.to_thread.run_sync(_status_of_child, pid) == 0
                assert bytes(view) == DATA


def _fork_and_read() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if trio.run(_read_own) == DATA else 3)
    return pid


@kernel_test(features=Features.SIGBUS)
async def test_a_signal_that_was_ignored_still_is() -> None:
    faulthandler.disable()
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(SOURCE), resolver="in-thread")
            with region.buffer() as view:
                for page in range(8):
                    os.kill(os.getpid(), signal.SIGBUS)
                    at = page * PAGE
                    assert bytes(view[at : at + PAGE]) == DATA[at : at + PAGE]


@kernel_test(features=Features.SIGBUS)
def test_a_signal_that_ended_the_process_still_does() -> None:
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        trio.run(_read_own)
        os.kill(os.getpid(), signal.SIGBUS)
        os._exit(0)
    assert _status_of_child(pid) == -signal.SIGBUS


@kernel_test(features=Features.SIGBUS)
async def test_a_thread_that_has_it_blocked_is_refused() -> None:
    with Memory.map(PAGE) as memory, Memory.map(PAGE) as other:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(SOURCE), resolver="in-thread")
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            with pytest.raises(errors.PlacementRefused, match="has SIGBUS blocked"):
                daemon.guard(other, CopyFrom(SOURCE), resolver="in-thread")
            _refused(region)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])
            with region.buffer() as view:
                assert bytes(view) == DATA[:PAGE]


@kernel_test(features=Features.SIGBUS)
async def test_other_threads_that_have_it_blocked_are_named() -> None:
    blocked, over = threading.Event(), threading.Event()

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        blocked.set()
        over.wait()

    thread = threading.Thread(target=block)
    thread.start()
    blocked.wait()
    with Memory.map(PAGE) as memory, capture_logs() as logs:
        async with open_daemon() as daemon:
            daemon.guard(memory, CopyFrom(SOURCE), resolver="in-thread").buffer().release()
    over.set()
    [named] = [line["threads"] for line in logs if "SIGBUS" in line["event"]]
    assert thread.native_id in named  # beside that of faulthandler


def _refused(region: GuardedRegion) -> None:
    with pytest.raises(errors.PlacementRefused, match="has SIGBUS blocked"):
        region.buffer()
