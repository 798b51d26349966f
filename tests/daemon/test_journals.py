"""Daemons that are killed, and successors that go on with their journals."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.daemon.client import Client, Guarded, Inside, region_of
from tests.support.descriptors import open_descriptors, open_kept_descriptors
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Journal,
    Keeper,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.journal.journal import number_of
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.model.page_map import PageMap
from uffdaemon.native.message_journal import SLOTS
from uffdaemon.native.page_book import PageBook

if TYPE_CHECKING:
    from collections.abc import Generator

    from uffdaemon.placement import ResolverName

PAGES = 8
DATA = content(PAGES)
FEATURES = Features.EVENT_REMOVE | Features.EVENT_REMAP | Features.EVENT_UNMAP | Features.EVENT_FORK
both_resolvers = pytest.mark.parametrize("resolver", ["loop", "thread"])


@contextmanager
def kept_at() -> Generator[Path]:
    """The path of a keeper, which ends with the block."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keeper"
        with Keeper.open(path):
            pass
        try:
            yield path
        finally:
            Keeper.open(path, start=False).stop()


def served_by_one_to_be_killed(
    inside: Inside, path: Path, fds: tuple[int, int], memory: Guarded, resolver: ResolverName
) -> None:
    """Serve memory of a userfaultfd until killed; say so by the second descriptor."""
    del inside
    fd, said = fds

    async def main() -> None:
        uffd = Userfaultfd.adopt(os.dup(fd))
        region = region_of(memory, CopyFrom(BytesSource(DATA)), name="data")
        with Keeper.open(path, start=False) as keeper:
            async with open_daemon(keeper=keeper) as daemon:
                daemon.add_region(uffd, region, register=None, resolver=resolver)
                os.write(said, b"x")
                await trio.sleep_forever()

    trio.run(main)


class Scene:
    """A client whose daemon is killed, and a successor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.client = Client()
        self.first = Client()

    async def begin(self, resolver: ResolverName) -> Guarded:
        """Have the first daemon serve the client; returns the client's memory."""
        uffd = await self.client.uffd(FEATURES)
        memory = await self.client.guarded(PAGES * PAGE)
        await self.client.run(Inside.close_uffd)
        # A process that forks on is no descendant: only the first daemon and the keeper have it.
        reading, writing = os.pipe()
        self.first = Client()
        self.first.start(
            served_by_one_to_be_killed, self.path, (uffd.fileno(), writing), memory, resolver
        )
        await trio.lowlevel.wait_readable(reading)
        uffd.close()
        return memory

    async def kill(self) -> None:
        self.first.kill()
        await self.first.status()


@both_resolvers
@kernel_test(features=FEATURES)
async def test_what_was_discarded_and_moved_stays_so(resolver: ResolverName) -> None:
    with kept_at() as path:
        scene = Scene(path)
        memory = await scene.begin(resolver)
        client = scene.client
        assert await client.run(Inside.read, 0, PAGE) == DATA[:PAGE]
        await client.run(Inside.advise, Advice.DONTNEED, PAGE, PAGE)
        moved = await client.run(Inside.remap)
        assert moved != memory.start
        await client.run(Inside.advise, Advice.DONTNEED, 3 * PAGE, PAGE)
        await scene.kill()
        reader = client.start(Inside.read_all)
        await reader.thread()
        with Keeper.open(path) as keeper:
            async with open_daemon(keeper=keeper) as daemon:
                [uffd] = daemon.resume_kept({"data": CopyFrom(BytesSource(DATA))})
                [segment] = daemon.served()[uffd]
                assert (segment.start, segment.region.name) == (moved, "data")
                zeros = bytes(PAGE)
                expected = DATA[:PAGE] + zeros + DATA[2 * PAGE : 3 * PAGE] + zeros
                assert await reader.result() == expected + DATA[4 * PAGE :]


def _child_that_waits(inside: Inside, said: int, go: int) -> int:
    """Fork a child that reads everything once it is told to; returns its process id."""
    pid = os.fork()
    if not pid:
        os.read(go, 1)
        os.write(said, inside.memories[-1].read(0, PAGES * PAGE))
        os._exit(0)
    return pid


@both_resolvers
@kernel_test(features=FEATURES)
async def test_a_child_has_the_pages_of_its_birth(resolver: ResolverName) -> None:
    """What its parent discards afterwards is not the child's, whoever serves it."""
    answer, said = os.pipe()
    waits, go = os.pipe()
    with kept_at() as path:
        scene = Scene(path)
        await scene.begin(resolver)
        client = scene.client
        await client.run(Inside.advise, Advice.DONTNEED, 0, PAGE)
        await client.run(_child_that_waits, said, waits)
        await client.run(Inside.advise, Advice.DONTNEED, PAGE, PAGE)
        await scene.kill()
        with Keeper.open(path) as keeper:
            async with open_daemon(keeper=keeper) as daemon:
                assert len(daemon.resume_kept(CopyFrom(BytesSource(DATA)), resolver=resolver)) == 2
                os.write(go, b"x")
                found = b""
                while len(found) < len(DATA):
                    await trio.lowlevel.wait_readable(answer)
                    found += os.read(answer, len(DATA))
                assert found == bytes(PAGE) + DATA[PAGE:]
                expected = bytes(2 * PAGE) + DATA[2 * PAGE :]
                assert await client.run(Inside.read_all) == expected


def _remap_often(inside: Inside, times: int) -> int:
    """Move memory so many times; the last start."""
    start = 0
    for _ in range(times):
        start = inside.remap()
    return start


@both_resolvers
@kernel_test(features=FEATURES)
async def test_more_events_than_the_journal_has_room_for(resolver: ResolverName) -> None:
    with kept_at() as path:
        scene = Scene(path)
        await scene.begin(resolver)
        start = await scene.client.run(_remap_often, 2 * SLOTS)
        await scene.kill()
        with Keeper.open(path) as keeper:
            async with open_daemon(keeper=keeper) as daemon:
                [uffd] = daemon.resume_kept(CopyFrom(BytesSource(DATA)))
                assert [segment.start for segment in daemon.served()[uffd]] == [start]
                assert await scene.client.run(Inside.read_all) == DATA


@kernel_test(features=FEATURES)
async def test_handed_over_in_order() -> None:
    """A daemon that ends as it should leaves its journal too, and removed regions are gone."""
    client = Client()
    uffd = await client.uffd(FEATURES)
    guarded = [await client.guarded(PAGES * PAGE) for _ in range(2)]
    policy = CopyFrom(BytesSource(DATA))
    with Journal() as journal:
        async with open_daemon(journal=journal) as daemon:
            regions = [
                daemon.add_region(uffd, region_of(each, policy, name=name), register=None)
                for each, name in zip(guarded, "ab", strict=True)
            ]
            assert journal.userfaultfds == [number_of(uffd.fileno())]
            assert await client.run(Inside.read, 0, PAGE, which=1) == DATA[:PAGE]
            await client.run(Inside.advise, Advice.DONTNEED, 0, PAGE, which=1)
            daemon.remove_region(regions[0], "hold")
        with Journal(journal.fileno()) as same:
            async with open_daemon(journal=same) as daemon:
                [region] = daemon.resume(uffd, same, {"b": policy})
                assert (region.name, region.start) == ("b", guarded[1].start)
                expected = bytes(PAGE) + DATA[PAGE:]
                assert await client.run(Inside.read_all, which=1) == expected


@kernel_test(features=FEATURES)
async def test_into_another_journal() -> None:
    client = Client()
    uffd = await client.uffd(FEATURES)
    memory = await client.guarded(PAGES * PAGE)
    policy = CopyFrom(BytesSource(DATA))
    with Journal() as journal, Journal() as other:
        async with open_daemon(journal=journal) as daemon:
            daemon.add_region(uffd, region_of(memory, policy, name="data"), register=None)
            await client.run(Inside.advise, Advice.DONTNEED, 0, PAGE)
        async with open_daemon(journal=other) as daemon:
            daemon.resume(uffd, journal, policy)
        journal.close()
        async with open_daemon() as daemon:
            daemon.resume(uffd, other, policy)
            assert await client.run(Inside.read_all) == bytes(PAGE) + DATA[PAGE:]


@kernel_test(features=FEATURES)
async def test_what_cannot_be_resumed() -> None:
    client = Client()
    uffd = await client.uffd(FEATURES)
    memory = await client.guarded(PAGES * PAGE)
    policy = CopyFrom(BytesSource(DATA))

    def give_up(fault: object, error: Exception) -> actions.Action:
        del fault, error
        return actions.Hold("given up")

    with Journal() as journal:
        async with open_daemon(journal=journal) as daemon:
            with pytest.raises(errors.JournalError, match="has nothing of userfaultfd"):
                daemon.resume(uffd, journal, policy)
            region = region_of(memory, policy, name="data", on_failure=give_up)
            daemon.add_region(uffd, region, register=None)
        async with open_daemon(journal=journal) as daemon:
            with pytest.raises(errors.JournalError, match="already: resume it"):
                daemon.add_region(uffd, region_of(memory, policy), register=None)
            with pytest.raises(LookupError, match=r"'data'.*no policy"):
                daemon.resume(uffd, journal, {"other": policy}, on_failure=give_up)
            with pytest.raises(LookupError, match=r"'data' called .*give_up"):
                daemon.resume(uffd, journal, policy)
            [resumed] = daemon.resume(uffd, journal, policy, on_failure=give_up)
            assert resumed.on_failure is give_up
            assert await client.run(Inside.read_all) == DATA


def test_a_book_at_the_same_offset_of_another_file_is_not_this_one() -> None:
    with Journal() as journal:
        area = journal.begin(1)
        home = area.home(PageMap(PAGES))
        assert area.home(home) is home
        with tempfile.TemporaryFile() as file:
            file.truncate(home.book.offset + (1 << 16))
            book = PageBook(PAGES, file=file.fileno(), offset=home.book.offset)
            foreign = PageMap(PAGES, book=book)
            foreign.present.add(3)
            moved = area.home(foreign)
        assert moved.book.offset != home.book.offset
        assert moved.present.runs() == [(3, 4)]
        assert home.present.runs() == []


@kernel_test()
async def test_what_is_no_journal() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="seek"):
        Journal(reading)
    os.close(reading)
    os.close(writing)
    with tempfile.TemporaryFile() as file:
        file.write(b"something else" * 100)
        file.flush()
        with pytest.raises(errors.JournalError, match="not a journal of this version"):
            Journal(file.fileno())


@kernel_test(features=FEATURES)
async def test_a_client_that_is_gone_leaves_nothing() -> None:
    """Neither in the journal nor with the keeper, nor a descriptor here."""
    client = Client()
    with kept_at() as path, Keeper.open(path) as keeper:
        await open_kept_descriptors()
        before = open_descriptors()
        with keeper.journal() as journal:
            async with open_daemon(keeper=keeper, journal=journal) as daemon:
                uffd = await client.uffd(FEATURES)
                memory = await client.guarded(PAGES * PAGE)
                region = region_of(memory, CopyFrom(BytesSource(DATA)))
                daemon.add_region(uffd, region, register=None)
                daemon.watch_client(uffd, client.pid)
                kept = keeper.kept()
                assert {name.partition(" ")[0] for name in kept} == {
                    "journal",
                    "userfaultfd",
                    "client",
                }
                for fd in [fd for fds in kept.values() for fd in fds]:
                    os.close(fd)
                client.kill()
                await daemon.wait_client_gone(uffd)
                await client.status()
                while daemon.served():
                    await trio.lowlevel.checkpoint()
                assert journal.userfaultfds == []
                uffd.close()
            left = keeper.kept()
            assert list(left) == ["journal"]
            os.close(left["journal"][0])
        assert open_descriptors() == before


@kernel_test(features=FEATURES)
async def test_a_region_without_its_keeper_leaves_nothing_in_the_journal() -> None:
    """The second attempt is refused for the same reason, not for what the first one left."""
    client = Client()
    uffd = await client.uffd(FEATURES)
    memory = await client.guarded(PAGES * PAGE)
    region = region_of(memory, CopyFrom(BytesSource(DATA)))
    with tempfile.TemporaryDirectory() as directory, Journal() as journal:
        keeper = Keeper.open(Path(directory) / "keeper")
        async with open_daemon(journal=journal, keeper=keeper) as daemon:
            keeper.stop()
            for _ in range(2):
                with pytest.raises(errors.KeeperError, match="cannot be reached"):
                    daemon.add_region(uffd, region, register=None)
            assert journal.userfaultfds == []
            assert not daemon.served()


@kernel_test()
async def test_a_keeper_holds_what_it_is_given() -> None:
    with kept_at() as path, Keeper.open(path) as keeper:
        reading, writing = os.pipe()
        keeper.keep("a pipe", reading, writing)
        os.close(reading)
        os.close(writing)
        with Keeper.open(path, start=False) as other:
            kept = other.kept()
        reading, writing = kept["a pipe"]
        os.write(writing, b"x")
        assert os.read(reading, 1) == b"x"
        keeper.forget("a pipe")
        keeper.forget("nothing")
        assert keeper.kept() == {}
        os.close(writing)
        assert os.read(reading, 1) == b""  # nobody else has it open
        os.close(reading)
        with pytest.raises(ValueError, match="not a name"):
            keeper.keep("two\nlines", reading)


def _list_for_ever(keeper: Keeper) -> None:
    while True:
        keeper.kept()


@kernel_test()
async def test_a_keeper_that_has_ended() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keeper"
        with pytest.raises(errors.KeeperError, match="no keeper listens"):
            Keeper.open(path, start=False)
        keeper, other = Keeper.open(path), Keeper.open(path)
        other.stop()
        with pytest.raises(errors.KeeperError, match="the keeper"):
            _list_for_ever(keeper)
        with pytest.raises(errors.KeeperError, match="cannot be reached"):
            keeper.keep("name")
        keeper.close()
        with pytest.raises(errors.KeeperError, match="too long"):
            Keeper.open(Path(directory) / ("x" * 200))
        with pytest.raises(errors.KeeperError, match="No such file"):
            Keeper.open(Path(directory) / "nowhere" / "keeper")
        path.mkdir()
        with pytest.raises(errors.KeeperError, match="keeper: "):
            Keeper.open(path)
