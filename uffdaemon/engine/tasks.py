"""Whatever takes time: sources that have to be fetched, work that policies ask for, async hooks.

Each runs in a task, and no task is started for a page that is on its way already: faults on pages
of one fetch join it.  At most `limit` fetches run at a time; a fault that waits for its turn says
so in the ledger.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from uffdaemon import errors
from uffdaemon.actions import Copy, Span
from uffdaemon.engine.decide import resume_hooks
from uffdaemon.engine.failures import fail, hold, untrusted
from uffdaemon.engine.fetches import Fetch, FetchedSource, fetch_with_retry
from uffdaemon.engine.move_faults import climbed
from uffdaemon.hooks import hook_name
from uffdaemon.model.ledger import Waiting
from uffdaemon.model.region import policy_name
from uffdaemon.moves.driver import climb_in_trio, terms_of
from uffdaemon.moves.ladder import Ladder
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from uffdaemon.actions import Action, Move, Perform
    from uffdaemon.handlers import Handler
    from uffdaemon.model.region import Fault


class SlowWork:
    """The tasks of one handler."""

    def __init__(self, handler: Handler, nursery: trio.Nursery, limit: int) -> None:
        self._handler = handler
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(limit)
        self._fetches: list[Fetch] = []

    @property
    def fetches(self) -> int:
        """How many fetches are under way or wait for their turn."""
        return len(self._fetches)

    # -- sources -------------------------------------------------------------------------------

    def fetch(self, fault: Fault, action: Copy, start: int, length: int) -> None:
        """Get the bytes for `length` bytes from address `start`, then answer the fault."""
        self._handler.ledger.wait(fault, Waiting.SOURCE, repr(action.source))
        for fetch in self._fetches:
            if fetch.covers(fault, action):
                fetch.faults.append(fault)
                return
        fetch = Fetch(fault.region, action, start, length, [fault])
        self._fetches.append(fetch)
        self._nursery.start_soon(self._run_fetch, fetch)

    async def _run_fetch(self, fetch: Fetch) -> None:
        action, offset = fetch.action, fetch.start - fetch.region.start
        try:
            async with self._limiter:
                data = await fetch_with_retry(
                    action, action.offset + offset, fetch.length, fetch.region.retry
                )
        except errors.SourceError as error:
            self._handler.catch_up()
            self._fetches.remove(fetch)
            # The trouble may be a neighbour's: then each page is asked for by itself.
            late = isinstance(error, errors.SourceTimedOut)
            narrow = not late and fetch.length > fetch.region.page_size
            for fault in fetch.faults:
                if narrow:
                    self._handler.carry_out(fault, replace(action, extent=1))
                else:
                    fail(self._handler, fault, error)
        else:
            self._handler.catch_up()
            self._fetches.remove(fetch)
            fetched = FetchedSource(data, action.offset + offset)
            filled = replace(action, source=fetched, extent=Span(offset, fetch.length))
            for fault in fetch.faults:
                self._handler.carry_out(fault, filled)
        self._handler.flush()

    def source_failed(self, fault: Fault, action: Copy, error: errors.SourceError) -> None:
        """A source in memory could not be read: try again as configured, then fail."""
        retry = fault.region.retry
        failures = self._handler.ledger.count_failure(fault)
        if failures >= retry.attempts:
            fail(self._handler, fault, error)
            return
        due = time.perf_counter_ns() + int(retry.delay(failures) * 1e9)
        self._handler.ledger.defer_until(fault, action, due, str(error))
        self._handler.wake()

    # -- work ----------------------------------------------------------------------------------

    def perform(self, fault: Fault, action: Perform) -> None:
        """Let the application's own work answer the fault."""
        self._handler.ledger.wait(fault, Waiting.WORK, policy_name(fault.region.policy))
        self._nursery.start_soon(self._perform, fault, action)

    async def _perform(self, fault: Fault, action: Perform) -> None:
        handler = self._handler
        name = policy_name(fault.region.policy)
        limit = fault.region.policy_timeout if action.timeout is None else action.timeout
        outcome: object = None
        error: Exception | None = None
        late = False
        try:
            with trio.move_on_after(limit) as scope:
                outcome = untrusted(await action.work(handler.uffd, fault))
            late = scope.cancelled_caught
        except Exception as raised:  # noqa: BLE001  # whatever it is, it is the policy's
            error = errors.PolicyRaised(name, f"raised {raised!r}")
            error.__cause__ = raised
        if late:
            error = errors.PolicyTooSlow(name, f"was not done after {limit} s")
        elif error is None and not isinstance(outcome, Outcome):
            error = errors.PolicyAnswerInvalid(name, f"returned {outcome!r}, which is no outcome")
        elif outcome is Outcome.FAILED:
            error = errors.PolicyRaised(name, "reports that it failed")
        handler.catch_up()
        if not handler.ledger.is_open(fault):
            return
        if error is not None:
            fail(handler, fault, error)
        elif isinstance(outcome, Outcome):
            if outcome.final:
                handler.woken(fault, outcome)
            else:
                hold(handler, fault, f"policy {name} reports: {outcome.value}")
        handler.flush()

    # -- moves that were refused ---------------------------------------------------------------

    def climb(self, fault: Fault, action: Move, dst: int, src: int) -> None:
        """Do for the page of a fault what can be done where MOVE alone does not help."""
        reason = f"moving its page from {src:#x}"
        self._handler.ledger.wait(fault, Waiting.WORK, reason)
        self._nursery.start_soon(self._climb, fault, action, dst, src)

    async def _climb(self, fault: Fault, action: Move, dst: int, src: int) -> None:
        handler = self._handler
        size = fault.region.page_size
        ladder = Ladder(dst, src, size, terms_of(handler.uffd, action.fallback, page_size=size))

        def wait(reason: str) -> None:
            handler.ledger.wait(fault, Waiting.TIMER, reason)
            handler.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1

        def stop() -> bool:
            # Events that were read meanwhile come first: the page may not be due any more.
            handler.catch_up()
            return not handler.ledger.is_open(fault) or handler.discarded(fault)

        try:
            ended = await climb_in_trio(
                handler.uffd, action.source_uffd, ladder, waiting=wait, stop=stop
            )
        except (errors.UffdaemonError, OSError) as error:
            handler.catch_up()
            fail(handler, fault, error)
        else:
            handler.catch_up()
            if ended and handler.ledger.is_open(fault):
                climbed(handler, fault, action, ladder.moved)
            elif handler.ledger.is_open(fault):
                handler.carry_out(fault, action)
        handler.flush()

    # -- hooks ---------------------------------------------------------------------------------

    def ask_hook(self, fault: Fault, action: Action, answer: Awaitable[object], index: int) -> None:
        """Wait for the async ``before`` hook number `index`."""
        name = hook_name(self._handler.hooks.before[index])
        self._handler.ledger.wait(fault, Waiting.HOOK, name)
        self._nursery.start_soon(self._ask_hook, fault, action, answer, index)

    async def _ask_hook(
        self, fault: Fault, action: Action, answer: Awaitable[object], index: int
    ) -> None:
        said: object = None
        try:
            with trio.fail_after(fault.region.policy_timeout):
                said = await answer
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            self._handler.hooks.raised(self._handler.hooks.before[index], error)
        self._handler.catch_up()
        resume_hooks(self._handler, fault, action, said, index)
        self._handler.flush()
