"""Hooks, policies and sources that note what they are told, and that a test can wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from uffdaemon import Fault, Hooks, Resolved

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.actions import Action
    from uffdaemon.lowlevel import Event


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
