"""Filling in the background: what is there or discarded is left alone, and the client may move."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.fake.kernel import (
    PAGE,
    START,
    FakeUserfaultfd,
    failing,
    gone,
    in_flight,
    missing,
    pages,
    present,
    region,
    settled,
)
from tests.support.daemons import both_sleeps
from tests.support.notes import Asked, Gate, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    AsyncSource,
    BytesSource,
    CopyFrom,
    FaultAround,
    Retry,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.errors import OperationError, PlacementRefused
from uffdaemon.lowlevel import Code, Operation, RemapEvent, RemoveEvent, UnmapEvent

DATA = content(8)
COPY = CopyFrom(BytesSource(DATA))


def source_offset(operation: Operation) -> int:
    """Which byte of `DATA` an operation takes first."""
    address = COPY.source.address(0, 1)
    assert address is not None
    return operation.src - address


async def test_pieces_progress_and_the_sum(uffd: FakeUserfaultfd) -> None:
    told: list[tuple[int, int]] = []
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(FaultAround(COPY, 2)))
        brought = await daemon.fill(
            guarded, piece=3 * PAGE, progress=lambda done, total: told.append((done, total))
        )
        assert await daemon.fill(guarded) == 0
    assert brought == 8 * PAGE
    assert [pages(step) for step in uffd.issued] == [(0, 3), (3, 6), (6, 8)]
    assert [source_offset(step) for step in uffd.issued] == [0, 3 * PAGE, 6 * PAGE]
    assert [done // PAGE for done, _ in told[:4]] == [0, 3, 6, 8]
    assert {total for _, total in told} == {8 * PAGE}


@both_sleeps
async def test_present_and_discarded_pages_are_skipped(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        guarded = daemon.add_region(uffd, region(Asked(COPY)))
        uffd.say(missing(2), RemoveEvent(START + 5 * PAGE, START + 6 * PAGE))
        await recorder.resolutions(1)
        uffd.issued.clear()
        assert await daemon.fill(guarded, source=BytesSource(DATA)) == 6 * PAGE
    assert [pages(step) for step in uffd.issued] == [(0, 2), (3, 5), (6, 8)]


async def test_a_demand_fault_goes_first(uffd: FakeUserfaultfd) -> None:
    """It is answered between two pieces, while the fill has the rest still to do."""
    recorder = Recorder()
    order: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        if done == PAGE:
            uffd.say(missing(6))

    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(Asked(COPY)))
        await daemon.fill(guarded, source=BytesSource(DATA), piece=PAGE, progress=progress)
        order += [pages(step) for step in uffd.issued]
    assert (6, 7) in order
    assert order.index((6, 7)) < order.index((5, 6))
    assert order.count((6, 7)) == 1


async def test_an_event_in_flight_is_waited_for(uffd: FakeUserfaultfd) -> None:
    uffd.script += [in_flight] * 3 + [failing(errno.EAGAIN, after=PAGE)]
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        assert await daemon.fill(guarded, piece=4 * PAGE) == 8 * PAGE
    assert [pages(step) for step in uffd.issued] == [(0, 4)] * 4 + [(1, 5), (5, 8)]


async def test_a_page_discarded_while_its_piece_is_fetched_stays_discarded(
    uffd: FakeUserfaultfd,
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.fill, guarded)
            await gate.times(1)
            uffd.say(RemoveEvent(START + 2 * PAGE, START + 4 * PAGE))
            await recorder.until(lambda: recorder.events)
            gate.open.set()
        assert guarded.pages.filled() == 8
    copied = [pages(step) for step in uffd.issued]
    assert copied == [(0, 2), (4, 8)]


async def test_a_page_discarded_at_the_very_moment_its_piece_arrives(
    uffd: FakeUserfaultfd,
) -> None:
    """C has read the event, and Python has not applied it, when the fill goes on."""
    gate = Gate(DATA)
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.fill, guarded)
            await gate.times(1)
            await settled()
            uffd.say(RemoveEvent(START + 2 * PAGE, START + 4 * PAGE))
            gate.open.set()
    assert [pages(step) for step in uffd.issued] == [(0, 2), (4, 8)]


@pytest.mark.parametrize("part", [(0, 8), (2, 4), (6, 8)])
async def test_what_is_unmapped_while_it_is_filled_needs_nothing_more(
    part: tuple[int, int], uffd: FakeUserfaultfd
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    first, end = part
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.fill, guarded)
            await gate.times(1)
            uffd.say(UnmapEvent(START + first * PAGE, START + end * PAGE))
            await recorder.until(lambda: recorder.events)
            uffd.issued.clear()
            gate.open.set()
    filled = {page for step in uffd.issued for page in range(*pages(step))}
    assert filled == set(range(8)) - set(range(first, end))


async def test_what_is_moved_while_it_is_filled_is_filled_where_it_is(
    uffd: FakeUserfaultfd,
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    away = START - 64 * PAGE
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.fill, guarded)
            await gate.times(1)
            uffd.say(RemapEvent(START + 2 * PAGE, away, 6 * PAGE))
            await recorder.until(lambda: recorder.events)
            uffd.issued.clear()
            gate.open.set()
    filled = {(step.dst, step.length) for step in uffd.issued}
    assert filled == {(START, 2 * PAGE), (away, 6 * PAGE)}


async def test_a_source_that_fails_ends_the_fill_and_keeps_what_came(
    uffd: FakeUserfaultfd,
) -> None:
    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if offset:
            raise OSError("down")
        return DATA[offset : offset + length]

    async with open_daemon() as daemon:
        policy = CopyFrom(AsyncSource(fetch, len(DATA)))
        guarded = daemon.add_region(uffd, region(policy, retry=Retry(attempts=1)))
        with pytest.raises(errors.SourceFailed, match="down"):
            await daemon.fill(guarded, piece=2 * PAGE)
        assert guarded.pages.present.runs() == [(0, 2)]


async def test_a_refusal_ends_the_fill(uffd: FakeUserfaultfd) -> None:
    uffd.script += [failing(errno.ENOMEM, after=PAGE), failing(errno.ENOMEM)]
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        with pytest.raises(OperationError) as caught:
            await daemon.fill(guarded)
        assert caught.value.address == START + PAGE
        assert guarded.pages.present.runs() == [(0, 1)]


async def test_it_goes_on_behind_the_end_of_a_mapping(uffd: FakeUserfaultfd) -> None:
    uffd.script += [failing(errno.ENOENT), failing(errno.ENOENT)]
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        assert await daemon.fill(guarded) == 8 * PAGE
        assert [pages(step) for step in uffd.issued] == [(0, 8), (0, 4), (0, 2), (2, 8)]


async def test_a_page_that_no_mapping_has_ends_the_fill(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = failing(errno.ENOENT)
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        with pytest.raises(OperationError) as caught:
            await daemon.fill(guarded)
        assert caught.value.address == START
        assert len(uffd.issued) == 4


async def test_pages_found_there_are_not_counted_as_brought(uffd: FakeUserfaultfd) -> None:
    uffd.script.append(present)
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        assert await daemon.fill(guarded, piece=2 * PAGE) == 6 * PAGE


async def test_the_exit_of_the_client_ends_the_fill(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = gone
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        with pytest.raises(errors.DaemonClosed, match="is gone"):
            await daemon.fill(guarded)
        await daemon.wait_client_gone(uffd)


async def test_a_descriptor_that_is_closed_ends_the_fill(uffd: FakeUserfaultfd) -> None:
    gate = Gate(DATA)
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        with pytest.RaisesGroup(pytest.RaisesExc(errors.DaemonClosed, match="no longer served")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.fill, guarded)
                await gate.times(1)
                uffd.close()
                await settled()
                gate.open.set()


async def test_a_policy_that_knows_no_whole_region_wants_a_source(uffd: FakeUserfaultfd) -> None:
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(ZeroPage()))
        with pytest.raises(PlacementRefused, match="pass the source"):
            await daemon.fill(guarded)
        assert await daemon.fill(guarded, source=BytesSource(DATA)) == 8 * PAGE


async def test_a_held_fault_is_over_when_the_fill_brings_its_page(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Hold("no"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(policy))
        uffd.say(missing(3))
        await policy.times(1)
        await daemon.fill(guarded, source=BytesSource(DATA))
        assert not daemon.open_faults()
        assert guarded.pages.present.runs() == [(0, 8)]
    assert {step.code for step in uffd.issued} == {Code.COPY}
