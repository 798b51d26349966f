"""The shipped policies, one by one; test_combinators.py has what puts them together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from functools import partial

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
from tests.pure.policies import nobody
from uffdaemon import actions
from uffdaemon.actions import Action, Fallback, Span
from uffdaemon.model.batch import window
from uffdaemon.model.region import Policy, policy_name
from uffdaemon.policy import (
    Continue,
    CopyFrom,
    MoveOrCopy,
    Poison,
    StrictMove,
    Unprotect,
    ZeroPage,
    moves,
    reach,
)
from uffdaemon.uapi.events import FaultKind

REGION = a_region(pages=16)
SOURCE = FakeSource(16 * PAGE)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ZeroPage(), {MISSING: actions.Zero()}),
        (CopyFrom(SOURCE), {MISSING: actions.Copy(SOURCE)}),
        (CopyFrom(SOURCE, 8, write_protect=True), {MISSING: actions.Copy(SOURCE, 8, 1, True)}),
        (StrictMove(0x5000), {MISSING: actions.Move(0x5000)}),
        (StrictMove(a_region(start=0x60000)), {MISSING: actions.Move(0x60000, length=16 * PAGE)}),
        (MoveOrCopy(0x5000), {MISSING: actions.Move(0x5000, fallback=Fallback())}),
        (
            MoveOrCopy(a_region(start=0x60000), Fallback(copy_pinned=True)),
            {MISSING: actions.Move(0x60000, fallback=Fallback(copy_pinned=True), length=16 * PAGE)},
        ),
        (Continue(), {MINOR: actions.Continue()}),
        (Continue(write_protect=True), {MINOR: actions.Continue(write_protect=True)}),
        (Poison(), {MISSING: actions.Poison(), MINOR: actions.Poison()}),
        (Unprotect(), {WP: actions.Unprotect()}),
    ],
    ids=policy_name,
)
@pytest.mark.parametrize("kind", FaultKind)
def test_what_each_policy_returns(
    policy: Policy, expected: dict[FaultKind, Action], kind: FaultKind
) -> None:
    fault = a_fault(REGION, 3, kind)
    assert policy(fault) == expected.get(kind)
    assert reach(policy, fault) is None


def test_a_strict_move_never_falls_back() -> None:
    answer = StrictMove(0x5000)(a_fault(REGION))
    assert isinstance(answer, actions.Move)
    assert answer.fallback is None


def test_one_action_serves_all_faults_of_a_source() -> None:
    policy = CopyFrom(SOURCE)
    assert policy(a_fault(REGION, 1)) is policy(a_fault(REGION, 2))
    assert policy == CopyFrom(SOURCE)
    assert policy != CopyFrom(SOURCE, 4096)
    assert repr(policy) == f"CopyFrom(source={SOURCE}, offset=0, write_protect=False)"


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (CopyFrom(SOURCE), "source"),
        (StrictMove(0x5000), "source"),
        (MoveOrCopy(0x5000), "fallback"),
        (Continue(), "write_protect"),
        (ZeroPage(), "anything"),
        (Poison(), "anything"),
        (Unprotect(), "anything"),
    ],
    ids=policy_name,
)
def test_shipped_policies_do_not_change(policy: Policy, field: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(policy, field, None)
    assert isinstance(hash(policy), int)


def test_only_moves_move() -> None:
    staying: list[Policy] = [ZeroPage(), CopyFrom(SOURCE), Continue(), Poison(), Unprotect()]
    assert moves(StrictMove(0x5000))
    # Where pages cannot be moved, as in another process, it copies.
    assert not moves(MoveOrCopy(0x5000))
    assert not any(map(moves, staying))
    assert not moves(nobody)


def test_policies_are_called_by_their_name_or_their_repr() -> None:
    assert policy_name(nobody) == "nobody"
    assert policy_name(ZeroPage()) == "ZeroPage()"
    assert "partial" in policy_name(partial(nobody))

    odd = partial(nobody)
    vars(odd)["__qualname__"] = 3
    assert policy_name(odd) == repr(odd)


@given(st.integers(0, 15), st.sampled_from((PAGE, HUGE)))
def test_a_fault_knows_its_place(page: int, page_size: int) -> None:
    fault = a_fault(a_region(pages=16, page_size=page_size), page, UNKNOWN)
    assert fault.page == page
    assert fault.offset == page * page_size
    assert fault.address == START + page * page_size


@given(st.integers(0, 15), st.integers(1, 40), st.integers(0, 16), st.integers(0, 16))
def test_windows_are_aligned_from_the_regions_start_and_cut(
    page: int, pages: int, low: int, high: int
) -> None:
    low, high = min(low, page), max(high, page + 1)
    span = window(a_fault(REGION, page), pages, low * PAGE, high * PAGE)
    first = page - page % pages
    assert span.offset == max(first, low) * PAGE
    assert span.offset + span.length == min(first + pages, high) * PAGE


@given(st.integers(0, 15), st.integers(1, 40), st.integers(0, 16 * PAGE), st.integers(0, 20 * PAGE))
def test_limits_are_those_of_the_pages_that_begin_inside(
    page: int, pages: int, low: int, high: int
) -> None:
    low, high = min(low, page * PAGE), max(high, page * PAGE + 1)
    span = window(a_fault(REGION, page), pages, low, high)
    first = page - page % pages
    expected = [each for each in range(first, min(first + pages, 16)) if low <= each * PAGE < high]
    assert span == Span(expected[0] * PAGE, len(expected) * PAGE)
