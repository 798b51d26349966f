"""Rules say what the policy says, or nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import HUGE, MINOR, MISSING, PAGE, FakeSource, a_fault, a_region
from tests.pure.policies import (
    PAGES,
    LikeZeroPage,
    Mine,
    Striped,
    alone,
    answers,
    nobody,
    plain_leaves,
    policies,
)
from uffdaemon.actions import Action, Copy, Fill, Move
from uffdaemon.errors import SourceTooShort
from uffdaemon.model.batch import operation, target
from uffdaemon.names import name_of
from uffdaemon.policy import (
    ByKind,
    ByRange,
    Continue,
    CopyFrom,
    FaultAround,
    FirstOf,
    MoveOrCopy,
    Poison,
    StrictMove,
    Unprotect,
    ZeroPage,
)
from uffdaemon.rules.lowering import Rule, gap, rules_of
from uffdaemon.uapi.events import FaultFlags
from uffdaemon.uapi.outcomes import CONTINUE_WRITE_PROTECT, COPY_WRITE_PROTECT, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.model.region import Fault, Policy, Region

BASE = 0x10_0000_0000
SOURCE = FakeSource(PAGES * PAGE, BASE)
WHOLE = PAGES * PAGE
ADDRESSES = 1 << 64


class Somewhere(NamedTuple):
    """Memory to move from."""

    start: int
    length: int


def rules_for(policy: Policy, page_size: int = PAGE) -> list[Rule]:
    return rules_of(a_region(policy, PAGES, page_size=page_size))


def in_python(region: Region, page: int, rule: Rule) -> tuple[int, int, tuple[int, ...]]:
    """What the handler would issue for a fault: (from, to, the rest)."""
    fault = a_fault(region, page, rule.kind)
    action = region.policy(fault)
    assert isinstance(action, Fill)
    start, length = target(fault, action)
    offset = start - region.start
    src: int | None = 0
    if isinstance(action, Copy):
        src = action.source.address(action.offset + offset, length)
    elif isinstance(action, Move):
        src = action.source + offset
    assert src is not None
    asked = operation(action, region, start, length, src)
    return offset, offset + length, (asked.code, asked.mode, src - offset if src else 0)


def in_c(region: Region, page: int, rule: Rule) -> tuple[int, int, tuple[int, ...]]:
    """What rules.c makes of the same fault while no page of the region is present."""
    offset = page * region.page_size
    low = max(offset - offset % rule.window, rule.start)
    high = min(offset - offset % rule.window + rule.window, rule.end)
    removed, size = region.pages.removed, region.page_size
    low = max([low, *(n * size + size for n in range(page) if n in removed)])
    high = min([high, *(n * size for n in range(page + 1, PAGES) if n in removed)])
    return low, high, (rule.code, rule.mode, rule.source - rule.start if rule.source else 0)


@given(
    st.data(),
    st.sampled_from((PAGE, HUGE)),
    st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4)), max_size=3),
)
def test_rules_do_what_the_policy_says(
    data: st.DataObject, page_size: int, removed: list[tuple[int, int]]
) -> None:
    policy = data.draw(policies(page_size, plain_leaves(page_size)) | policies(page_size))
    region = a_region(policy, PAGES, page_size=page_size)
    for first, pages in removed:
        region.pages.remove(first, min(first + pages, PAGES))
    rules = rules_of(region)

    for rule in rules:
        assert 0 <= rule.start < rule.end <= region.length
        assert rule.start % page_size == rule.end % page_size == rule.window % page_size == 0
    # C finds them by (flags, start).
    keys = [(rule.flags, rule.start) for rule in rules]
    assert keys == sorted(keys)
    for left, right in pairwise(rules):
        assert left.kind is not right.kind or left.end <= right.start

    by_page = {kind: answers(region.policy, region, kind) for kind in (MISSING, MINOR)}
    for rule in rules:
        for page in range(rule.start // page_size, rule.end // page_size):
            if page in region.pages.removed:
                continue  # zeros, or the policy once more, alone
            action = by_page[rule.kind][page]
            assert alone(region.policy(a_fault(region, page, rule.kind))) == action
            low, high, issued = in_c(region, page, rule)
            least_low, least_high, asked = in_python(region, page, rule)
            assert issued == asked
            # C may fill more: it knows for one kind of fault where others would answer.
            assert low <= least_low < least_high <= high
            window = range(low // page_size, high // page_size)
            assert all(by_page[rule.kind][other] == action for other in window)


# -- simple policies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ZeroPage(), [Rule(MISSING, 0, WHOLE, Code.ZEROPAGE)]),
        (CopyFrom(SOURCE), [Rule(MISSING, 0, WHOLE, Code.COPY, 0, BASE)]),
        (
            CopyFrom(SOURCE, write_protect=True),
            [Rule(MISSING, 0, WHOLE, Code.COPY, COPY_WRITE_PROTECT, BASE)],
        ),
        (CopyFrom(SOURCE, 2 * PAGE), [Rule(MISSING, 0, 22 * PAGE, Code.COPY, 0, BASE + 2 * PAGE)]),
        (CopyFrom(SOURCE, 1), [Rule(MISSING, 0, 23 * PAGE, Code.COPY, 0, BASE + 1)]),
        (Continue(), [Rule(MINOR, 0, WHOLE, Code.CONTINUE)]),
        (
            Continue(write_protect=True),
            [Rule(MINOR, 0, WHOLE, Code.CONTINUE, CONTINUE_WRITE_PROTECT)],
        ),
        (StrictMove(BASE), [Rule(MISSING, 0, WHOLE, Code.MOVE, 0, BASE)]),
        (
            MoveOrCopy(BASE, foreign=True),
            [Rule(MISSING, 0, WHOLE, Code.MOVE, 0, BASE, foreign=True)],
        ),
        # What the source does not have is Python's, which says so.
        (
            StrictMove(Somewhere(BASE, 3 * PAGE + 1)),
            [Rule(MISSING, 0, 3 * PAGE, Code.MOVE, 0, BASE)],
        ),
        (
            FaultAround(StrictMove(BASE), 16),
            [Rule(MISSING, 0, WHOLE, Code.MOVE, 0, BASE, 16 * PAGE)],
        ),
        (
            Poison(),
            [Rule(MISSING, 0, WHOLE, Code.POISON), Rule(MINOR, 0, WHOLE, Code.POISON)],
        ),
        (
            ByKind(missing=FaultAround(ZeroPage(), 8), minor=Continue()),
            [
                Rule(MISSING, 0, WHOLE, Code.ZEROPAGE, window=8 * PAGE),
                Rule(MINOR, 0, WHOLE, Code.CONTINUE),
            ],
        ),
        (
            FirstOf(Continue(), ZeroPage(), Poison()),
            [Rule(MISSING, 0, WHOLE, Code.ZEROPAGE), Rule(MINOR, 0, WHOLE, Code.CONTINUE)],
        ),
        (
            FaultAround(ByRange([(0, 8 * PAGE, ZeroPage()), (8 * PAGE, PAGE, Poison())]), 4),
            [
                Rule(MISSING, 0, 8 * PAGE, Code.ZEROPAGE, window=4 * PAGE),
                Rule(MISSING, 8 * PAGE, 9 * PAGE, Code.POISON, window=4 * PAGE),
                Rule(MINOR, 8 * PAGE, 9 * PAGE, Code.POISON, window=4 * PAGE),
            ],
        ),
        (
            FaultAround(ByRange([(0, 8 * PAGE, FaultAround(ZeroPage(), 2))]), 4),
            [Rule(MISSING, 0, 8 * PAGE, Code.ZEROPAGE, window=2 * PAGE)],
        ),
        (
            ByRange([(4 * PAGE, 8 * PAGE, CopyFrom(FakeSource(6 * PAGE, BASE), -4 * PAGE))]),
            [Rule(MISSING, 4 * PAGE, 10 * PAGE, Code.COPY, 0, BASE)],
        ),
        (
            ByRange([(20 * PAGE, 99 * PAGE, ZeroPage())]),
            [Rule(MISSING, 20 * PAGE, WHOLE, Code.ZEROPAGE)],
        ),
        (ByRange([(WHOLE, PAGE, ZeroPage())]), []),
        (FirstOf(), []),
        (ByKind(), []),
    ],
    ids=repr,
)
def test_plain_mappings_become_rules(policy: Policy, expected: list[Rule]) -> None:
    assert rules_for(policy) == expected


def test_kinds_are_known_to_c_as_fault_flags() -> None:
    missing, minor = rules_for(Poison())
    assert (missing.flags, minor.flags) == (0, int(FaultFlags.MINOR))


@pytest.mark.parametrize(("source", "cut"), [(BASE, BASE + PAGE), (0, 0)])
def test_a_part_of_a_rule_takes_its_part_of_the_source(source: int, cut: int) -> None:
    """Where there is one."""
    rule = Rule(MISSING, PAGE, 4 * PAGE, Code.COPY, COPY_WRITE_PROTECT, source, 2 * PAGE)
    expected = rule._replace(start=2 * PAGE, end=3 * PAGE, source=cut)
    assert rule.cut(2 * PAGE, 3 * PAGE) == expected


def test_huge_pages_have_no_zero_page() -> None:
    assert rules_for(ZeroPage(), HUGE) == []
    assert rules_for(FirstOf(ZeroPage(), Poison()), HUGE) == []
    [rule] = rules_for(Continue(), HUGE)
    assert (rule.end, rule.window) == (PAGES * HUGE, HUGE)


# -- what stays Python's -----------------------------------------------------------------------


def own(fault: Fault) -> Action | None:
    del fault
    return None


class OwnFirstOf(FirstOf):
    pass


@pytest.mark.parametrize(
    "policy",
    [
        own,
        nobody,
        Mine(1),
        Striped(3),
        LikeZeroPage(),
        OwnFirstOf(ZeroPage()),
        StrictMove(0),
        StrictMove(BASE, verify=True),
        MoveOrCopy(ADDRESSES - PAGE + 1),
        StrictMove(Somewhere(0x5000, PAGE - 1)),
        CopyFrom(FakeSource(WHOLE, None)),
        CopyFrom(FakeSource(PAGE - 1)),
        CopyFrom(FakeSource(0)),
        CopyFrom(SOURCE, -PAGE),
    ],
    ids=name_of,
)
def test_what_is_not_known_to_be_a_mapping_hides_what_is_asked_after_it(policy: Policy) -> None:
    after: list[Callable[[Policy], Policy]] = [
        lambda policy: policy,
        lambda policy: FaultAround(policy, 4),
        lambda policy: ByKind(missing=policy),
        lambda policy: ByKind(missing=FirstOf(policy, ZeroPage())),
        lambda policy: ByKind(missing=FaultAround(FirstOf(ByRange([]), policy, ZeroPage()), 4)),
        lambda policy: ByKind(missing=FirstOf(ByRange([(0, PAGE, policy)]), ZeroPage())),
    ]
    for put in after:
        assert rules_for(put(policy)) == [], put(policy)


def test_a_policy_for_write_protect_faults_hides_no_missing_rule() -> None:
    alone = rules_for(FirstOf(Unprotect(), ZeroPage()))
    assert alone == rules_for(ZeroPage())
    assert len(alone) == 1


@pytest.mark.parametrize("policy", [own, Mine(1), Striped(3), LikeZeroPage()])
def test_what_is_unknown_is_unknown_for_every_kind(policy: Policy) -> None:
    assert rules_for(FirstOf(policy, Poison())) == []


def test_hugetlb_does_not_move() -> None:
    for policy in (StrictMove(BASE), MoveOrCopy(BASE)):
        assert rules_for(policy, page_size=HUGE) == []
        assert rules_for(FirstOf(policy, ZeroPage()), page_size=HUGE) == []


def test_ranges_without_an_action_hide_nothing() -> None:
    poison = rules_for(Poison())
    assert rules_for(FirstOf(ByRange([]), Poison())) == poison
    assert rules_for(FirstOf(ByRange([(WHOLE, PAGE, own)]), Poison())) == poison
    assert rules_for(FirstOf(ByRange([(0, PAGE, ByKind())]), Poison())) == poison


def test_one_kind_may_be_known_and_the_other_not() -> None:
    assert rules_for(ByKind(missing=own, minor=Continue())) == [
        Rule(MINOR, 0, WHOLE, Code.CONTINUE)
    ]


def test_ranges_beside_an_unknown_one_are_lowered_and_what_comes_after_is_not() -> None:
    ranges = ByRange([(0, PAGE, own), (PAGE, PAGE, ZeroPage()), (2 * PAGE, 100, ZeroPage())])
    only = [Rule(MISSING, PAGE, 2 * PAGE, Code.ZEROPAGE)]
    assert rules_for(ranges) == only
    assert rules_for(FirstOf(ranges, ZeroPage())) == only


@pytest.mark.parametrize(("base", "fits"), [(ADDRESSES - PAGE, 1), (ADDRESSES - PAGE + 1, 0)])
def test_a_source_ends_with_the_address_space(base: int, fits: int) -> None:
    source = Wild(base)
    assert len(rules_for(ByRange([(7 * PAGE, PAGE, CopyFrom(source))]))) == fits


class Wild(FakeSource):
    """A source that does not keep to its contract."""

    def __init__(self, answer: object) -> None:
        super().__init__(WHOLE)
        self.answer = answer

    def address(self, offset: int, length: int) -> int | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    "answer",
    [OSError("the disk"), SourceTooShort("here"), 0, -1, ADDRESSES - PAGE, 4096.0, "4096", None],
    ids=repr,
)
def test_a_source_with_an_invalid_address_is_left_to_python(answer: object) -> None:
    assert rules_for(CopyFrom(Wild(answer))) == []
    assert rules_for(FirstOf(CopyFrom(Wild(answer)), Continue())) == [
        Rule(MINOR, 0, WHOLE, Code.CONTINUE)
    ]


# -- what C answers by itself -------------------------------------------------------------------


def test_discarded_pages_are_cs_to_know() -> None:
    region = a_region(CopyFrom(SOURCE), PAGES)
    before = rules_of(region)
    region.pages.remove(0, 2)
    assert rules_of(region) == before


@pytest.mark.parametrize(
    ("ranges", "first"),
    [
        ([(0, WHOLE)], None),
        ([(0, 8), (8, WHOLE // PAGE)], None),
        ([(1, WHOLE // PAGE)], 0),
        ([(0, 8), (9, 16)], 8 * PAGE),
        ([(0, 8)], 8 * PAGE),
        ([], 0),
    ],
)
def test_where_python_is_needed_first(ranges: list[tuple[int, int]], first: int | None) -> None:
    policies = [
        (low * PAGE, min(high * PAGE, WHOLE) - low * PAGE, ZeroPage()) for low, high in ranges
    ]
    region = a_region(ByRange(policies), PAGES)
    rules = rules_of(region)
    assert gap(region, rules, MISSING) == first
    assert gap(region, rules, MINOR) == 0
