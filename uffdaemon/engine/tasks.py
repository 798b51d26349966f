"""What takes time for a fault, in tasks: fetches, the application's own work, ladders, hooks.

Each task returns what comes next for its faults, and `resume` takes it from there.  No task is
started for a page that is being fetched already: its fault joins that fetch.  At most `limit`
fetches run at a time.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import trio

from uffdaemon import errors
from uffdaemon.actions import Hold, Perform, Span
from uffdaemon.engine.decide import resume_hooks
from uffdaemon.engine.failures import unless_discarded, untrusted
from uffdaemon.engine.fetches import FetchedSource, PendingFetch, fetch_with_retry
from uffdaemon.engine.move_faults import climbed
from uffdaemon.engine.next_step import AskHook, Claimed, Climb, Failed, Fetch
from uffdaemon.engine.shortages import is_shortage, try_later
from uffdaemon.model.ledger import Waiting
from uffdaemon.model.region import policy_name
from uffdaemon.moves.driver import climb_in_trio
from uffdaemon.moves.ladder import Ladder
from uffdaemon.moves.options import Chosen
from uffdaemon.names import name_of, shown
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault

Resume: TypeAlias = "Callable[[list[tuple[Fault, Next]]], None]"


class Tasks:
    """The tasks of one handler."""

    def __init__(self, served: Served, resume: Resume, limit: int) -> None:
        self._served = served
        self._resume = resume
        self._limiter = trio.CapacityLimiter(limit)
        self._fetches: list[PendingFetch] = []
        self._nursery: trio.Nursery | None = None
        self._early: list[Callable[[], Awaitable[None]]] = []
        """Those of faults that were handled before `open`: a program may ask for statistics."""

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Tasks run inside of this block; those that are left at its end are cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while self._early:
                nursery.start_soon(self._early.pop(0))
            yield
            nursery.cancel_scope.cancel()

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            self._early.append(task)
        else:
            self._nursery.start_soon(task)

    def start(self, fault: Fault, step: Fetch | Climb | AskHook | Perform) -> None:
        """Start the task that `step` needs, and note what the fault waits for."""
        ledger = self._served.ledger
        match step:
            case Fetch():
                ledger.wait(fault, Waiting.SOURCE, shown(step.action.source))
                self._fetch(fault, step)
            case Climb():
                ledger.wait(fault, Waiting.WORK, f"moving its page from {step.src:#x}")
                self._spawn(partial(self._climb, fault, step))
            case AskHook():
                ledger.wait(fault, Waiting.HOOK, name_of(self._served.hooks.before[step.number]))
                self._spawn(partial(self._ask_hook, fault, step))
            case Perform():
                ledger.wait(fault, Waiting.WORK, policy_name(fault.region.policy))
                self._spawn(partial(self._perform, fault, step))

    # -- sources -------------------------------------------------------------------------------

    def _fetch(self, fault: Fault, step: Fetch) -> None:
        for pending in self._fetches:
            if pending.covers(fault, step.action):
                pending.faults.append(fault)
                return
        pending = PendingFetch(fault.region, step.action, step.start, step.length, [fault])
        self._fetches.append(pending)
        self._spawn(partial(self._run_fetch, pending))

    @trio.lowlevel.enable_ki_protection
    async def _run_fetch(self, pending: PendingFetch) -> None:
        action, offset = pending.action, pending.start - pending.region.start
        step: Next
        try:
            async with self._limiter:
                data = await fetch_with_retry(
                    action, action.offset + offset, pending.length, pending.region.retry
                )
        except errors.SourceError as error:
            # Perhaps only a neighbour failed: fetch each page separately.
            late = isinstance(error, errors.SourceTimedOut)
            narrow = not late and pending.length > pending.region.page_size
            step = replace(action, extent=1) if narrow else Failed(error)
        else:
            fetched = FetchedSource(data, action.offset + offset)
            step = replace(action, source=fetched, extent=Span(offset, pending.length))
        self._served.loop.drain()
        self._fetches.remove(pending)
        self._end(pending.faults, step)

    # -- work ----------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _perform(self, fault: Fault, action: Perform) -> None:
        name = policy_name(fault.region.policy)
        limit = fault.region.policy_timeout if action.timeout is None else action.timeout
        outcome: object = None
        step: Next = None
        try:
            with trio.move_on_after(limit) as scope:
                outcome = untrusted(await action.work(self._served.uffd, fault))
        except Exception as raised:  # noqa: BLE001  # whatever it is, it is the policy's
            error = errors.PolicyRaised(name, f"raised {shown(raised)}")
            error.__cause__ = raised
            step = (
                try_later(self._served, fault, None, error)
                if is_shortage(raised)
                else Failed(error)
            )
        else:
            if scope.cancelled_caught:
                step = Failed(errors.PolicyTooSlow(name, f"was not done after {limit} s"))
            elif not _is_outcome(outcome):
                what = f"returned {shown(outcome)}, which is no outcome"
                step = Failed(errors.PolicyAnswerInvalid(name, what))
            elif outcome is Outcome.FAILED:
                step = Failed(errors.PolicyRaised(name, "reports that it failed"))
            elif outcome.final:
                step = Claimed(outcome)
            else:
                step = Hold(f"policy {name} reports: {outcome.value}")
        self._served.loop.drain()
        self._end([fault], step)

    # -- moves that were refused ---------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _climb(self, fault: Fault, step: Climb) -> None:
        served, action = self._served, step.action
        size = fault.region.page_size
        terms = Chosen(fallback=action.fallback, page_size=size).terms(served.uffd)
        ladder = Ladder(step.dst, step.src, size, terms)

        def wait(reason: str) -> None:
            served.ledger.wait(fault, Waiting.TIMER, reason)
            served.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1

        def stop() -> bool:
            # Events that were read meanwhile come first: the page may not be due any more.
            served.loop.drain()
            return not served.ledger.is_open(fault) or served.discarded(fault)

        following: Next = None
        try:
            ended = await climb_in_trio(
                served.uffd, action.source_uffd, ladder, waiting=wait, stop=stop
            )
        except (errors.UffdaemonError, OSError) as error:
            served.loop.drain()
            following = (
                try_later(served, fault, action, error) if is_shortage(error) else Failed(error)
            )
        else:
            served.loop.drain()
            if served.ledger.is_open(fault):
                following = climbed(served, fault, action, ladder.moved) if ended else action
        self._end([fault], following)

    def _end(self, faults: list[Fault], step: Next) -> None:
        """The task has ended, and events that were read meanwhile have been applied."""
        served = self._served
        self._resume([(fault, unless_discarded(served, fault, step)) for fault in faults])

    # -- hooks ---------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _ask_hook(self, fault: Fault, step: AskHook) -> None:
        served = self._served
        answer: object = None
        try:
            with trio.fail_after(fault.region.policy_timeout):
                answer = await step.answer
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            served.hooks.raised(served.hooks.before[step.number], error)
        served.loop.drain()
        if served.ledger.is_open(fault):
            following = resume_hooks(served, fault, step.action, answer, step.number)
            self._resume([(fault, following)])


def _is_outcome(outcome: object) -> TypeGuard[Outcome]:
    """By its type, since the ``__class__`` of anything else may raise."""
    return type(outcome) is Outcome
