"""The rules one by one; test_ledger_model.py has all of them at once."""

from __future__ import annotations

import pytest

from tests.pure.fakes import MINOR, MISSING, WP, a_fault, a_region
from uffdaemon.actions import Continue, Hold, Poison, Zero
from uffdaemon.model.ledger import FIRST_DELAY_NS, MAX_DELAY_NS, Deferred, Ledger, Waiting

REGION = a_region(pages=64, name="heap")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_a_second_thread_joins_the_fault_that_is_open(ledger: Ledger) -> None:
    first = a_fault(REGION, 3, thread=11)
    assert ledger.enter(first)
    assert not ledger.enter(a_fault(REGION, 3, thread=12, write=True))
    assert not ledger.enter(a_fault(REGION, 3, thread=12))
    assert not ledger.enter(a_fault(REGION, 3, thread=11))
    assert len(ledger) == 1
    assert ledger.open_fault(first, 0).threads == (11, 12)


def test_kinds_of_one_page_never_merge(ledger: Ledger) -> None:
    faults = [a_fault(REGION, 3, kind) for kind in (MISSING, WP, MINOR)]
    assert all(ledger.enter(fault) for fault in faults)
    assert ledger.leave(faults[0])
    assert [ledger.is_open(fault) for fault in faults] == [False, True, True]


def test_a_fault_leaves_once(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    assert not ledger.leave(fault)
    ledger.enter(fault)
    assert ledger.leave(fault)
    assert not ledger.leave(fault)
    assert len(ledger) == 0


def test_protection_is_remembered_as_long_as_the_fault_is_open(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    ledger.protect(fault)  # it is not open: nothing happens
    ledger.enter(fault)
    record = ledger.find(fault)
    assert record is not None
    assert not record.protects
    ledger.protect(fault)
    assert record.protects


def test_a_later_fault_on_the_page_is_another_one(ledger: Ledger) -> None:
    earlier, later = a_fault(REGION, 1, thread=1), a_fault(REGION, 1, thread=2)
    ledger.enter(earlier)
    ledger.enter(a_fault(REGION, 1, thread=9))
    ledger.count_failure(earlier)
    ledger.defer(earlier, Zero(), 0, "busy")
    ledger.defer(earlier, Zero(), 0, "busy")
    ledger.leave(earlier)
    ledger.enter(later)
    assert not ledger.is_open(earlier)
    assert not ledger.leave(earlier)
    assert ledger.is_open(later)
    seen = ledger.open_fault(later, 0)
    assert (seen.threads, seen.waiting, seen.reason) == ((2,), Waiting.DECISION, "")
    assert ledger.count_failure(later) == 1
    assert ledger.defer(later, Zero(), 0, "busy") == FIRST_DELAY_NS


def test_what_was_deferred_for_a_fault_that_left_is_not_done_to_a_later_one(
    ledger: Ledger,
) -> None:
    earlier, later = a_fault(REGION, 1), a_fault(REGION, 1, read_at=5)
    ledger.enter(earlier)
    ledger.defer_until(earlier, Zero(), 100, "busy")
    ledger.leave(earlier)
    assert ledger.next_retry() is None
    ledger.enter(later)
    ledger.defer_until(later, Poison(), 200, "busy")
    assert ledger.next_retry() == 200
    assert ledger.pop_expired(199) == []
    assert ledger.pop_expired(200) == [Deferred(later, Poison())]


def test_the_last_deferral_counts(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    ledger.enter(fault)
    ledger.defer_until(fault, Continue(), 100, "busy")
    ledger.defer_until(fault, Zero(), 300, "the page was discarded")
    assert ledger.pop_expired(200) == []
    assert ledger.pop_expired(300) == [Deferred(fault, Zero())]
    assert ledger.pop_expired(1000) == []


def test_one_that_waits_for_something_else_by_now_does_not_come_back(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    ledger.enter(fault)
    ledger.defer(fault, Zero(), 0, "busy")
    ledger.wait(fault, Waiting.NOBODY, "held")
    assert ledger.pop_expired(MAX_DELAY_NS) == []
    assert ledger.is_open(fault)


def test_nothing_is_noted_about_a_fault_that_has_left(ledger: Ledger) -> None:
    gone, fault = a_fault(REGION), a_fault(REGION)
    ledger.wait(gone, Waiting.SOURCE, "disk")
    ledger.defer_until(gone, Hold(), 5, "busy")
    assert ledger.defer(gone, Hold(), 0, "busy") == FIRST_DELAY_NS
    assert ledger.defer(gone, Hold(), 0, "busy") == FIRST_DELAY_NS
    assert ledger.count_failure(gone) == 1
    assert ledger.count_failure(gone) == 1
    assert ledger.next_retry() is None
    ledger.enter(fault)
    assert ledger.open_fault(fault, 0).waiting is Waiting.DECISION


def test_delays_double_up_to_the_cap(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    ledger.enter(fault)
    delays = []
    now = 0
    for _ in range(40):
        delay = ledger.defer(fault, Zero(), now, "busy")
        assert ledger.pop_expired(now + delay - 1) == []
        now += delay
        assert ledger.pop_expired(now) == [Deferred(fault, Zero())]
        delays.append(delay)
    assert delays[0] == FIRST_DELAY_NS
    doubled = [min(delay * 2, MAX_DELAY_NS) for delay in delays]
    assert doubled[:-1] == delays[1:]
    assert delays[-1] == MAX_DELAY_NS


def test_the_longest_waiting_comes_first(ledger: Ledger) -> None:
    faults = [a_fault(REGION, page) for page in range(4)]
    for fault, due in zip(faults, (30, 10, 20, 10), strict=True):
        ledger.enter(fault)
        ledger.defer_until(fault, Zero(), due, "busy")
    assert [entry.fault.page for entry in ledger.pop_expired(30)] == [1, 3, 2, 0]


def test_failures_are_counted_for_each_fault(ledger: Ledger) -> None:
    one, other = a_fault(REGION, 1), a_fault(REGION, 2)
    ledger.enter(one)
    ledger.enter(other)
    assert [ledger.count_failure(one) for _ in range(3)] == [1, 2, 3]
    assert ledger.count_failure(other) == 1


def test_inside_is_by_address_with_the_end_left_out(ledger: Ledger) -> None:
    faults = [a_fault(REGION, page, kind) for page in (1, 2, 3) for kind in (MISSING, WP)]
    for fault in faults:
        ledger.enter(fault)
    found = ledger.inside(faults[2].address, faults[4].address)
    assert found == faults[2:4]
    assert ledger.inside(faults[2].address + 1, faults[4].address) == []


def test_a_waiting_thread_is_described_in_one_line(ledger: Ledger) -> None:
    older = a_fault(REGION, 2, thread=0, read_at=0)
    newer = a_fault(REGION, 1, WP, thread=7, write=True, read_at=500_000_000)
    ledger.enter(newer)
    ledger.enter(older)
    ledger.enter(a_fault(REGION, 2, thread=8))
    ledger.wait(newer, Waiting.SOURCE, "FileSource('image')")
    first, second = map(str, ledger.open_faults(2_000_000_000))
    assert first == (
        f"unknown thread, thread 8: missing access at {older.address:#x} in heap, 2.000000 s, "
        "waits for decision"
    )
    assert second == (
        f"thread 7: write_protect write at {newer.address:#x} in heap, 1.500000 s, "
        "waits for source: FileSource('image')"
    )


def test_a_held_fault_that_is_acted_upon_is_held_no_longer(ledger: Ledger) -> None:
    held, waiting = a_fault(REGION, 1), a_fault(REGION, 2)
    for fault in (held, waiting):
        ledger.enter(fault)
    ledger.wait(held, Waiting.NOBODY, "its source failed")
    ledger.wait(waiting, Waiting.SOURCE, "disk")
    assert ledger.held_faults() == [held]
    for fault in (held, waiting):
        record = ledger.at(fault.address, fault.kind)
        assert record is not None
        assert record is ledger.find(fault)
        ledger.reopen(record)
    assert ledger.held_faults() == []
    assert ledger.open_fault(held, 0).waiting is Waiting.DECISION
    assert ledger.open_fault(waiting, 0).waiting is Waiting.SOURCE


def test_a_held_fault_that_leaves_is_not_counted_as_held(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    ledger.enter(fault)
    ledger.wait(fault, Waiting.NOBODY, "held")
    assert ledger.held == 1
    ledger.leave(fault)
    assert ledger.held == 0


def test_shortages_are_counted_from_the_first_one_on(ledger: Ledger) -> None:
    fault = a_fault(REGION)
    assert ledger.count_shortage(fault, 5) == (1, 5)  # it is not open
    ledger.enter(fault)
    assert ledger.count_shortage(fault, 5) == (1, 5)
    assert ledger.count_shortage(fault, 9) == (2, 5)
    entry = ledger.open_fault(fault, 0)
    assert entry.attempts == 2
    assert str(entry).endswith("; attempts: 2")
