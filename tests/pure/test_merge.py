"""Many steps: neighbours become one operation, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import PAGE, START, FakeSource, a_fault, a_region
from uffdaemon.actions import Continue, Copy, Fill, Poison, Unprotect, Wake, Zero
from uffdaemon.model.batch import MAX_MERGED, Step, merge, narrow, operation
from uffdaemon.uapi.outcomes import Code, Operation

if TYPE_CHECKING:
    from uffdaemon.model.region import Region

PAGES = 16
# Neighbours, one of which begins where the other ends: merging across them would be wrong.
REGIONS = [a_region(pages=PAGES), a_region(pages=PAGES, start=START + PAGES * PAGE)]
SOURCES = [0x10_0000_0000, 0x10_0000_0000 + 7 * PAGE]
ACTIONS: list[Fill | Wake] = [
    Copy(FakeSource(0)),
    Copy(FakeSource(0), write_protect=True),
    Zero(),
    Poison(),
    Unprotect(),
    Wake(),
]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    region = draw(st.sampled_from(REGIONS))
    first = draw(st.integers(0, PAGES - 1))
    pages = draw(st.integers(1, min(8, PAGES - first)))
    start, length = region.start + first * PAGE, pages * PAGE
    action = draw(st.sampled_from(ACTIONS))
    # A copy brings the bytes that belong there, from one of two sources.
    src = draw(st.sampled_from(SOURCES)) + start - START
    if isinstance(action, Wake):
        asked = Operation(Code.WAKE, start, length)
    else:
        asked = operation(action, region, start, length, src)
    numbers = draw(st.lists(st.integers(first, first + pages - 1), min_size=1, max_size=3))
    faults = [a_fault(region, number) for number in numbers]
    return Step(asked, region, faults, [action] * len(faults))


def effects(some: list[Step]) -> set[tuple[int, Code, int, int]]:
    """What is done to each page: (address, code, mode, where its bytes come from)."""
    found = set()
    for step in some:
        asked = step.operation
        for at in range(0, asked.length, PAGE):
            src = asked.src + at if asked.src else 0
            found.add((asked.dst + at, asked.code, asked.mode, src))
    return found


def waiters(some: list[Step]) -> Counter[tuple[int, int]]:
    """The very faults and actions, by identity."""
    return Counter(
        (id(fault), id(action))
        for step in some
        for fault, action in zip(step.faults, step.actions, strict=True)
    )


def fresh(some: list[Step]) -> list[Step]:
    return [step._replace(faults=[*step.faults], actions=[*step.actions]) for step in some]


@given(st.lists(steps(), max_size=12))
def test_merged_steps_do_what_the_steps_did(some: list[Step]) -> None:
    merged = merge(fresh(some))
    assert effects(merged) == effects(some)
    assert waiters(merged) == waiters(some)
    assert len(merged) <= len(some)
    addresses = [step.operation.dst for step in merged]
    assert addresses == sorted(addresses)
    for step in merged:
        start, end = step.operation.dst, step.operation.dst + step.operation.length
        assert step.region.start <= start < end <= step.region.end
        assert all(start <= fault.address < end for fault in step.faults)
        assert all(fault.region is step.region for fault in step.faults)
        sizes = {
            one.operation.page_size for one in some if one.operation.code is step.operation.code
        }
        assert step.operation.page_size in sizes


def a_copy(first: int, pages: int, source: int, region: Region = REGIONS[0]) -> Step:
    start = region.start + first * PAGE
    action = Copy(FakeSource(0))
    asked = operation(action, region, start, pages * PAGE, source + start - START)
    return Step(asked, region, [a_fault(region, first)], [action])


@pytest.mark.parametrize(
    ("left", "right", "count"),
    [
        (a_copy(0, 2, SOURCES[0]), a_copy(2, 2, SOURCES[0]), 1),
        (a_copy(0, 4, SOURCES[0]), a_copy(2, 4, SOURCES[0]), 1),
        (a_copy(0, 4, SOURCES[0]), a_copy(0, 4, SOURCES[0]), 1),
        (a_copy(0, 4, SOURCES[0]), a_copy(1, 2, SOURCES[0]), 1),
        (a_copy(0, 2, SOURCES[0]), a_copy(3, 2, SOURCES[0]), 2),
        (a_copy(0, 2, SOURCES[0]), a_copy(2, 2, SOURCES[1]), 2),
        (a_copy(0, 4, SOURCES[0]), a_copy(0, 4, SOURCES[1]), 2),
        (a_copy(PAGES - 1, 1, SOURCES[0]), a_copy(0, 1, SOURCES[0], REGIONS[1]), 2),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_only_neighbours_with_bytes_from_one_place_are_joined(
    left: Step, right: Step, count: int, turned: bool
) -> None:
    some = fresh([right, left] if turned else [left, right])
    assert len(merge(some)) == count


def test_operations_of_another_kind_or_mode_stay_apart() -> None:
    region = REGIONS[0]
    actions: list[Fill] = [Zero(), Poison(), Continue(), Continue(write_protect=True), Unprotect()]
    some = [
        Step(operation(action, region, START + at * PAGE, PAGE), region, [], [])
        for at, action in enumerate(actions)
    ]
    assert [step.operation for step in merge(fresh(some))] == [step.operation for step in some]


@given(st.permutations(range(PAGES)), st.sampled_from(ACTIONS))
def test_a_burst_on_neighbours_is_one_operation(order: list[int], action: Fill | Wake) -> None:
    region = REGIONS[0]
    some = []
    for page in order:
        start = START + page * PAGE
        if isinstance(action, Wake):
            asked = Operation(Code.WAKE, start, PAGE)
        else:
            asked = operation(action, region, start, PAGE, SOURCES[0] + page * PAGE)
        some.append(Step(asked, region, [a_fault(region, page)], [action]))
    [step] = merge(some)
    assert (step.operation.dst, step.operation.length) == (START, PAGES * PAGE)
    assert [fault.page for fault in step.faults] == list(range(PAGES))


@given(st.lists(st.integers(1, MAX_MERGED // PAGE * 3 // 5), min_size=2, max_size=12))
def test_what_is_merged_has_a_limit(sizes: list[int]) -> None:
    pages = sum(sizes)
    region = a_region(pages=pages)
    some = []
    at = 0
    for size in sizes:
        asked = operation(Zero(), region, START + at * PAGE, size * PAGE)
        some.append(Step(asked, region, [a_fault(region, at)], [Zero()]))
        at += size
    merged = merge(some)
    lengths = [step.operation.length for step in merged]
    assert sum(lengths) == pages * PAGE
    assert all(length <= MAX_MERGED for length in lengths)
    # None could have taken the next one as well.
    assert all(length + size > MAX_MERGED for length, size in _with_next(merged, some))


def _with_next(merged: list[Step], some: list[Step]) -> list[tuple[int, int]]:
    by_start = {step.operation.dst: step.operation.length for step in some}
    return [
        (left.operation.length, by_start[right.operation.dst]) for left, right in pairwise(merged)
    ]


def test_a_step_longer_than_the_limit_stays_whole_and_absorbs_what_it_covers() -> None:
    pages = MAX_MERGED // PAGE + 10
    region = a_region(pages=pages + 1)
    long = Step(operation(Zero(), region, START, pages * PAGE), region, [a_fault(region)], [Zero()])
    inside = Step(
        operation(Zero(), region, START + PAGE, PAGE), region, [a_fault(region, 1)], [Zero()]
    )
    after = Step(
        operation(Zero(), region, START + pages * PAGE, PAGE),
        region,
        [a_fault(region, pages)],
        [Zero()],
    )
    merged = merge([after, inside, long])
    assert [len(step.faults) for step in merged] == [2, 1]
    assert merged[0].operation == long.operation


def test_nothing_merges_to_nothing() -> None:
    assert merge([]) == []


@given(steps(), st.integers(0, 9))
def test_narrow_splits_by_what_was_reached(step: Step, pages: int) -> None:
    inside, beyond = narrow(step, pages * PAGE)
    reached = step.operation.dst + pages * PAGE
    assert [fault for fault, _ in inside] == [
        each for each in step.faults if each.address < reached
    ]
    assert [fault for fault, _ in beyond] == [
        each for each in step.faults if each.address >= reached
    ]
    assert all(action is step.actions[0] for _, action in inside + beyond)
