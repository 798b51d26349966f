"""Lowers policies to rules, which C carries out without the interpreter.

A policy that maps ranges to actions can be lowered.  Callables of yours, sources that must be
fetched, and write-protection faults stay in Python: C forwards faults that no rule covers, and
faults for which the kernel refuses the rule's operation.  A lowered policy does the same as the
policy called in Python, only faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeGuard, TypeVar

from uffdaemon.model.batch import ADDRESSES
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
    where_from,
)
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultFlags, FaultKind
from uffdaemon.uapi.outcomes import CONTINUE_WRITE_PROTECT, COPY_WRITE_PROTECT, Code

if TYPE_CHECKING:
    from uffdaemon.model.region import Policy, Region

_KINDS: Final = (FaultKind.MISSING, FaultKind.MINOR)
_FLAGS: Final = {FaultKind.MISSING: 0, FaultKind.MINOR: int(FaultFlags.MINOR)}


_PolicyT = TypeVar("_PolicyT")


class Rule(NamedTuple):
    """The fields of ``struct uffdaemon_rule`` that a policy determines.

    Offsets are in bytes from the region's start.
    """

    kind: FaultKind
    start: int
    end: int
    code: Code
    mode: int = 0
    source: int = 0
    """The address of the data for `start`."""
    window: int = PAGE_SIZE
    """Bytes to fill around a fault."""
    foreign: bool = False
    """For MOVE: whether the source may be memory that this library has not mapped."""

    @property
    def flags(self) -> int:
        """The kind as the kernel's fault flags."""
        return _FLAGS[self.kind]

    def cut(self, start: int, end: int) -> Rule:
        """The same rule for a part of its range."""
        source = self.source + (start - self.start) if self.source else 0
        return self._replace(start=start, end=end, source=source)


def rules_of(region: Region) -> list[Rule]:
    """The rules for the region's policy; [] if nothing can be lowered.

    For faults that no rule covers, the policy is called in Python.
    """
    found: list[Rule] = []
    for kind in _KINDS:
        found += _lower(region.policy, region, kind, 0, region.length) or []
    return sorted(found, key=lambda rule: (rule.flags, rule.start))


def gap(region: Region, rules: list[Rule], kind: FaultKind) -> int | None:
    """The first offset (bytes) in the region that no rule covers for faults of `kind`.

    None if the rules cover the whole region.
    """
    at = 0
    for rule in rules:
        if rule.kind is kind and rule.start <= at:
            at = max(at, rule.end)
    return None if at >= region.length else at


def _lower(
    policy: Policy, region: Region, kind: FaultKind, start: int, end: int
) -> list[Rule] | None:
    """Rules for one kind of fault in a part of the region.

    None if it is not known what the policy does.  Then policies that come after it in a `FirstOf`
    cannot be lowered either.
    """
    if _is(policy, FaultAround):
        inner = _lower(policy.policy, region, kind, start, end)
        if inner is None:
            return None
        size = region.page_size
        return [
            rule._replace(window=policy.pages * size) if rule.window == size else rule
            for rule in inner
        ]
    if _is(policy, ByKind):
        chosen = policy.policies[kind]
        return [] if chosen is None else _lower(chosen, region, kind, start, end)
    if _is(policy, FirstOf):
        return _lower_first(policy, region, kind, start, end)
    if _is(policy, ByRange):
        return _lower_ranges(policy, region, kind, start, end)
    return _lower_simple(policy, region, kind, start, end)


def _lower_simple(
    policy: Policy, region: Region, kind: FaultKind, start: int, end: int
) -> list[Rule] | None:
    size = region.page_size
    if _is(policy, ZeroPage):
        if size != PAGE_SIZE:  # hugetlb has no zero page
            return None
        return _only(kind is FaultKind.MISSING, Rule(kind, start, end, Code.ZEROPAGE))
    if _is(policy, Continue):
        mode = CONTINUE_WRITE_PROTECT if policy.write_protect else 0
        rule = Rule(kind, start, end, Code.CONTINUE, mode, window=size)
        return _only(kind is FaultKind.MINOR, rule)
    if _is(policy, Unprotect):
        return []  # it returns None for both kinds, so the next policy may be lowered
    if _is(policy, Poison):
        return [Rule(kind, start, end, Code.POISON, window=size)]
    if _is(policy, CopyFrom):
        if kind is not FaultKind.MISSING:
            return []
        return _lower_copy(policy, kind, start, end, size)
    if _is(policy, StrictMove) or _is(policy, MoveOrCopy):
        if kind is not FaultKind.MISSING:
            return []
        return _lower_move(policy, kind, start, end, size)
    return None


def _is(policy: object, kind: type[_PolicyT]) -> TypeGuard[_PolicyT]:
    """Whether it is exactly this type: a subclass may behave differently."""
    return type(policy) is kind


def _lower_copy(
    policy: CopyFrom, kind: FaultKind, start: int, end: int, page_size: int
) -> list[Rule] | None:
    # Python handles pages that the source does not have completely, and reports the error.
    try:
        end = min(end, (policy.source.size - policy.offset) // page_size * page_size)
        if end <= start:
            return None
        address = policy.source.address(policy.offset + start, end - start)
    except Exception:  # noqa: BLE001  # a source may raise anything; each fault will report it
        return None
    if type(address) is not int or not 0 < address <= ADDRESSES - (end - start):
        return None
    mode = COPY_WRITE_PROTECT if policy.write_protect else 0
    return [Rule(kind, start, end, Code.COPY, mode, address, page_size)]


def _lower_move(
    policy: StrictMove | MoveOrCopy, kind: FaultKind, start: int, end: int, page_size: int
) -> list[Rule] | None:
    if page_size != PAGE_SIZE or policy.verify:  # hugetlb does not move, and C does not verify
        return None
    first, length = where_from(policy.source)
    if length is not None:
        end = min(end, length // page_size * page_size)
    if end <= start or not 0 < first <= ADDRESSES - end:
        return None
    return [Rule(kind, start, end, Code.MOVE, 0, first + start, page_size, policy.foreign)]


def _only(condition: bool, rule: Rule) -> list[Rule]:  # noqa: FBT001  # reads as a sentence
    return [rule] if condition else []


def _lower_first(
    policy: FirstOf, region: Region, kind: FaultKind, start: int, end: int
) -> list[Rule] | None:
    for candidate in policy.policies:
        rules = _lower(candidate, region, kind, start, end)
        if rules is None:
            return None
        if rules:
            # Where these rules have gaps, Python calls the policies in turn.
            return rules
    return []


def _lower_ranges(
    policy: ByRange, region: Region, kind: FaultKind, start: int, end: int
) -> list[Rule] | None:
    found: list[Rule] = []
    unknown = False
    for offset, length, inner in policy.ranges:
        low, high = max(offset, start), min(offset + length, end)
        if low >= high:
            continue
        rules = None
        if low % region.page_size == 0 and high % region.page_size == 0:
            rules = _lower(inner, region, kind, low, high)
        if rules is None:
            unknown = True
        else:
            found += rules
    return None if unknown and not found else found
