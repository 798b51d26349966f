"""What each operation does, how far it came, and what it says when it cannot."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kernel.conformance import WP, map_area
from tests.kernel.page_flags import write_protected
from tests.support.calls import Call, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import count_waiting, next_event, next_fault
from tests.support.page_contents import PAGE
from uffdaemon import FaultKind, Memory, MemoryType
from uffdaemon.errors import InvalidRange, OperationError
from uffdaemon.lowlevel import Code, Features, Operation, RegisterMode, Status, Userfaultfd
from uffdaemon.uapi.events import PageFault
from uffdaemon.uapi.outcomes import DONTWAKE

MISSING_AND_WP = RegisterMode.MISSING | RegisterMode.WP


# -- COPY --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(MemoryType))
@kernel_test()
def test_copy_steps_over_what_is_present_and_counts_it(kind: MemoryType) -> None:
    with Userfaultfd.open() as uffd, map_area(kind, 6) as memory:
        page = memory.page_size
        uffd.register(memory.start, memory.length)
        for present in (1, 4):
            uffd.copy(memory.start + present * page, b"o" * page)
        data = b"".join(bytes([number]) * page for number in range(1, 7))
        result = uffd.copy(memory.start, data, page_size=page)
        assert result.status is Status.DONE
        assert (result.done, result.present) == (4 * page, 2 * page)
        assert result.progress == result.length == memory.length
        found = bytes(memory.read(number * page, 1)[0] for number in range(6))
        assert found == b"\1o\3\4o\6"


@kernel_test()
def test_copy_stops_at_what_is_present_when_told_to() -> None:
    with Userfaultfd.open() as uffd, Memory.map(4 * PAGE) as memory, Memory.map(4 * PAGE) as source:
        source.write(0, b"s" * source.length)
        uffd.register(memory.start, memory.length)
        uffd.zeropage(memory.start + 2 * PAGE, PAGE)
        operation = Operation(Code.COPY, memory.start, memory.length, source.start)
        [result] = uffd.execute([operation])
        assert (result.status, result.error) == (Status.FAILED, errno.EEXIST)
        assert (result.done, result.present) == (2 * PAGE, 0)
        assert result.rest == Operation(
            Code.COPY, memory.start + 2 * PAGE, 2 * PAGE, source.start + 2 * PAGE
        )


@kernel_test()
def test_copy_takes_any_buffer_at_any_address() -> None:
    with Userfaultfd.open() as uffd, Memory.map(2 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        view = memoryview(bytearray(b"?" + b"x" * PAGE))[1:]
        assert uffd.copy(memory.start, view).complete
        view.release()
        assert uffd.copy(memory.start + PAGE, b"y" * 5000, PAGE).complete
        assert memory.read(0, 2 * PAGE) == b"x" * PAGE + b"y" * PAGE
        with pytest.raises(InvalidRange, match=f"{2 * PAGE} bytes of a source of {PAGE} bytes"):
            uffd.copy(memory.start, bytes(PAGE), 2 * PAGE)
        with pytest.raises(ValueError, match="needs a length"):
            uffd.copy(memory.start, memory.start)


@kernel_test()
def test_a_source_that_ends_early_keeps_what_was_copied() -> None:
    with Userfaultfd.open() as uffd, Memory.map(4 * PAGE) as memory, Memory.map(4 * PAGE) as source:
        source.write(0, b"s" * 2 * PAGE)
        source.unmap(2 * PAGE, 2 * PAGE)
        uffd.register(memory.start, memory.length)
        with pytest.raises(OperationError, match="the source cannot be read") as caught:
            uffd.copy(memory.start, source.start, 4 * PAGE)
        error = caught.value
        assert (error.errno, error.operation) == (errno.EFAULT, "COPY")
        assert (error.address, error.length) == (memory.start + 2 * PAGE, 2 * PAGE)
        assert (error.result.done, error.result.present) == (2 * PAGE, 0)
        assert memory.read(0, 2 * PAGE) == b"s" * 2 * PAGE


@kernel_test()
def test_copy_outside_of_what_is_registered_is_enoent() -> None:
    with Userfaultfd.open() as uffd, Memory.map(4 * PAGE) as memory:
        uffd.register(memory.start, 2 * PAGE)
        with pytest.raises(OperationError, match="not inside one registered mapping") as caught:
            uffd.copy(memory.start + 2 * PAGE, bytes(PAGE))
        assert caught.value.errno == errno.ENOENT
        assert caught.value.address == memory.start + 2 * PAGE


@pytest.mark.parametrize("operation", ["copy", "zeropage", "poison", "continue_", "wake"])
@kernel_test(features=Features.POISON)
def test_unaligned_and_empty_ranges_are_einval_and_end(operation: str) -> None:
    with Userfaultfd.open(Features.POISON) as uffd, Memory.map(4 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        for start, length in ((memory.start + 1, PAGE), (memory.start, 100), (memory.start, 0)):
            source = (memory.start,) if operation == "copy" else ()
            with pytest.raises(OperationError, match="EINVAL") as caught:
                getattr(uffd, operation)(start, *source, length)
            assert caught.value.errno == errno.EINVAL
            assert caught.value.result.progress == 0


# -- waking ------------------------------------------------------------------------------------


@contextmanager
def _reader_stuck() -> Iterator[tuple[Userfaultfd, Memory, Call[bytes], PageFault]]:
    """A thread that reads the first byte of a page, and whose message has been read."""
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, memory.length)
        reader = in_thread(memory.read, 0, 1)
        yield uffd, memory, reader, next_fault(uffd)


@kernel_test()
def test_dontwake_leaves_the_thread_asleep_until_it_is_woken() -> None:
    with _reader_stuck() as (uffd, memory, reader, _):
        assert uffd.copy(memory.start, b"x" * PAGE, wake=False).complete
        # Not woken by the copy: the kernel still counts it among those who wait.
        assert count_waiting(uffd) == 1
        assert uffd.wake(memory.start, PAGE).done == PAGE
        assert reader.result() == b"x"
        assert count_waiting(uffd) == 0


@kernel_test()
def test_finding_a_page_present_wakes_who_waits_for_it() -> None:
    with _reader_stuck() as (uffd, memory, reader, _):
        uffd.copy(memory.start, b"x" * PAGE, wake=False)
        result = uffd.copy(memory.start, b"y" * PAGE)
        assert (result.done, result.present) == (0, PAGE)
        assert reader.result() == b"x"


@kernel_test()
def test_a_message_that_was_read_and_not_answered_comes_again_after_wake() -> None:
    with _reader_stuck() as (uffd, memory, reader, first):
        uffd.wake(memory.start, PAGE)
        assert next_fault(uffd) == first
        uffd.zeropage(memory.start, PAGE)
        assert reader.result() == b"\0"


# -- ZEROPAGE, POISON, CONTINUE, WRITEPROTECT --------------------------------------------------


@kernel_test(features=WP | Features.WP_UNPOPULATED)
def test_zeropage_replaces_a_write_protect_marker_and_keeps_the_protection() -> None:
    with Userfaultfd.open(WP | Features.WP_UNPOPULATED) as uffd, Memory.map(3 * PAGE) as memory:
        uffd.register(memory.start, memory.length, MISSING_AND_WP)
        uffd.write_protect(memory.start + PAGE, PAGE)
        result = uffd.zeropage(memory.start, memory.length)
        assert (result.done, result.present) == (3 * PAGE, 0)
        assert memory.read(0, memory.length) == bytes(memory.length)
        assert [write_protected(memory.start + at) for at in (0, PAGE, 2 * PAGE)] == [
            False,
            True,
            False,
        ]


@kernel_test(features=Features.MINOR_SHMEM)
def test_continue_without_a_page_in_the_page_cache_is_efault() -> None:
    with (
        Userfaultfd.open(Features.MINOR_SHMEM) as uffd,
        Memory.map(4 * PAGE, MemoryType.SHMEM) as memory,
        memory.alias() as alias,
    ):
        uffd.register(memory.start, memory.length, RegisterMode.MINOR)
        alias.write(0, b"x" * 2 * PAGE)
        with pytest.raises(OperationError, match="not in the page cache") as caught:
            uffd.continue_(memory.start, memory.length)
        assert caught.value.errno == errno.EFAULT
        assert caught.value.result.done == 2 * PAGE
        assert memory.read(0, 2 * PAGE) == b"x" * 2 * PAGE


@kernel_test()
def test_continue_is_nothing_for_anonymous_memory() -> None:
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE)
        with pytest.raises(OperationError, match="only shmem and hugetlb") as caught:
            uffd.continue_(memory.start, PAGE)
        assert caught.value.errno == errno.EINVAL


@kernel_test(features=WP)
def test_write_protect_stops_writers_until_it_is_lifted() -> None:
    with Userfaultfd.open(WP) as uffd, Memory.map(2 * PAGE) as memory:
        memory.write(0, b"a" * 2 * PAGE)
        uffd.register(memory.start, memory.length, RegisterMode.WP)
        assert uffd.write_protect(memory.start, memory.length).done == memory.length
        assert memory.read(0, 1) == b"a"
        writer = in_thread(memory.write, PAGE, b"b")
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert (event.kind, event.write) == (FaultKind.WP, True)
        assert event.address == memory.start + PAGE
        assert memory.read(PAGE, 1) == b"a"
        uffd.write_protect(memory.start + PAGE, PAGE, protect=False, wake=False)
        assert count_waiting(uffd) == 1
        uffd.write_protect(memory.start + PAGE, PAGE, protect=False)
        writer.result()
        assert memory.read(PAGE, 1) == b"b"


@kernel_test(features=WP)
def test_write_protect_beyond_what_is_registered_is_enoent() -> None:
    with Userfaultfd.open(WP) as uffd, Memory.map(2 * PAGE) as memory:
        memory.touch(write=True)
        uffd.register(memory.start, PAGE, RegisterMode.WP)
        with pytest.raises(OperationError, match="earlier parts may have changed") as caught:
            uffd.write_protect(memory.start, 2 * PAGE)
        assert caught.value.errno == errno.ENOENT
        assert caught.value.result.done == 0


@kernel_test(features=WP)
def test_a_page_copied_with_protection_faults_again_on_the_first_write() -> None:
    with Userfaultfd.open(WP) as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE, MISSING_AND_WP)
        writer = in_thread(memory.write, 0, b"new")
        assert next_fault(uffd).kind is FaultKind.MISSING
        uffd.copy(memory.start, b"old" + bytes(PAGE - 3), write_protect=True)
        second = next_fault(uffd)
        assert (second.kind, second.write) == (FaultKind.WP, True)
        assert memory.read(0, 3) == b"old"
        uffd.write_protect(memory.start, PAGE, protect=False)
        writer.result()
        assert memory.read(0, 3) == b"new"


# -- batches -----------------------------------------------------------------------------------


@pytest.mark.smoke
@kernel_test()
def test_one_that_fails_does_not_keep_the_rest_of_the_batch_from_being_done() -> None:
    with Userfaultfd.open() as uffd, Memory.map(8 * PAGE) as memory, Memory.map(PAGE) as source:
        source.write(0, b"s" * PAGE)
        uffd.register(memory.start, 6 * PAGE)
        uffd.copy(memory.start + PAGE, b"o" * PAGE)
        operations = [
            Operation(Code.COPY, memory.start, PAGE, source.start, page_size=PAGE),
            Operation(Code.COPY, memory.start + PAGE, PAGE, source.start, page_size=PAGE),
            Operation(Code.COPY, memory.start + 6 * PAGE, PAGE, source.start, page_size=PAGE),
            Operation(Code.COPY, memory.start + 2 * PAGE, PAGE, 1 << 46, page_size=PAGE),
            Operation(Code.ZEROPAGE, memory.start + 3 * PAGE, 2 * PAGE, 0, DONTWAKE, PAGE),
            Operation(Code.WAKE, memory.start, PAGE),
        ]
        results = uffd.execute(operations)
        assert [result.operation for result in results] == operations
        assert [(result.error, result.done, result.present) for result in results] == [
            (0, PAGE, 0),
            (0, 0, PAGE),
            (errno.ENOENT, 0, 0),
            (errno.EFAULT, 0, 0),
            (0, 2 * PAGE, 0),
            (0, PAGE, 0),
        ]
        assert uffd.execute([]) == []


@kernel_test()
def test_a_long_batch_is_one_too() -> None:
    pages = 1000
    with Userfaultfd.open() as uffd, Memory.map(pages * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        results = uffd.execute(
            [
                Operation(Code.ZEROPAGE, memory.start + page * PAGE, PAGE)
                for page in reversed(range(pages))
            ]
        )
        assert {(result.status, result.done) for result in results} == {(Status.DONE, PAGE)}
        memory.touch()
        assert uffd.read_events() == []


@kernel_test()
def test_threads_may_share_one_userfaultfd() -> None:
    pages = 512
    with Userfaultfd.open() as uffd, Memory.map(pages * PAGE) as memory:
        uffd.register(memory.start, memory.length)

        def fill(mark: bytes) -> tuple[int, int]:
            results = [
                uffd.copy(memory.start + at, mark * PAGE) for at in range(0, memory.length, PAGE)
            ]
            assert all(result.complete for result in results)
            return sum(result.done for result in results), sum(result.present for result in results)

        calls = [in_thread(fill, mark) for mark in (b"a", b"b", b"c")]
        counts = [call.result() for call in calls]
        assert sum(done for done, _ in counts) == memory.length
        assert sum(present for _, present in counts) == 2 * memory.length
        for at in range(0, memory.length, PAGE):
            page = memory.read(at, PAGE)
            assert page == page[:1] * PAGE
