"""Runs async ``after``, ``failed`` and event hooks in a task, one after the other."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from uffdaemon.hooks import HookCalls


class AsyncHooks:
    """Awaits what async hooks return, in the order of the faults and events."""

    def __init__(self, calls: HookCalls) -> None:
        self._calls = calls
        self._sender, self._receiver = trio.open_memory_channel[tuple[Awaitable[None], object]](
            math.inf
        )
        self._done = trio.Event()
        calls.await_by(self._await_later)

    @classmethod
    @asynccontextmanager
    async def open(cls, calls: HookCalls) -> AsyncGenerator[AsyncHooks]:
        """Await them while the block runs; those that are pending at its end are dropped."""
        hooks = cls(calls)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hooks._run)  # of the same class
            try:
                yield hooks
            finally:
                hooks._close()
                nursery.cancel_scope.cancel()

    async def finish(self, patience: float) -> None:
        """Await those that are pending, for at most `patience` seconds."""
        self._sender.close()
        with trio.move_on_after(patience):
            await self._done.wait()

    def _await_later(self, answer: Awaitable[None], hook: object) -> None:
        try:
            self._sender.send_nowait((answer, hook))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            _drop(answer)  # too late

    @trio.lowlevel.enable_ki_protection
    async def _run(self) -> None:
        async for answer, hook in self._receiver:
            try:
                await answer
            except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
                self._calls.raised(hook, error)
        self._done.set()

    def _close(self) -> None:
        self._sender.close()
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                _drop(self._receiver.receive_nowait()[0])


def _drop(answer: Awaitable[object]) -> None:
    if inspect.iscoroutine(answer):
        answer.close()
