"""Carrying actions out: one handler for each userfaultfd.

The way of a fault that rules do not cover: `answer` takes what was read and lets the ledger know;
`uffdaemon.engine.decide` asks the policy and the hooks; `carry_out` turns the action into a step,
or hands it to a task where it has to wait; `flush` issues all steps of the batch in one call;
`settle` books what came of each.  A fault leaves in `resolve`, and in no other place.

Nothing here waits: everything between reading a message and recording its fault, and between
issuing an operation and booking its result, happens without a checkpoint.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import (
    FILLS,
    Action,
    Copy,
    Fill,
    Move,
    Perform,
    Poison,
    Wake,
    Zero,
)
from uffdaemon.engine.apply_events import apply_event
from uffdaemon.engine.decide import decide
from uffdaemon.engine.failures import comes_back, fail, hold, release_held
from uffdaemon.engine.move_faults import after_copy, empty, issue, refused, verify
from uffdaemon.errors import error_of
from uffdaemon.hooks import HookCalls, Resolved
from uffdaemon.kernel.own_memory import check_own
from uffdaemon.model.batch import Step, merge, narrow, operation, target
from uffdaemon.model.ledger import Ledger, Waiting
from uffdaemon.model.refaults import MAX_CLAIMS, MAX_REPEATS, Repeats
from uffdaemon.model.region import Fault, Region, policy_name
from uffdaemon.model.region_table import RegionTable, nowhere
from uffdaemon.model.statistics import Counters
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.sources import zeros
from uffdaemon.uapi.events import FaultKind, PageFault
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code, Operation, Outcome, Result, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from structlog.stdlib import BoundLogger

    from uffdaemon.engine.apply_events import Applied
    from uffdaemon.engine.tasks import SlowWork
    from uffdaemon.hooks import Hooks
    from uffdaemon.kernel.userfaultfd import CarryOut, Userfaultfd
    from uffdaemon.uapi.events import Change, Event, ForkEvent

_clock = time.perf_counter_ns


class Handler:
    """Answers the faults of one userfaultfd, in Python."""

    def __init__(
        self,
        uffd: Userfaultfd,
        hooks: Sequence[Hooks],
        log: BoundLogger,
        regions: RegionTable | None = None,
    ) -> None:
        self.uffd = uffd
        self.log = log
        self.regions = RegionTable() if regions is None else regions
        self.ledger = Ledger()
        self.counters = Counters()
        self.hooks = HookCalls(hooks, self.counters, log)
        self.slow: SlowWork
        self.forks: list[tuple[ForkEvent, RegionTable]] = []
        """Children whose userfaultfd is ours, with their regions, and not yet looked after."""
        self.of_this_process: Callable[[], Iterable[Handler]] = lambda: (self,)
        """The handlers of all userfaultfds of this process that the daemon serves."""
        self.client_gone = False
        self._events: deque[Change | Applied] = deque()
        self._steps: list[Step] = []
        self._apart: list[Step] = []
        self.failing: set[tuple[int, FaultKind]] = set()
        """(address, kind) of faults that have failed and are still open."""
        self.held: set[Fault] = set()
        """What nobody is going to answer."""
        self.repeats = Repeats()
        self.stale: set[int] = set()
        """Which page maps (by id) have changed so that rules made from them no longer hold."""
        self.carry_out_all: CarryOut | None = None
        """How operations are carried out where events may be known to C before they are here."""
        self.wake: Callable[[], None] = lambda: None
        """Called when whoever sleeps for this handler has something new to look at."""
        self.catch_up: Callable[[], object] = lambda: None
        """To be called by tasks before they act: events may have been read and not applied."""
        self.events_applied: Callable[[], None] = lambda: None
        """Called when everything that was read until then has been applied."""

    def execute(self, operations: Sequence[Operation]) -> list[Result]:
        """Carry operations out as whoever serves the userfaultfd has it done."""
        return self.uffd.execute(operations, self.carry_out_all)

    # -- in ------------------------------------------------------------------------------------

    def answer(self, events: Iterable[Event | Applied], read_at: int) -> None:
        """Take in everything that was read, and answer what can be answered at once.

        `events` must be all that was pending: what removes or moves ranges comes first.
        """
        faults = self._apply(events)
        entered = [fault for event in faults if (fault := self._enter(event, read_at)) is not None]
        for fault in entered:
            decide(self, fault)
        self.flush()

    def note(self, events: Iterable[Event | Applied], read_at: int) -> None:
        """Take in what was read, and list the faults as open, without answering them."""
        for event in self._apply(events):
            self._enter(event, read_at)
        self.flush()

    def _apply(self, events: Iterable[Event | Applied]) -> list[PageFault]:
        """Apply what removes or moves ranges; returns the faults.

        A hook that is told of an event may come here with later ones: it first applies those that
        are left.
        """
        faults: list[PageFault] = []
        for event in events:
            if isinstance(event, PageFault):
                faults.append(event)
            else:
                self._events.append(event)
        while self._events:
            apply_event(self, self._events.popleft())
        self.events_applied()
        return faults

    def _enter(self, event: PageFault, read_at: int) -> Fault | None:
        region = self.regions.find(event.address) or nowhere(event)
        address = event.address - (event.address - region.start) % region.page_size
        fault = Fault(
            address, event.kind, event.write, event.thread, event.address, region, read_at
        )
        if self.ledger.enter(fault):
            return fault
        self.counters.joined += 1
        known = self.ledger.faults[address, event.kind]
        if known not in self.held or known.region is not region:
            return None
        if self.repeats.back_at_once(fault):
            return None  # the last of those wake-ups for which it failed
        # Nobody is going to answer it, and yet somebody asks again: so does this.
        self.held.remove(known)
        self.failing.discard((address, event.kind))
        self.ledger.wait(known, Waiting.DECISION)
        return known

    def retry_due(self) -> None:
        """Carry out again what was deferred and is due."""
        for fault, action in self.ledger.take_due(_clock()):
            if action is after_copy:
                decide(self, fault)
            else:
                self.carry_out(fault, action)
        self.flush()

    # -- carrying out --------------------------------------------------------------------------

    def carry_out(self, fault: Fault, action: Action) -> None:
        """Turn an action into a step of this batch, or hand it to a task if it has to wait."""
        if not self.ledger.is_open(fault):
            return
        if self.held:
            self.held.discard(fault)
        try:
            if isinstance(action, FILLS):
                self._plan(fault, action)
            elif isinstance(action, Perform):
                self.slow.perform(fault, action)
            elif isinstance(action, Wake):
                self._wake(fault)
            else:
                hold(self, fault, action.reason)
        except (errors.UsageError, errors.SourceError) as error:
            fail(self, fault, error)
        except Exception as error:  # noqa: BLE001  # a source's `address` may raise anything
            failed = errors.SourceFailed(f"{action!r} raised {error!r}")
            failed.__cause__ = error
            fail(self, fault, failed)

    def _plan(self, fault: Fault, action: Fill) -> None:
        region = fault.region
        if self.discarded(fault) and not isinstance(action, Poison | Zero):
            action = Zero()
        filled: Fill = action
        if isinstance(action, Zero) and region.page_size != PAGE_SIZE:
            # Hugetlb has no zero page; a copy of zeros is the same.
            filled = Copy(zeros(region.page_size), -fault.offset)
        start, length = self.regions.around(fault.address, *target(fault, filled))
        src = 0
        if isinstance(filled, Copy):
            offset = filled.offset + start - region.start
            address = filled.source.address(offset, length)
            if address is None:
                self.slow.fetch(fault, filled, start, length)
                return
            src = address
        elif isinstance(filled, Move):
            if not self.uffd.same_process and filled.fallback is None:
                raise errors.PlacementRefused(
                    f"policy {policy_name(region.policy)} moves pages of another process, which "
                    "the kernel refuses; let it run inside of that process, or copy"
                )
            offset = start - region.start
            if filled.length is not None and offset + length > filled.length:
                raise errors.SourceTooShort(
                    f"the memory to move from has {filled.length} bytes; {length} at {offset:#x} "
                    "were asked for"
                )
            src = filled.source + offset
            if not filled.foreign and not check_own(src, length):
                raise errors.ForeignMemory(
                    f"policy {policy_name(region.policy)} moves from {src:#x}, which is not in "
                    "memory that uffdaemon has mapped; foreign=True says that you know"
                )
            if not self.uffd.same_process:
                self.slow.climb(fault, filled, fault.address, src + fault.address - start)
                return
        step = Step(operation(filled, region, start, length, src), region, [fault], [action])
        self._steps.append(step)

    def discarded(self, fault: Fault) -> bool:
        """Whether the page's owner threw its content away, and zeros are due."""
        region = fault.region
        return (
            region.pages.any_removed
            and region.after_remove == "zero"
            and fault.kind is FaultKind.MISSING
            and fault.page in region.pages.removed
        )

    def _wake(self, fault: Fault) -> None:
        self._steps.append(Step(wake_operation(fault), fault.region, [fault], [Wake()]))

    def flush(self) -> None:
        """Issue all steps; what that makes necessary (narrower ones, say) as well."""
        while (self._steps or self._apart) and not self.client_gone:
            steps, self._steps, self._apart = merge(self._steps) + self._apart, [], []
            steps, results = issue(self, steps)
            for step, result in zip(steps, results, strict=True):
                self._settle(step, result)
        self._steps.clear()
        self._apart.clear()

    def _settle(self, step: Step, result: Result) -> None:
        """Book what came of a step, and see to those of its faults that are left."""
        self.book(step.region, result)
        if result.operation.code is Code.MOVE and result.done:
            verify(self, step, result)
        inside, beyond = narrow(step, result.progress)
        done = result.done
        for fault, action in inside:
            self._answered(fault, action, result, done)
            done = 0
        if not beyond:
            return
        if result.status is Status.CLIENT_GONE:
            self.lose_client()
        elif result.status is Status.RETRY:
            now = _clock()  # one time for all, so that they are tried again together
            for fault, action in beyond:
                self.defer(fault, action, now)
        elif len(step.faults) > 1 or step.operation.length > step.region.page_size:
            # What goes wrong may be a neighbour: each page by itself decides.
            for fault, action in beyond:
                at = len(self._steps)
                self.carry_out(fault, alone(action))
                # Merged once more they would fail once more, and so on for ever.
                self._apart += self._steps[at:]
                del self._steps[at:]
        else:
            [(fault, action)] = beyond
            self._refused(fault, action, result)

    def book(self, region: Region, result: Result) -> None:
        """Note which pages of `region` an operation has brought, and how many bytes."""
        code = result.operation.code
        if code is not Code.WAKE:
            self.counters.bytes_done[OUTCOME_OF_CODE[code]] += result.done
        if result.progress and code not in (Code.WRITEPROTECT, Code.WAKE):
            if code is Code.MOVE:
                empty(self, result.operation.src, result.progress)
            first = (result.operation.dst - region.start) // region.page_size
            region.pages.present.add_range(first, first + result.progress // region.page_size)
            if self.held:
                release_held(self)

    @property
    def holds(self) -> bool:
        """Whether there are faults that nobody is going to answer."""
        return bool(self.held)

    def _answered(self, fault: Fault, action: Fill | Wake, result: Result, done: int) -> None:
        code = result.operation.code
        if result.present and not result.done:
            outcome = Outcome.ALREADY_PRESENT
        elif code is Code.COPY and isinstance(action, Zero):
            outcome = Outcome.ZEROED
        else:
            outcome = OUTCOME_OF_CODE[code]
        if outcome not in (Outcome.ALREADY_PRESENT, Outcome.WOKEN):
            self.repeats.placed(fault)
        elif comes_back(self, fault, MAX_REPEATS):
            return
        self.resolve(fault, outcome, done)

    def _refused(self, fault: Fault, action: Fill | Wake, result: Result) -> None:
        """A step for one page failed for good."""
        error = error_of(result)
        code = result.operation.code
        if isinstance(action, Move) and code is Code.MOVE:
            refused(self, fault, action, result)
            return
        if code is Code.COPY and result.error == errno.EFAULT and isinstance(action, Copy):
            # The source lies in memory and cannot be read: its file shrank, or its disk failed.
            self.slow.source_failed(fault, action, errors.SourceFailed(str(error)))
            return
        pages = fault.region.pages
        if code is Code.CONTINUE and result.error == errno.EFAULT and fault.page in pages.removed:
            # Its owner threw it out of the page cache: the thread has to look again.
            self.carry_out(fault, Wake())
            return
        fail(self, fault, error)

    # -- out -----------------------------------------------------------------------------------

    def defer(self, fault: Fault, action: Action, now: int) -> None:
        """An event is in flight: try again when its thread has had time to run."""
        self.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1
        self.ledger.defer(fault, action, now, "an event is in flight (EAGAIN)")
        self.wake()

    def resolve(self, fault: Fault, outcome: Outcome, done: int = 0) -> None:
        """The fault has ended."""
        if not self.ledger.leave(fault):
            return
        if self.failing:
            self.failing.discard((fault.address, fault.kind))
        if self.held:
            self.held.discard(fault)
        latency = _clock() - fault.read_at
        self.counters.resolved(fault.kind, outcome, latency)
        self.hooks.after(Resolved(fault, outcome, latency, done))
        if len(self.ledger) == len(self.held):
            self.wake()

    def woken(self, fault: Fault, outcome: Outcome) -> None:
        """Somebody's work has answered the fault: wake its thread, and see that it stays away."""
        if comes_back(self, fault, MAX_CLAIMS):
            return
        [result] = self.execute([wake_operation(fault)])
        if result.status is Status.CLIENT_GONE:
            self.lose_client()
        elif result.status is Status.FAILED:
            fail(self, fault, error_of(result))
        else:
            self.resolve(fault, outcome)

    def lose_client(self) -> None:
        """The process is gone: so are its faults."""
        self.client_gone = True
        for fault in list(self.ledger.faults.values()):
            self.resolve(fault, Outcome.CLIENT_GONE)
        self.wake()

    def add_step(self, step: Step) -> None:
        """Have a step issued with the next flush."""
        self._steps.append(step)


def alone(action: Fill | Wake) -> Fill | Wake:
    """The same for nothing but the page of the fault."""
    return action if isinstance(action, Wake) else replace(action, extent=1)


def wake_operation(fault: Fault) -> Operation:
    """Let whoever waits for the fault's page try again."""
    return Operation(Code.WAKE, fault.address, fault.region.page_size)
