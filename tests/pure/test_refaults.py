from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import MISSING, PAGE, START, WP, a_fault, a_region
from uffdaemon.model.refaults import AT_ONCE_NS, MAX_REMEMBERED, Refaults

REGION = a_region(pages=MAX_REMEMBERED + 2)
LIMIT = 3
BEGUN = 10 * AT_ONCE_NS


@pytest.fixture
def repeats() -> Refaults:
    return Refaults()


@given(st.lists(st.integers(0, 2 * AT_ONCE_NS), max_size=20), st.sampled_from((0, 7)))
def test_only_who_comes_back_at_once_is_counted_in_a_row(pauses: list[int], thread: int) -> None:
    repeats = Refaults()
    now = BEGUN
    row = 0
    for pause in pauses:
        fault = a_fault(REGION, 1, thread=thread, read_at=now + pause)
        at_once = row > 0 and pause < AT_ONCE_NS
        assert repeats.back_at_once(fault) == at_once
        row = row + 1 if at_once else 1
        now = fault.read_at + 5
        limit = LIMIT if thread else 16 * LIMIT
        assert repeats.woken(fault, now, LIMIT) == (row if row > limit else 0)


def test_without_thread_ids_it_takes_sixteen_times_as_many(repeats: Refaults) -> None:
    fault = a_fault(REGION, 1, thread=0, read_at=BEGUN)
    counts = [repeats.woken(fault, BEGUN, LIMIT) for _ in range(16 * LIMIT + 1)]
    assert counts == [0] * (16 * LIMIT) + [16 * LIMIT + 1]


def test_threads_pages_and_kinds_are_counted_separately(repeats: Refaults) -> None:
    faults = [
        a_fault(REGION, page, kind, thread=thread, read_at=BEGUN)
        for page in (1, 2)
        for kind in (MISSING, WP)
        for thread in (7, 8)
    ]
    for _ in range(LIMIT):
        assert [repeats.woken(fault, BEGUN, LIMIT) for fault in faults] == [0] * len(faults)
    again = [repeats.woken(fault, BEGUN, LIMIT) for fault in faults]
    assert again == [LIMIT + 1] * len(faults)


def test_a_page_that_was_placed_is_counted_anew_for_all_threads(repeats: Refaults) -> None:
    here, there, elsewhere = (
        a_fault(REGION, page, thread=thread, read_at=BEGUN)
        for page, thread in ((1, 7), (1, 8), (2, 7))
    )
    repeats.placed(here)
    for fault in (here, there, elsewhere):
        repeats.woken(fault, BEGUN, LIMIT)
    repeats.placed(here)
    assert [repeats.back_at_once(fault) for fault in (here, there, elsewhere)] == [
        False,
        False,
        True,
    ]


def test_who_comes_back_to_a_discarded_page_has_every_reason_to(repeats: Refaults) -> None:
    faults = [a_fault(REGION, page, read_at=BEGUN) for page in range(5)]
    for fault in faults:
        repeats.woken(fault, BEGUN, LIMIT)
    repeats.removed(START + PAGE, START + 3 * PAGE)
    assert [repeats.back_at_once(fault) for fault in faults] == [True, False, False, True, True]


def test_what_is_remembered_has_a_limit(repeats: Refaults) -> None:
    faults = [a_fault(REGION, page, read_at=BEGUN) for page in range(MAX_REMEMBERED + 2)]
    for fault in faults:
        repeats.woken(fault, BEGUN, LIMIT)
    assert not repeats.back_at_once(faults[0])
    assert repeats.back_at_once(faults[-1])
