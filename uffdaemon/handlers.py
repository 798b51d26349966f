"""The handler of one userfaultfd: faults and events in, one batch of operations out.

The way of a fault that no rule resolves, from top to bottom:

    handle     what was read: events are applied, faults enter the ledger
    decide     the policy and the hooks, which return what comes next (`engine.next_step`)
    _follow    takes those steps, until the fault is in the batch, waits, or has ended
    flush      issues the batch in one call, merged; each result says what comes next
    resolve    the one place where a fault leaves the ledger

Only this module touches the batch.  Nothing that it calls calls back, except tasks, which `resume`
their faults when they end.  Nothing here waits: between reading a message and recording its fault,
and between issuing an operation and recording its result, there is no checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import FILLS, Continue, Copy, Fill, Hold, Wake, Zero
from uffdaemon.engine.apply_events import apply_event, tell_event
from uffdaemon.engine.decide import decide
from uffdaemon.engine.failures import arrived, fail, hold, resolved_by_rule
from uffdaemon.engine.move_faults import verify
from uffdaemon.engine.next_step import (
    EVENT_IN_FLIGHT,
    AskHook,
    Claimed,
    ClientGone,
    Ended,
    Failed,
    Later,
)
from uffdaemon.engine.presence import record_moves, record_result
from uffdaemon.engine.results import claimed, reached, stopped
from uffdaemon.engine.step_plan import narrowed, plan_step, wake_step
from uffdaemon.engine.tasks import Tasks
from uffdaemon.engine.write_protect import AFTER_COPY, issue
from uffdaemon.hooks import Resolved, abandon
from uffdaemon.model.batch import Step, merge, narrow
from uffdaemon.model.ledger import Waiting
from uffdaemon.model.region import Fault
from uffdaemon.names import shown
from uffdaemon.uapi.events import PageFault
from uffdaemon.uapi.outcomes import Code, Outcome, Result, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.engine.apply_events import Applied
    from uffdaemon.engine.next_step import Last, Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Region
    from uffdaemon.uapi.events import Change, Event
    from uffdaemon.uapi.moved import Moved

_clock = time.perf_counter_ns

_PROTECTING = (Copy, Continue, Zero)
_BATCHED = (*FILLS, Wake)
"""The actions that are carried out in the batch."""


class Handler:
    """Resolves the faults of one userfaultfd that need Python."""

    def __init__(self, served: Served, fetch_limit: int) -> None:
        self.served = served
        self.tasks: Tasks = Tasks(served, self.resume, fetch_limit)
        self._ledger = served.ledger
        self._events: deque[Change | Applied] = deque()
        self._batch: list[Step] = []
        self._apart: list[Step] = []
        """Steps that must not be merged: merged once before, they failed."""
        self._ended: deque[Resolved] = deque()
        """Outcomes that the ``after`` hooks have not seen yet."""

    # -- in ------------------------------------------------------------------------------------

    def handle(self, events: Iterable[Event | Applied], read_at: int) -> None:
        """Enter everything that was read, and resolve what can be resolved at once.

        `events` must be all that was pending: what removes or moves ranges comes first.
        """
        faults = self._apply(events)
        entered = [fault for event in faults if (fault := self._enter(event, read_at)) is not None]
        for fault in entered:
            self._decide(fault)
        self.flush()

    def enter_only(self, events: Iterable[Event | Applied], read_at: int) -> None:
        """Enter what was read, and list the faults as open, without resolving them."""
        for event in self._apply(events):
            self._enter(event, read_at)
        self.flush()

    def _apply(self, events: Iterable[Event | Applied]) -> list[PageFault]:
        """Apply what removes or moves ranges; returns the faults.

        An event hook may call this with later events: those that are left are applied first.
        """
        faults: list[PageFault] = []
        for event in events:
            if isinstance(event, PageFault):
                faults.append(event)
            else:
                self._events.append(event)
        while self._events:
            change = self._events.popleft()
            for fault, step in apply_event(self.served, change):
                self._follow(fault, step)
            tell_event(self.served, change)
        self.served.loop.events_applied()
        return faults

    def _enter(self, event: PageFault, read_at: int) -> Fault | None:
        """The fault of a message, if it is to be decided about now."""
        region = self.served.regions.find(event.address) or self.served.outside(event)
        address = event.address - (event.address - region.start) % region.page_size
        fault = Fault(
            address, event.kind, event.write, event.thread, event.address, region, read_at
        )
        if self._ledger.enter(fault):
            return fault
        self.served.counters.joined += 1
        record = self._ledger.at(address, event.kind)
        if record is None or record.state is not Waiting.NOBODY:
            return None
        if record.fault.region is not region or self.served.refaults.back_at_once(fault):
            return None  # the last of those wake-ups for which it failed
        # It was held, and a thread faults again: decide again.
        self._ledger.reopen(record)
        record.failed = False
        return record.fault

    def retry_deferred(self) -> None:
        """Retry the deferred faults whose time has come."""
        for fault, action in self._ledger.pop_expired(_clock()):
            if action is None:
                self._decide(fault)
            else:
                self._follow(fault, action)
        self.flush()

    def resume(self, steps: list[tuple[Fault, Next]]) -> None:
        """A task has ended: go on with its faults."""
        for fault, step in steps:
            self._follow(fault, step)
        self.flush()

    # -- one fault -----------------------------------------------------------------------------

    def _decide(self, fault: Fault) -> None:
        """Decide about a fault, unless a policy or hook of another one has ended it, or its
        region."""
        record = self._ledger.find(fault)
        if record is not None and record.state is Waiting.DECISION:
            self._follow(fault, decide(self.served, fault))

    def _follow(self, fault: Fault, step: Next) -> None:
        """Take what comes next for a fault, until it is in the batch, waits, or has ended."""
        while step is not None and self._ledger.is_open(fault):
            if isinstance(step, Ended):
                self.resolve(fault, step.outcome, step.done)
                return
            if isinstance(step, _BATCHED):
                step = self._plan(fault, step)
            elif isinstance(step, Failed):
                step = fail(self.served, fault, step.error)
            elif isinstance(step, Claimed):
                step = claimed(self.served, fault, step.outcome)
            else:
                self._suspend(fault, step)
                return
        if isinstance(step, AskHook):
            abandon(step.answer)

    def _suspend(self, fault: Fault, step: Last) -> None:
        """Let the fault wait."""
        if isinstance(step, Hold):
            hold(self.served, fault, step.reason)
        elif isinstance(step, Later):
            self._defer(fault, step, _clock())
        elif isinstance(step, ClientGone):
            self._client_exited()
        else:
            self.tasks.start(fault, step)

    def _plan(self, fault: Fault, action: Fill | Wake) -> Next:
        """Add the step of an action to the batch, or return what has to come before it."""
        if self._ledger.held and (record := self._ledger.find(fault)) is not None:
            self._ledger.reopen(record)
        if isinstance(action, Wake):
            self._batch.append(wake_step(fault))
            return None
        if isinstance(action, _PROTECTING) and action.write_protect:
            self._ledger.protect(fault)
        try:
            planned = plan_step(self.served, fault, action)
        except (errors.UsageError, errors.SourceError) as error:
            return Failed(error)
        except Exception as error:  # noqa: BLE001  # a source's `address` may raise anything
            failed = errors.SourceFailed(f"{shown(action)} raised {shown(error)}")
            failed.__cause__ = error
            return Failed(failed)
        if not isinstance(planned, Step):
            return planned
        self._batch.append(planned)
        return None

    def _defer(self, fault: Fault, later: Later, now: int) -> None:
        if later.due is None:
            self.served.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1
            self._ledger.defer(fault, later.action, now, later.reason)
        else:
            self._ledger.defer_until(fault, later.action, later.due, later.reason)
        self.served.loop.wake()

    # -- the batch -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Issue the batch, and what its results make necessary (narrower steps, say)."""
        while (self._batch or self._apart) and not self.served.client_gone:
            steps, self._batch, self._apart = merge(self._batch) + self._apart, [], []
            issued, results, late = issue(self.served, steps)
            for step, result in zip(issued, results, strict=True):
                self._apply_result(step, result)
            for fault in late:
                self._follow(fault, AFTER_COPY)
        self._batch.clear()
        self._apart.clear()
        if self.served.client_gone:
            self._client_exited()  # of what was read since
        self._notify_ended()

    def _apply_result(self, step: Step, result: Result) -> None:
        """Record the result of a step, and follow each of its faults."""
        self._record(step.region, result)
        if result.operation.code is Code.MOVE and result.done:
            verify(self.served, step, result)
        inside, beyond = narrow(step, result.progress)
        done = result.done
        for fault, action in inside:
            self._follow(fault, reached(self.served, fault, action, result, done))
            done = 0
        if not beyond:
            return
        if result.status is Status.CLIENT_GONE:
            self._client_exited()
        elif result.status is Status.RETRY:
            now = _clock()  # one time for all, so that they are tried again together
            for fault, action in beyond:
                self._defer(fault, Later(action, EVENT_IN_FLIGHT), now)
        elif len(step.faults) > 1 or step.operation.length > step.region.page_size:
            # Perhaps only a neighbour failed: try each page separately.
            for fault, action in beyond:
                at = len(self._batch)
                self._follow(fault, narrowed(action))
                # Merged again, they would fail again, for ever.
                self._apart += self._batch[at:]
                del self._batch[at:]
        else:
            [(fault, action)] = beyond
            self._follow(fault, stopped(self.served, fault, action, result))

    def _record(self, region: Region, result: Result) -> None:
        record_result(self.served, region, result)
        self._end_arrived()

    def _end_arrived(self) -> None:
        for fault in arrived(self.served) if self._ledger.held else ():
            self.resolve(fault, Outcome.ALREADY_PRESENT)

    # -- out -----------------------------------------------------------------------------------

    def resolve(self, fault: Fault, outcome: Outcome | None, done: int = 0) -> None:
        """The fault has ended; None: with an outcome that C has counted already."""
        if not self._ledger.leave(fault):
            return
        if outcome is None:
            self.served.counters.joined += 1
        else:
            latency = _clock() - fault.read_at
            self.served.counters.resolved(fault.kind, outcome, latency)
            if self.served.hooks.see_endings:
                self._ended.append(Resolved(fault, outcome, latency, done))
        if len(self._ledger) == self._ledger.held:
            self.served.loop.wake()

    def _notify_ended(self) -> None:
        while self._ended:
            self.served.hooks.after(self._ended.popleft())

    def _client_exited(self) -> None:
        self.served.client_gone = True
        for fault in self._ledger:
            self.resolve(fault, Outcome.CLIENT_GONE)
        self.served.loop.wake()

    # -- called from outside the batch ---------------------------------------------------------

    def client_exited(self) -> None:
        """The process has exited: end all its faults."""
        self._client_exited()
        self._notify_ended()

    def end(self, faults: Iterable[Fault], outcome: Outcome) -> None:
        """These faults have ended without an operation of this handler."""
        for fault in faults:
            self.resolve(fault, outcome)
        self._notify_ended()

    def hold_all(self, faults: Iterable[Fault], reason: str) -> None:
        """Hold these faults: they are not going to be resolved."""
        for fault in faults:
            hold(self.served, fault, reason)

    def rules_resolved(self, events: Iterable[Event]) -> None:
        """Rules have resolved faults: those that are held here for the same pages have ended."""
        for event in events:
            if isinstance(event, PageFault):
                for fault in resolved_by_rule(self.served, event):
                    self.resolve(fault, None)
        self._end_arrived()
        self._notify_ended()

    def record(self, region: Region, result: Result) -> None:
        """An operation on `region` that was not issued for a fault, such as that of a fill."""
        self._record(region, result)
        self._notify_ended()

    def record_moves(self, moved: Moved) -> None:
        """Pages were moved by a call: they are present, and held faults on them end."""
        record_moves(self.served, moved)
        self._end_arrived()
        self._notify_ended()
