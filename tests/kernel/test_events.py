"""Messages as the kernel really sends them."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.kernel.conformance import MINOR, WP, discard
from tests.support.calls import Barrier, in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import count_pending, next_event, next_fault, wait_readable
from tests.support.page_contents import PAGE
from uffdaemon import Advice, FaultKind, Memory, MemoryType
from uffdaemon.lowlevel import (
    Features,
    ForkEvent,
    RegisterMode,
    RemapEvent,
    RemoveEvent,
    UnmapEvent,
    Userfaultfd,
)
from uffdaemon.uapi.events import PageFault

# -- page faults -------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("write", [False, True])
@kernel_test(features=Features.THREAD_ID | Features.EXACT_ADDRESS)
def test_a_fault_says_where_how_and_who(write: bool) -> None:
    features = Features.THREAD_ID | Features.EXACT_ADDRESS
    with Userfaultfd.open(features) as uffd, Memory.map(4 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        known = Barrier()
        thread = 0

        def touch() -> None:
            nonlocal thread
            thread = threading.get_native_id()
            known.cross()
            if write:
                memory.write(PAGE + 123, b"x")
            else:
                memory.read(PAGE + 123, 1)

        call = in_thread(touch)
        known.wait()
        fault = next_fault(uffd)
        assert fault == PageFault(memory.start + PAGE + 123, FaultKind.MISSING, write, thread)
        uffd.zeropage(memory.start + PAGE, PAGE)
        call.result()


@kernel_test()
def test_without_those_features_the_address_is_the_pages_and_the_thread_is_unknown() -> None:
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, memory.length)
        reader = in_thread(memory.read, 123, 1)
        assert next_fault(uffd) == PageFault(memory.start, FaultKind.MISSING, write=False, thread=0)
        uffd.zeropage(memory.start, PAGE)
        reader.result()


@kernel_test(features=MINOR | WP)
def test_the_three_kinds_are_told_apart() -> None:
    with (
        Userfaultfd.open(MINOR | WP) as uffd,
        Memory.map(3 * PAGE, MemoryType.SHMEM) as memory,
        memory.alias() as alias,
    ):
        mode = RegisterMode.MISSING | RegisterMode.MINOR | RegisterMode.WP
        uffd.register(memory.start, memory.length, mode)
        alias.write(PAGE, b"in the page cache")
        uffd.copy(memory.start + 2 * PAGE, bytes(PAGE), write_protect=True)
        kinds = []
        for at in range(0, memory.length, PAGE):
            writer = in_thread(memory.touch, at, PAGE, write=True)
            kinds.append(next_fault(uffd).kind)
            if kinds[-1] is FaultKind.MISSING:
                uffd.zeropage(memory.start + at, PAGE)
            elif kinds[-1] is FaultKind.MINOR:
                uffd.continue_(memory.start + at, PAGE)
            else:
                uffd.write_protect(memory.start + at, PAGE, protect=False)
            writer.result()
        assert kinds == [FaultKind.MISSING, FaultKind.MINOR, FaultKind.WP]


@kernel_test()
def test_more_faults_than_one_read_takes_come_in_one_call() -> None:
    threads = 300
    with Userfaultfd.open() as uffd, Memory.map(threads * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        threading.stack_size(256 << 10)
        readers = [in_thread(memory.read, at, 1) for at in range(0, memory.length, PAGE)]
        while count_pending(uffd) < threads:
            os.sched_yield()
        found = Counter(
            event.address for event in uffd.read_events() if isinstance(event, PageFault)
        )
        assert found == dict.fromkeys(range(memory.start, memory.end, PAGE), 1)
        assert uffd.read_events() == []
        uffd.zeropage(memory.start, memory.length)
        for reader in readers:
            reader.result()


@kernel_test()
def test_rereading_is_bounded_and_finds_what_comes_meanwhile() -> None:
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        assert uffd.read_events() == []
        assert uffd.read_events(rereads=1000) == []
        uffd.register(memory.start, PAGE)
        reading = in_thread(uffd.read_events, 2**31 - 1)
        reader = in_thread(memory.read, 0, 1)
        [fault] = reading.result()
        assert isinstance(fault, PageFault)
        uffd.zeropage(memory.start, PAGE)
        reader.result()


# -- what the process does to its memory -------------------------------------------------------


@pytest.mark.parametrize("kind", [MemoryType.ANONYMOUS, MemoryType.SHMEM])
@kernel_test(features=Features.EVENT_REMOVE)
def test_a_discarded_range_is_told_before_it_is_empty(kind: MemoryType) -> None:
    with Userfaultfd.open(Features.EVENT_REMOVE) as uffd, Memory.map(4 * PAGE, kind) as memory:
        memory.touch(write=True)
        uffd.register(memory.start, memory.length)
        discarding = in_thread(discard, memory, PAGE, 2 * PAGE)
        assert next_event(uffd) == RemoveEvent(memory.start + PAGE, memory.start + 3 * PAGE)
        discarding.result()
        reader = in_thread(memory.read, PAGE, 1)
        assert next_fault(uffd).address == memory.start + PAGE
        uffd.zeropage(memory.start + PAGE, PAGE)
        reader.result()


@kernel_test(features=Features.EVENT_REMAP)
def test_a_remapped_range_is_told_with_both_addresses_and_goes_on_being_watched() -> None:
    with Userfaultfd.open(Features.EVENT_REMAP) as uffd, Memory.map(2 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        source = memory.start
        remapping = in_thread(memory.remap)
        event = next_event(uffd)
        remapping.result()
        assert memory.start != source
        assert event == RemapEvent(source, memory.start, 2 * PAGE)
        reader = in_thread(memory.read, PAGE, 1)
        assert next_fault(uffd).address == memory.start + PAGE
        uffd.copy(memory.start + PAGE, b"x" * PAGE)
        assert reader.result() == b"x"


@kernel_test(features=Features.EVENT_UNMAP)
def test_an_unmapped_range_is_told_and_the_rest_goes_on() -> None:
    with Userfaultfd.open(Features.EVENT_UNMAP) as uffd, Memory.map(4 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        unmapping = in_thread(memory.unmap, PAGE, PAGE)
        assert next_event(uffd) == UnmapEvent(memory.start + PAGE, memory.start + 2 * PAGE)
        unmapping.result()
        reader = in_thread(memory.read, 3 * PAGE, 1)
        next_fault(uffd)
        uffd.copy(memory.start + 2 * PAGE, b"y" * 2 * PAGE)
        assert reader.result() == b"y"
        uffd.unregister(memory.start, PAGE)
        uffd.unregister(memory.start + 2 * PAGE, 2 * PAGE)


@kernel_test(features=Features.EVENT_FORK)
def test_a_fork_brings_a_userfaultfd_of_its_own() -> None:
    with Userfaultfd.open(Features.EVENT_FORK) as uffd, Memory.map(2 * PAGE) as memory:

        def handle() -> tuple[int, str]:
            """In another process: os.fork() keeps the GIL until its event has been read."""
            event = next_event(uffd)
            assert isinstance(event, ForkEvent)
            child = Userfaultfd.adopt(event.fd)
            assert child.features == Features.EVENT_FORK
            fault = next_fault(child)
            child.copy(fault.address, b"child" + bytes(PAGE - 5))
            return fault.address, str(Path(f"/proc/self/fd/{event.fd}").readlink())

        handler = in_child(handle)
        uffd.register(memory.start, memory.length)
        reader = in_child(memory.read, PAGE, 5)
        assert reader.result() == b"child"
        address, target = handler.result()
        assert address == memory.start + PAGE
        assert target == "anon_inode:[userfaultfd]"
        # What the child got is the child's alone.
        ours = in_thread(memory.read, PAGE, 5)
        next_fault(uffd)
        uffd.copy(memory.start + PAGE, b"ours!" + bytes(PAGE - 5))
        assert ours.result() == b"ours!"


@kernel_test()
def test_without_fork_events_a_child_reads_zeros() -> None:
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE)
        assert in_child(memory.read, 0, PAGE).result() == bytes(PAGE)
        assert uffd.read_events() == []


@kernel_test(features=Features.EVENT_REMOVE)
def test_faults_are_read_before_events_that_happened_first() -> None:
    """Why everything is drained, and events are applied, before a fault is answered."""
    with Userfaultfd.open(Features.EVENT_REMOVE) as uffd, Memory.map(2 * PAGE) as memory:
        memory.touch(0, PAGE, write=True)
        uffd.register(memory.start, memory.length)
        discarding = in_thread(memory.advise, Advice.DONTNEED, 0, PAGE)
        wait_readable(uffd)
        reader = in_thread(memory.read, PAGE, 1)
        while count_pending(uffd) == 0:
            os.sched_yield()
        first, second = uffd.read_events()
        assert isinstance(first, PageFault)
        assert second == RemoveEvent(memory.start, memory.start + PAGE)
        discarding.result()
        uffd.zeropage(memory.start + PAGE, PAGE)
        reader.result()


@kernel_test()
def test_reading_without_a_handshake_is_an_error() -> None:
    uffd = Userfaultfd.open()
    from uffdaemon import native

    bare = native.open_syscall(user_mode_only=True)
    os.dup2(bare, uffd.fileno(), inheritable=False)
    with pytest.raises(OSError, match="EINVAL"):
        uffd.read_events()


# -- SIGBUS instead of messages ----------------------------------------------------------------


@kernel_test(features=Features.SIGBUS)
def test_with_sigbus_a_touch_kills_who_has_no_handler() -> None:
    def touch() -> None:
        faulthandler.disable()
        uffd = Userfaultfd.open(Features.SIGBUS)
        memory = Memory.map(PAGE)
        uffd.register(memory.start, memory.length)
        memory.touch()

    status = in_child(touch).wait()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGBUS
