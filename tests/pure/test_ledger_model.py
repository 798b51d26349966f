"""The ledger against a plain description of what it promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.pure.fakes import MINOR, MISSING, PAGE, WP, a_fault, a_region
from uffdaemon.actions import Action, Hold
from uffdaemon.model.ledger import FIRST_DELAY_NS, MAX_DELAY_NS, Key, Ledger, Waiting

if TYPE_CHECKING:
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import FaultKind

REGION = a_region(pages=8)
PAGES = st.integers(0, 3)
KINDS = st.sampled_from((MISSING, MINOR, WP))
OTHERS = st.sampled_from([why for why in Waiting if why is not Waiting.TIMER])
TIMES = st.integers(0, MAX_DELAY_NS)


@dataclass
class Entry:
    fault: Fault
    threads: list[int]
    waiting: tuple[Waiting, str] = (Waiting.DECISION, "")
    due: tuple[int, int] | None = None  # when, and which deferral it was
    action: Action = field(default_factory=Hold)
    deferrals: int = 0
    failures: int = 0


class LedgerKeepsItsRules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.open: dict[Key, Entry] = {}
        self.left: list[Fault] = []
        self.entered = 0
        self.now = 0
        self.order = 0

    def some(self, data: st.DataObject) -> Entry:
        return data.draw(st.sampled_from(list(self.open.values())))

    def defer_model(self, entry: Entry, due: int, action: Action) -> None:
        self.order += 1
        entry.due = due, self.order
        entry.action = action
        entry.waiting = Waiting.TIMER, f"deferral {self.order}"

    # -- in and out ----------------------------------------------------------------------------

    @rule(page=PAGES, kind=KINDS, thread=st.integers(0, 3), write=st.booleans())
    def enter(self, page: int, kind: FaultKind, thread: int, write: bool) -> None:
        fault = a_fault(REGION, page, kind, thread=thread, write=write, read_at=self.now)
        known = self.open.get((fault.address, kind))
        assert self.ledger.enter(fault) == (known is None)
        if known is None:
            self.open[fault.address, kind] = Entry(fault, [thread])
            self.entered += 1
        elif thread not in known.threads:
            known.threads.append(thread)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = self.some(data)
        assert self.ledger.leave(entry.fault)
        del self.open[entry.fault.address, entry.fault.kind]
        self.left.append(entry.fault)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def whoever_left_is_gone(self, data: st.DataObject) -> None:
        fault = data.draw(st.sampled_from(self.left))
        assert not self.ledger.is_open(fault)
        assert not self.ledger.leave(fault)
        self.ledger.wait(fault, Waiting.WORK, "too late")
        self.ledger.defer(fault, Hold("too late"), self.now, "too late")
        self.ledger.defer_until(fault, Hold("too late"), self.now, "too late")
        self.ledger.count_failure(fault)

    @rule(first=PAGES, pages=PAGES)
    def a_range_goes_away(self, first: int, pages: int) -> None:
        start = REGION.start + first * PAGE
        gone = self.ledger.inside(start, start + pages * PAGE)
        expected = [key for key in self.open if start <= key[0] < start + pages * PAGE]
        assert [(fault.address, fault.kind) for fault in gone] == expected
        for fault in gone:
            assert self.ledger.leave(fault)
            del self.open[fault.address, fault.kind]
            self.left.append(fault)

    # -- waiting -------------------------------------------------------------------------------

    @precondition(lambda self: self.open)
    @rule(data=st.data(), waiting=OTHERS, reason=st.sampled_from(("", "because")))
    def wait(self, data: st.DataObject, waiting: Waiting, reason: str) -> None:
        entry = self.some(data)
        self.ledger.wait(entry.fault, waiting, reason)
        entry.waiting = waiting, reason
        entry.due = None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def defer(self, data: st.DataObject) -> None:
        entry = self.some(data)
        delay = min(FIRST_DELAY_NS << entry.deferrals, MAX_DELAY_NS)
        entry.deferrals += 1
        action = Hold(f"action {self.order + 1}")
        self.defer_model(entry, self.now + delay, action)
        assert self.ledger.defer(entry.fault, action, self.now, entry.waiting[1]) == delay

    @precondition(lambda self: self.open)
    @rule(data=st.data(), after=TIMES)
    def defer_until(self, data: st.DataObject, after: int) -> None:
        entry = self.some(data)
        action = Hold(f"action {self.order + 1}")
        self.defer_model(entry, self.now + after, action)
        self.ledger.defer_until(entry.fault, action, self.now + after, entry.waiting[1])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def count_failure(self, data: st.DataObject) -> None:
        entry = self.some(data)
        entry.failures += 1
        assert self.ledger.count_failure(entry.fault) == entry.failures

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        entry = self.some(data)
        record = self.ledger.at(entry.fault.address, entry.fault.kind)
        assert record is not None
        self.ledger.reopen(record)
        if entry.waiting[0] is Waiting.NOBODY:
            entry.waiting = Waiting.DECISION, ""

    @rule(passed=st.one_of(st.just(FIRST_DELAY_NS), TIMES), again=st.booleans())
    def time_passes(self, passed: int, again: bool) -> None:
        self.now += passed
        due = [each for each in self.open.values() if each.due and each.due[0] <= self.now]
        due.sort(key=lambda each: each.due or (0, 0))
        found = self.ledger.pop_expired(self.now)
        assert [(each.fault, each.action) for each in found] == [
            (entry.fault, entry.action) for entry in due
        ]
        for entry in due:
            assert self.ledger.is_open(entry.fault)
            entry.due = None
            entry.waiting = Waiting.DECISION, ""
        if again:
            assert self.ledger.pop_expired(self.now) == []

    # -- what is always true -------------------------------------------------------------------

    @invariant()
    def nobody_is_lost_and_all_is_told(self) -> None:
        assert len(self.ledger) == len(self.open) == self.entered - len(self.left)
        assert [(fault.address, fault.kind) for fault in self.ledger] == list(self.open)
        held = [e.fault for e in self.open.values() if e.waiting[0] is Waiting.NOBODY]
        assert self.ledger.held_faults() == held
        assert self.ledger.held == len(held)
        seen = self.ledger.open_faults(self.now)
        assert [one.age for one in seen] == sorted((one.age for one in seen), reverse=True)
        for one in seen:
            entry = self.open[one.fault.address, one.fault.kind]
            assert one.fault is entry.fault
            assert self.ledger.is_open(one.fault)
            assert list(one.threads) == entry.threads
            assert one.age == self.now - one.fault.read_at >= 0
            assert (one.waiting, one.reason) == entry.waiting

    @invariant()
    def the_timer_is_set_for_the_first_that_is_due(self) -> None:
        times = [entry.due[0] for entry in self.open.values() if entry.due is not None]
        assert self.ledger.next_retry() == min(times, default=None)


TestLedgerKeepsItsRules = LedgerKeepsItsRules.TestCase
TestLedgerKeepsItsRules.settings = settings(max_examples=150, stateful_step_count=40)
