"""Policies made of policies: who is asked, how wide the answer is, and how far it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import (
    HUGE,
    MINOR,
    MISSING,
    PAGE,
    START,
    UNKNOWN,
    WP,
    FakeSource,
    a_fault,
    a_region,
)
from tests.pure.policies import (
    KINDS,
    PAGES,
    LikeZeroPage,
    Mine,
    Striped,
    alone,
    answers,
    for_single_pages,
    nobody,
    policies,
)
from uffdaemon import actions
from uffdaemon.actions import Action, Fill, Hold, Span
from uffdaemon.errors import InvalidRange
from uffdaemon.model.batch import target
from uffdaemon.model.region import Fault, Policy, policy_name
from uffdaemon.policy import (
    ByKind,
    ByRange,
    Continue,
    CopyFrom,
    FaultAround,
    FirstOf,
    Poison,
    Reach,
    StrictMove,
    Unprotect,
    ZeroPage,
    moves,
    reach,
)

if TYPE_CHECKING:
    from uffdaemon.uapi.events import FaultKind

REGION = a_region(pages=PAGES)


def held(fault: Fault) -> Action | None:
    del fault
    return Hold("held")


def extent_at(policy: Policy, page: int, kind: FaultKind = MISSING) -> object:
    action = policy(a_fault(REGION, page, kind))
    assert isinstance(action, Fill)
    return action.extent


# -- properties --------------------------------------------------------------------------------


@given(st.data(), st.sampled_from((PAGE, HUGE)), KINDS)
def test_windows_and_spans_stop_where_another_policy_decides(
    data: st.DataObject, page_size: int, kind: FaultKind
) -> None:
    policy = data.draw(policies(page_size))
    assert moves(policy) == moves(for_single_pages(policy))
    region = a_region(policy, PAGES, page_size=page_size)
    by_page = answers(policy, region, kind)
    for page, expected in enumerate(by_page):
        fault = a_fault(region, page, kind)
        action = policy(fault)
        assert alone(action) == expected
        if isinstance(action, Fill):
            start, length = target(fault, action)
            first = (start - START) // page_size
            window = by_page[first : first + length // page_size]
            assert window == [expected] * len(window)
        limits = reach(policy, fault)
        low, high = (0, region.length) if limits is None else limits
        assert low <= fault.offset < high
        inside = [by_page[each] for each in range(PAGES) if low <= each * page_size < high]
        assert inside == [expected] * len(inside)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, PAGES - 1))
def test_fault_around_fills_its_whole_window(inner: int, outer: int, page: int) -> None:
    fault = a_fault(REGION, page)
    for policy in (FaultAround(ZeroPage(), inner), FaultAround(FaultAround(ZeroPage(), inner), 1)):
        action = policy(fault)
        assert action == actions.Zero(inner)
    # Who says how much to fill has said it.
    twice = FaultAround(FaultAround(ZeroPage(), inner), outer)
    assert twice(fault) == actions.Zero(inner if inner > 1 else outer)


# -- first that answers ------------------------------------------------------------------------


def test_the_first_policy_with_an_action_wins_and_no_later_one_is_called() -> None:
    asked: list[str] = []

    def asks(name: str, answer: Action | None) -> Policy:
        def policy(fault: Fault) -> Action | None:
            asked.append(name)
            return answer

        return policy

    policy = FirstOf(asks("a", None), asks("b", Hold("b")), asks("c", Hold("c")))
    assert policy(a_fault(REGION)) == Hold("b")
    assert asked == ["a", "b"]
    assert FirstOf(nobody, nobody)(a_fault(REGION)) is None
    assert FirstOf()(a_fault(REGION)) is None


def test_no_policy_is_called_twice_for_one_fault() -> None:
    asked: list[int] = []

    def mine(fault: Fault) -> Action | None:
        asked.append(fault.page)
        return actions.Zero()

    inner = FirstOf(nobody, ByKind(missing=FirstOf(FirstOf(mine))))
    policy = FaultAround(ByRange([(0, REGION.length, FaultAround(inner, 2))]), 4)
    assert policy(a_fault(REGION, 5)) == actions.Zero(Span(4 * PAGE, 2 * PAGE))
    assert asked == [5]


def test_a_window_ends_where_an_earlier_policy_would_decide() -> None:
    before = ByRange([(0, 4 * PAGE, held), (12 * PAGE, 4 * PAGE, held)])
    assert extent_at(FirstOf(before, FaultAround(ZeroPage(), 16)), 5) == Span(4 * PAGE, 8 * PAGE)
    ranged = ByRange([(0, PAGES * PAGE, FaultAround(ZeroPage(), 16))])
    assert extent_at(ranged, 5) == Span(0, 16 * PAGE)
    for page in (4, 5, 11):
        assert extent_at(FirstOf(before, ranged), page) == Span(4 * PAGE, 8 * PAGE)
    assert extent_at(FirstOf(before, Mine(Span(0, 16 * PAGE))), 5) == Span(4 * PAGE, 8 * PAGE)


def test_a_span_that_needs_no_cut_stays_the_very_action() -> None:
    action = actions.Zero(Span(4 * PAGE, 2 * PAGE))

    def mine(fault: Fault) -> Action | None:
        return action

    policy = FirstOf(ByRange([(0, 4 * PAGE, held)]), mine)
    assert policy(a_fault(REGION, 5)) is action


def test_a_span_outside_the_fault_is_refused() -> None:
    policy = FirstOf(ByRange([(0, 4 * PAGE, held)]), Mine(Span(0, 8 * PAGE)))
    assert extent_at(policy, 9) == Span(0, 8 * PAGE)
    action = policy(a_fault(REGION, 9))
    assert isinstance(action, Fill)
    with pytest.raises(InvalidRange, match="does not hold the fault"):
        target(a_fault(REGION, 9), action)


def test_windows_end_with_the_region_even_if_ranges_go_on() -> None:
    beyond = ByRange([(100 * PAGE, PAGE, held)])
    policy = FirstOf(beyond, FaultAround(ZeroPage(), 1000))
    assert extent_at(policy, 5) == Span(0, PAGES * PAGE)


def test_ranges_within_pages_still_give_windows_of_pages() -> None:
    policy = FirstOf(ByRange([(0, PAGE + 904, held)]), FaultAround(ZeroPage(), 4))
    assert policy(a_fault(REGION, 1)) == Hold("held")
    assert extent_at(policy, 2) == Span(2 * PAGE, 2 * PAGE)
    whole = ByRange([(100, 3 * PAGE, FaultAround(ZeroPage(), 16))])
    assert whole(a_fault(REGION, 0)) is None
    assert extent_at(whole, 1) == Span(PAGE, 3 * PAGE)


# -- by kind and by range ----------------------------------------------------------------------


def test_by_kind() -> None:
    policy = ByKind(missing=ZeroPage(), write_protect=FaultAround(Unprotect(), 4))
    assert policy(a_fault(REGION, 0, MISSING)) == actions.Zero()
    assert policy(a_fault(REGION, 0, WP)) == actions.Unprotect(4)
    assert policy(a_fault(REGION, 0, MINOR)) is None
    assert policy(a_fault(REGION, 0, UNKNOWN)) is None
    assert reach(policy, a_fault(REGION, 0, UNKNOWN)) is None


def test_by_kind_reaches_as_far_as_the_one_for_the_kind() -> None:
    policy = ByKind(missing=Striped(3), minor=Continue())
    assert reach(policy, a_fault(REGION, 4)) == (3 * PAGE, 6 * PAGE)
    assert reach(policy, a_fault(REGION, 4, MINOR)) is None
    assert extent_at(FaultAround(policy, 8), 4) == Span(3 * PAGE, 3 * PAGE)


def test_by_range_whatever_the_order_they_are_given_in() -> None:
    policy = ByRange([(8 * PAGE, 2 * PAGE, Poison()), (2 * PAGE, 2 * PAGE, ZeroPage())])
    found = [policy(a_fault(REGION, page)) for page in range(12)]
    zero, poison = actions.Zero(), actions.Poison()
    assert found == [None] * 2 + [zero] * 2 + [None] * 4 + [poison] * 2 + [None] * 2
    limits = [reach(policy, a_fault(REGION, page)) for page in (0, 2, 5, 9, 11)]
    borders: list[Reach] = [
        (low * PAGE, high * PAGE) for low, high in ((0, 2), (2, 4), (4, 8), (8, 10), (10, PAGES))
    ]
    assert limits == borders


def test_without_ranges_there_is_no_action() -> None:
    policy = ByRange([])
    assert policy(a_fault(REGION)) is None
    assert reach(policy, a_fault(REGION)) == (0, REGION.length)


@pytest.mark.parametrize(
    ("ranges", "offender"),
    [
        ([(0, 0)], "0x0, 0 bytes"),
        ([(0, -1)], "0x0, -1 bytes"),
        ([(-PAGE, PAGE)], f"-{PAGE:#x}, {PAGE} bytes"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], f"{PAGE:#x}, {PAGE} bytes"),
        ([(PAGE, PAGE), (0, 2 * PAGE)], f"{PAGE:#x}, {PAGE} bytes"),
        ([(0, PAGE), (0, PAGE)], f"0x0, {PAGE} bytes"),
    ],
)
def test_bad_ranges_are_named(ranges: list[tuple[int, int]], offender: str) -> None:
    with pytest.raises(InvalidRange, match=offender) as caught:
        ByRange([(offset, length, nobody) for offset, length in ranges])
    assert "for nobody" in str(caught.value)


# -- fault-around ------------------------------------------------------------------------------


def test_fault_around_widens_only_what_fills() -> None:
    assert FaultAround(held, 8)(a_fault(REGION)) == Hold("held")
    assert FaultAround(nobody, 8)(a_fault(REGION)) is None
    assert extent_at(FaultAround(Mine(Span(0, 2 * PAGE)), 8), 1) == Span(0, 2 * PAGE)
    assert extent_at(FaultAround(Mine(3), 8), 1) == 3


def test_fault_around_makes_one_action_for_one_action() -> None:
    source = FakeSource(PAGES * PAGE)
    policy = FaultAround(CopyFrom(source), 8)
    assert policy(a_fault(REGION, 1)) is policy(a_fault(REGION, 20))
    changing = FaultAround(lambda fault: actions.Zero() if fault.page else Hold(), 8)
    assert changing(a_fault(REGION, 0)) == Hold()
    assert changing(a_fault(REGION, 1)) == actions.Zero(8)
    assert changing(a_fault(REGION, 0)) == Hold()


@pytest.mark.parametrize("pages", [0, -1])
def test_fault_around_of_nothing_is_refused(pages: int) -> None:
    with pytest.raises(InvalidRange, match=f"fault-around of {pages} pages"):
        FaultAround(ZeroPage(), pages)


# -- what they are -----------------------------------------------------------------------------


def test_who_contains_a_move_moves() -> None:
    move, stay = StrictMove(0x5000), ZeroPage()
    assert moves(FirstOf(stay, move))
    assert moves(ByKind(missing=move))
    assert moves(ByRange([(0, PAGE, move)]))
    assert moves(FaultAround(move, 2))
    others = [FirstOf(stay), ByKind(missing=stay), ByRange([(0, PAGE, stay)]), FaultAround(stay, 2)]
    assert not any(map(moves, others))


def test_names_say_what_is_inside() -> None:
    assert policy_name(FirstOf(nobody, ZeroPage())) == "FirstOf(nobody, ZeroPage())"
    assert policy_name(ByKind(missing=nobody, write_protect=Unprotect())) == (
        "ByKind(missing=nobody, write_protect=Unprotect())"
    )
    assert policy_name(ByRange([(PAGE, PAGE, nobody)])) == f"ByRange({PAGE:#x}+{PAGE:#x}: nobody)"
    assert policy_name(FaultAround(nobody, 16)) == "FaultAround(nobody, 16)"


def test_a_subclass_is_asked_by_its_own_methods() -> None:
    class Never(FirstOf):
        def __call__(self, fault: Fault) -> Action | None:
            return None

    class Near(FirstOf):
        def reach(self, fault: Fault) -> Reach:
            return fault.offset, fault.offset + 2 * PAGE

    assert FirstOf(Never(ZeroPage()), Poison())(a_fault(REGION)) == actions.Poison()
    assert FirstOf(LikeZeroPage(), Poison())(a_fault(REGION)) != actions.Poison()
    assert extent_at(FaultAround(Near(ZeroPage()), 8), 2) == Span(2 * PAGE, 2 * PAGE)
