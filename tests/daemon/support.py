"""What the daemon's tests share: content that tells pages apart, and hooks that keep notes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from uffdaemon import (
    Action,
    Daemon,
    Event,
    Fault,
    Hooks,
    OpenFault,
    Region,
    Resolved,
    Userfaultfd,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE = 4096
HUGE = 2 << 20

both_sleeps = pytest.mark.parametrize("native_sleep", [True, False], ids=["in-c", "in-trio"])
"""The same whether C sleeps in trio's place or trio sleeps by itself."""


def content(pages: int, page_size: int = PAGE, seed: int = 0) -> bytes:
    """Bytes in which no page is like another, and none is zeros."""
    return b"".join(
        hashlib.blake2b(b"%d %d" % (seed, page)).digest() * (page_size // 64)
        for page in range(pages)
    )


class Notes:
    """Something that is written down, and that others wait for."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something noted makes `condition` true."""
        while not condition():
            await self._changed.wait()


class Recorder(Notes):
    """Hooks that note what they are told.  Faults are still answered by rules."""

    def __init__(self) -> None:
        super().__init__()
        self.resolved: list[Resolved] = []
        self.failed: list[tuple[Fault, Exception]] = []
        self.events: list[Event] = []
        self.hooks = Hooks(
            after=self._after,
            failed=self._failed,
            fork=self._event,
            remap=self._event,
            remove=self._event,
            unmap=self._event,
        )

    def _after(self, resolved: Resolved) -> None:
        self.resolved.append(resolved)
        self.note()

    def _failed(self, fault: Fault, error: Exception) -> None:
        self.failed.append((fault, error))
        self.note()

    def _event(self, event: Event) -> None:
        self.events.append(event)
        self.note()

    async def resolutions(self, count: int) -> list[Resolved]:
        """The faults that have ended, once there are so many."""
        await self.until(lambda: len(self.resolved) >= count)
        return self.resolved

    async def failures(self, count: int) -> list[tuple[Fault, Exception]]:
        """The failures, once there are so many."""
        await self.until(lambda: len(self.failed) >= count)
        return self.failed

    async def either(self, count: int) -> None:
        """Until so many faults have ended, or one has failed."""
        await self.until(lambda: self.failed or len(self.resolved) >= count)


class Asked(Notes):
    """A policy that notes what it is asked, and answers what another one does."""

    def __init__(self, policy: Callable[[Fault], Action | None]) -> None:
        super().__init__()
        self.policy = policy
        self.faults: list[Fault] = []

    def __call__(self, fault: Fault) -> Action | None:
        self.faults.append(fault)
        self.note()
        return self.policy(fault)

    async def times(self, count: int) -> list[Fault]:
        """What it was asked, once that is so much."""
        await self.until(lambda: len(self.faults) >= count)
        return self.faults


class Gate:
    """An async source that waits for being let go, and notes what it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.notes = Notes()
        self.open = trio.Event()

    async def fetch(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        self.notes.note()
        await self.open.wait()
        return self.data[offset : offset + length]

    async def times(self, count: int) -> list[tuple[int, int]]:
        await self.notes.until(lambda: len(self.asked) >= count)
        return self.asked


def the_open_fault(daemon: Daemon) -> OpenFault:
    """The only one."""
    [found] = daemon.open_faults()
    return found


def failure_lines(logs: Sequence[object]) -> list[dict[str, object]]:
    """What was logged of faults that failed."""
    return [line for line in logs if isinstance(line, dict) and line["event"] == "fault failed"]


def region_of(guarded: tuple[int, int, int], policy: object, **options: object) -> Region:
    """The region for memory of a client."""
    start, length, page_size = guarded
    return Region(start, length, policy, page_size, **options)  # type: ignore[arg-type]


async def faults_pending(uffd: Userfaultfd, count: int) -> None:
    """Wait until so many threads are stuck whose messages nobody has read."""
    info = Path(f"/proc/self/fdinfo/{uffd.fileno()}")
    while f"pending:\t{count}\n" not in info.read_text("ascii"):  # noqa: ASYNC240  # in memory
        await trio.lowlevel.checkpoint()


def open_descriptors() -> set[str]:
    """The descriptors of this process, with what they are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:  # the one that lists them
            continue
    return found
