"""A model of pages under events, forks, discards and fills, against the page book and the kernel.

One thread does to guarded memory what programs do.  It knows what each page has to hold, and which
state the book has to have for it.  A daemon in another thread serves the memory in one of the
placements, which differ in what applies events: the event loop, the resolver thread, or a worker.
"""

from __future__ import annotations

import os
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio
import trio.testing
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.support.clib import Helpers
from tests.support.external_image import LARGE
from tests.support.page_contents import PAGE, content
from tests.support.properties import UNTIMED
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Daemon,
    Hooks,
    Memory,
    Resolver,
    native,
    open_daemon,
)
from uffdaemon.kernel.own_memory import disown
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from uffdaemon.guard.guarded_region import GuardedRegion
    from uffdaemon.model.page_map import PageMap

PAGES: Final = 12
"""Pages that one example plays with."""
CHILDREN: Final = 3
FORKS: Final = 40
"""After so many, the daemon is another one: each child stays until the next one is born."""
ROUNDS: Final = 2000
"""Questions to a worker after which it should have noted what was read before."""
_EVENTS = Features.THREAD_ID | Features.EVENT_REMOVE | Features.EVENT_REMAP | Features.EVENT_UNMAP
_WORD = struct.Struct("=Q")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Placing:
    """Who serves the memory."""

    name: str
    features: Features = _EVENTS | Features.EVENT_FORK
    native_sleep: bool = True
    lowered: bool = True

    @property
    def external(self) -> bool:
        return self.name == "external"

    def guard(self, daemon: Daemon, memory: Memory, data: bytes) -> GuardedRegion:
        """Guard memory as the placement is called."""
        if self.external:
            policy = "tests.support.external_image:make_large()"
            return daemon.guard(memory, policy, placement="external", features=self.features)
        copied = CopyFrom(BytesSource(data))
        if self.name in ("trio-sleep", "in-process"):
            return daemon.guard(memory, copied, placement="in_process", features=self.features)
        resolver = Resolver.IN_THREAD if self.name == "in-thread" else Resolver.THREAD
        return daemon.guard(memory, copied, resolver=resolver, features=self.features)


PLACINGS: Final = {
    each.name: each
    for each in (
        Placing("trio-sleep"),
        Placing("resolver-thread"),
        # A child of memory that its threads fill themselves gets SIGBUS there.
        Placing("in-thread", _EVENTS | Features.SIGBUS),
        Placing("external"),
        Placing("in-process", native_sleep=False, lowered=False),
    )
}


class Service:
    """A daemon in a thread of its own."""

    def __init__(self, placing: Placing) -> None:
        self.placing = placing
        self.forks = 0
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main), daemon=True)
        self._thread.start()
        self._begun.wait()

    async def _main(self) -> None:
        before = [] if self.placing.lowered else [Hooks(before=lambda fault, action: None)]
        self._end = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with open_daemon(native_sleep=self.placing.native_sleep, hooks=before) as daemon:
            self.daemon = daemon
            self._begun.set()
            await self._end.wait()

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function in trio's thread."""
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def wait(self, function: Callable[[], Awaitable[_T]]) -> _T:
        """Call an async function there."""
        return trio.from_thread.run(function, trio_token=self._token)

    def end(self) -> None:
        self.call(self._end.set)
        self._thread.join()


class Arena:
    """Where the pages of each example come from, and what they hold at first."""

    def __init__(self, placing: Placing, helpers: Helpers) -> None:
        self.placing = placing
        self.helpers = helpers
        self.steps = 0
        self.service = Service(placing)
        self._pages = LARGE if placing.external else PAGES
        self.data = content(self._pages)
        self._memory: Memory | None = None
        self._used = 0
        self.region: GuardedRegion

    def pages(self) -> tuple[Memory, int]:
        """Memory, and the first of `PAGES` pages of it that nobody has used before."""
        if self.service.forks > FORKS:
            self._renew()
        if self._memory is None or self._used + PAGES > self._pages:
            self._leave()
            memory = Memory.map(self._pages * PAGE)
            service, data = self.service, self.data
            self.region = service.call(lambda: self.placing.guard(service.daemon, memory, data))
            self._memory, self._used = memory, 0
        first, self._used = self._used, self._used + PAGES
        return self._memory, first

    def _leave(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def _renew(self) -> None:
        self._leave()
        self.service.end()
        self.service = Service(self.placing)

    def close(self) -> None:
        self._leave()
        self.service.end()

    def newest_books(self) -> list[PageMap]:
        """The page books of the userfaultfd that the daemon serves last, but for this process's."""
        servers = list(self.service.daemon._servers.own.values())
        assert servers[-1].owns_fd
        return [segment.region.pages for segment in servers[-1].served.regions]

    def settle(self, enough: Callable[[], object]) -> None:
        """Return once everything that has happened is in the book, which `enough` looks at."""
        service = self.service
        if not self.placing.external:
            for server in list(service.daemon._servers.own.values()):
                server._port.settle()
            service.wait(trio.testing.wait_all_tasks_blocked)
            return
        worker = service.daemon.external[self.region]
        for _ in range(ROUNDS):
            service.wait(worker.refresh)
            if enough():
                return


@dataclass
class Page:
    """What is to be true of a page."""

    at: int
    """Its address; 0: it was unmapped."""
    word: int
    """What it begins with once it is there."""
    present: bool = False
    void: bool = False
    piece: int = 0
    """Which move it came with: mremap(2) takes no more than one mapping."""

    def follows(self, other: Page) -> bool:
        """Whether it lies behind the other one, in the same mapping."""
        return (self.at, self.piece) == (other.at + PAGE, other.piece)


class Child:
    """A fork that reads the pages when it is told to."""

    def __init__(self, pages: list[Page], first: int, helpers: Helpers) -> None:
        self._born = [page for page in pages if page.at]
        self._words = [page.word for page in self._born]
        self._states = {
            first + number: (page.present, page.void)
            for number, page in enumerate(pages)
            if page.at
        }
        waits, self._go = os.pipe()
        self._out, writes = os.pipe()
        self._pid = helpers.fork_and_read([page.at for page in self._born], waits, writes)
        os.close(waits)
        os.close(writes)

    def check(self) -> None:
        """It sees what was there when it was born."""
        os.write(self._go, b"x")
        size = _WORD.size * len(self._words)
        found = b""
        while len(found) < size:
            found += os.read(self._out, size - len(found)) or b"?" * size
        assert [word for (word,) in _WORD.iter_unpack(found)] == self._words

    def compare(self, book: PageMap) -> None:
        """Its page book begins with its parent's."""
        found = {n: (n in book.present, n in book.removed) for n in self._states}
        assert found == self._states

    def end(self) -> None:
        os.write(self._go, b"xx")
        os.waitpid(self._pid, 0)
        os.close(self._go)
        os.close(self._out)


class PageStates(RuleBasedStateMachine):
    """What programs do to memory, one page or run of pages at a time."""

    arena: Arena

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.first = self.arena.pages()
        self.book: PageMap = self.arena.region.pages
        self.pages = [
            Page(
                self.memory.start + number * PAGE,
                *_WORD.unpack_from(self.arena.data, number * PAGE),
            )
            for number in range(self.first, self.first + PAGES)
        ]
        self.moves = 0
        self.child: Child | None = None

    @property
    def forkable(self) -> bool:
        return bool(self.arena.placing.features & Features.EVENT_FORK)

    def run_from(self, which: int) -> list[Page]:
        """Some pages that lie side by side in one mapping, or none."""
        first, count = which % PAGES, which // PAGES + 1
        found: list[Page] = []
        for page in self.pages[first : first + count]:
            if not page.at or (found and not page.follows(found[-1])):
                break
            found.append(page)
        return found

    @rule(which=st.integers(0, PAGES - 1))
    def read(self, which: int) -> None:
        self.arena.steps += 1
        page = self.pages[which]
        if page.at:
            assert _WORD.unpack(native.read_memory(page.at, 8)) == (page.word,)
            page.present = True

    @rule(which=st.integers(0, PAGES - 1))
    def write(self, which: int) -> None:
        self.arena.steps += 1
        page = self.pages[which]
        if page.at:
            page.word = self.arena.steps
            native.write_memory(page.at, _WORD.pack(page.word))
            page.present = True

    @rule(which=st.integers(0, 3 * PAGES - 1))
    def discard(self, which: int) -> None:
        self.arena.steps += 1
        found = self.run_from(which)
        if found:
            assert not native.advise(found[0].at, len(found) * PAGE, Advice.DONTNEED)
        for page in found:
            page.present, page.void, page.word = False, True, 0

    @rule(which=st.integers(0, 3 * PAGES - 1))
    def remap(self, which: int) -> None:
        self.arena.steps += 1
        found = self.run_from(which)
        if not found:
            return
        length = len(found) * PAGE
        number, target = native.map_memory(-1, length, 0, PAGE)
        assert number == 0
        assert native.remap_memory(found[0].at, length, target) == 0
        disown(found[0].at, found[0].at + length)  # others may be mapped there from now on
        self.moves += 1
        for index, page in enumerate(found):
            page.at, page.piece = target + index * PAGE, self.moves

    @rule(which=st.integers(0, 4 * PAGES - 1))
    def unmap(self, which: int) -> None:
        self.arena.steps += 1
        page = self.pages[which % PAGES]
        if page.at and which < PAGES:  # now and then: nothing would be left
            assert native.unmap_memory(page.at, PAGE) == 0
            disown(page.at, page.at + PAGE)
            page.at = 0

    @precondition(lambda self: not self.arena.placing.external)
    @rule(which=st.integers(0, 9))
    def fill(self, which: int) -> None:
        self.arena.steps += 1
        if which:
            return
        service, region = self.arena.service, self.arena.region
        service.wait(lambda: service.daemon.fill(region, piece=4 * PAGE))
        for page in self.pages:
            page.present |= bool(page.at) and not page.void

    @precondition(lambda self: self.forkable)
    @rule(which=st.integers(0, 4))
    def fork(self, which: int) -> None:
        self.arena.steps += 1
        if which:
            return
        self.end_child()
        self.child = Child(self.pages, self.first, self.arena.helpers)
        self.arena.service.forks += 1

    @precondition(lambda self: self.child is not None)
    @rule()
    def look_into_child(self) -> None:
        self.arena.steps += 1
        assert self.child is not None
        if not self.arena.placing.external:
            self.arena.settle(lambda: True)
            for book in self.arena.newest_books():
                self.child.compare(book)
        self.child.check()
        self.end_child()

    @rule()
    def compare(self) -> None:
        self.arena.steps += 1
        self.arena.settle(lambda: self.in_book() == self.in_model())
        assert self.in_book() == self.in_model()

    def in_book(self) -> list[tuple[bool, bool]]:
        return [
            (
                bool(page.at) and self.first + number in self.book.present,
                bool(page.at) and self.first + number in self.book.removed,
            )
            for number, page in enumerate(self.pages)
        ]

    def in_model(self) -> list[tuple[bool, bool]]:
        return [(bool(p.at) and p.present, bool(p.at) and p.void) for p in self.pages]

    def end_child(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None

    def teardown(self) -> None:
        try:
            if self.arena.steps:
                self.compare()
        finally:
            self.end_child()
            for page in self.pages:
                if page.at and page.piece:
                    native.unmap_memory(page.at, PAGE)


def play(placing: Placing, library: Path, steps: int, examples: int) -> int:
    """Run the model for at least `steps` steps, `examples` at a time; returns how many it took."""
    arena = Arena(placing, Helpers(library))
    machine: Any = type("Played", (PageStates,), {"arena": arena})
    try:
        while arena.steps < steps:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    UNTIMED,
                    max_examples=examples,
                    stateful_step_count=100,
                    phases=[Phase.generate],
                    database=None,
                ),
            )
    finally:
        with suppress(trio.RunFinishedError):
            arena.close()
    return arena.steps
