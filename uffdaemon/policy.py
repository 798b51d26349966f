"""Policies decide; they neither wait nor issue anything.

A policy is a callable that gets a `Fault` and returns an `Action`, or None for "not mine".  The
shipped ones are small frozen dataclasses, and so can yours be; a function does as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from uffdaemon import actions
from uffdaemon.actions import Action, Fallback, Fill, Source, Span
from uffdaemon.errors import InvalidRange
from uffdaemon.events import FaultKind

if TYPE_CHECKING:
    from uffdaemon.region import Region


class Fault(NamedTuple):
    """What a policy is told."""

    address: int
    """Bytes, aligned to the region's page size."""
    kind: FaultKind
    write: bool
    """Whether the thread wants to write; False may also mean that nobody knows."""
    thread: int
    """The thread's id, 0 where THREAD_ID was not negotiated."""
    exact_address: int
    """What the kernel reported: the byte itself where EXACT_ADDRESS was negotiated."""
    region: Region
    read_at: int
    """When the message was read, in nanoseconds of ``time.perf_counter_ns``."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the region."""
        return self.address - self.region.start

    @property
    def page(self) -> int:
        """The number of the page in the region."""
        return (self.address - self.region.start) // self.region.page_size


Policy: TypeAlias = Callable[[Fault], Action | None]


class HasStart(Protocol):
    """Anything that begins at an address, such as `Memory`."""

    @property
    def start(self) -> int: ...


def policy_name(policy: Policy) -> str:
    """What a policy is called in logs: its function's name, or its repr."""
    name = getattr(policy, "__qualname__", None)
    return name if isinstance(name, str) else repr(policy)


def moves(policy: Policy) -> bool:
    """Whether `policy` is known to move pages, which only the process itself can do."""
    return bool(getattr(policy, "moves", False))


_MISSING = FaultKind.MISSING


@dataclass(frozen=True)
class ZeroPage:
    """Missing pages are zeros."""

    def __call__(self, fault: Fault) -> Action | None:
        return _ZERO if fault.kind is _MISSING else None


@dataclass(frozen=True)
class CopyFrom:
    """Missing pages are copied from `source`, whose byte `offset` belongs at the region's start."""

    source: Source
    offset: int = 0
    write_protect: bool = False
    """Whether pages arrive write-protected, so that the first write to each is reported."""
    _action: actions.Copy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # One action serves all faults; `frozen` leaves no other way to set it.
        action = actions.Copy(self.source, self.offset, write_protect=self.write_protect)
        object.__setattr__(self, "_action", action)

    def __call__(self, fault: Fault) -> Action | None:
        return self._action if fault.kind is _MISSING else None


def _start(source: int | HasStart) -> int:
    return source if isinstance(source, int) else source.start


@dataclass(frozen=True)
class StrictMove:
    """Missing pages are moved from the same offset of `source`, atomically, or the fault fails.

    `source` is memory of the same process that its owner gives up: it is empty afterwards.
    """

    source: int | HasStart

    moves = True

    def __call__(self, fault: Fault) -> Action | None:
        return actions.Move(_start(self.source)) if fault.kind is _MISSING else None


@dataclass(frozen=True)
class MoveOrCopy:
    """Like `StrictMove`; what cannot be moved is copied as far as `fallback` allows."""

    source: int | HasStart
    fallback: Fallback = Fallback()

    moves = True

    def __call__(self, fault: Fault) -> Action | None:
        if fault.kind is not _MISSING:
            return None
        return actions.Move(_start(self.source), fallback=self.fallback)


@dataclass(frozen=True)
class Continue:
    """Minor faults are mapped from the page cache, which the application has filled before."""

    write_protect: bool = False

    def __call__(self, fault: Fault) -> Action | None:
        if fault.kind is not FaultKind.MINOR:
            return None
        return actions.Continue(write_protect=self.write_protect)


@dataclass(frozen=True)
class Poison:
    """Every touch of a missing page, or of one only in the page cache, is SIGBUS."""

    def __call__(self, fault: Fault) -> Action | None:
        return _POISON if fault.kind in (_MISSING, FaultKind.MINOR) else None


@dataclass(frozen=True)
class Unprotect:
    """Writes to write-protected pages are let through; hooks see each page's first one."""

    def __call__(self, fault: Fault) -> Action | None:
        return _UNPROTECT if fault.kind is FaultKind.WP else None


_ZERO = actions.Zero()
_POISON = actions.Poison()
_UNPROTECT = actions.Unprotect()


# -- combinators -------------------------------------------------------------------------------

Reach: TypeAlias = tuple[int, int] | None
"""The offsets (bytes, from and to) around a fault in which a policy gives the same answer; None is
the whole region."""


def reach(policy: Policy, fault: Fault) -> Reach:
    """How far the answer of `policy` to `fault` holds.

    A policy of your own is taken to mean the whole region, unless it has a method ``reach(fault)``
    that says otherwise.
    """
    method = getattr(policy, "reach", None)
    return None if method is None else method(fault)


def _both(left: Reach, right: Reach) -> Reach:
    if left is None or right is None:
        return right if left is None else left
    return max(left[0], right[0]), min(left[1], right[1])


def _within(action: Action | None, fault: Fault, limits: Reach) -> Action | None:
    """`action`, unless its window could leave `limits`: then its window inside of them."""
    if limits is None or not isinstance(action, Fill):
        return action
    if isinstance(action.extent, Span) or action.extent == 1:
        return action
    return replace(action, extent=window(fault, action.extent, *limits))


class FirstOf:
    """The first policy that answers."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = policies
        self.moves = any(map(moves, policies))

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(policy_name, self.policies))})"

    def __call__(self, fault: Fault) -> Action | None:
        return self._ask(fault)[0]

    def reach(self, fault: Fault) -> Reach:
        """Where the same policy answers: those before it must go on not to."""
        return self._ask(fault)[1]

    def _ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        limits: Reach = None
        for policy in self.policies:
            action = policy(fault)
            limits = _both(limits, reach(policy, fault))
            if action is not None:
                return _within(action, fault, limits), limits
        return None, limits


class ByKind:
    """One policy for each kind of fault; a kind without one is not answered."""

    def __init__(
        self,
        *,
        missing: Policy | None = None,
        minor: Policy | None = None,
        write_protect: Policy | None = None,
    ) -> None:
        self.policies = {
            FaultKind.MISSING: missing,
            FaultKind.MINOR: minor,
            FaultKind.WP: write_protect,
        }
        self.moves = any(moves(policy) for policy in self.policies.values() if policy is not None)

    def __repr__(self) -> str:
        named = (
            f"{kind.value}={policy_name(policy)}"
            for kind, policy in self.policies.items()
            if policy is not None
        )
        return f"ByKind({', '.join(named)})"

    def __call__(self, fault: Fault) -> Action | None:
        policy = self.policies.get(fault.kind)
        return None if policy is None else policy(fault)

    def reach(self, fault: Fault) -> Reach:
        """That of the policy for the fault's kind."""
        policy = self.policies.get(fault.kind)
        return None if policy is None else reach(policy, fault)


class ByRange:
    """One policy for each range (offset and length in bytes) of the region; gaps are not answered.

    Windows end where their range ends.  Raises `InvalidRange` for ranges that are empty or
    overlap.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, Policy]]) -> None:
        self.ranges = sorted(ranges, key=lambda entry: entry[0])
        end = 0
        for offset, length, policy in self.ranges:
            if offset < end or length <= 0:
                raise InvalidRange(
                    f"range {offset:#x}, {length} bytes, for {policy_name(policy)} is empty or "
                    f"overlaps the one that ends at {end:#x}"
                )
            end = offset + length
        self._offsets = [offset for offset, _, _ in self.ranges]
        self.moves = any(moves(policy) for _, _, policy in self.ranges)

    def __repr__(self) -> str:
        named = (f"{o:#x}+{n:#x}: {policy_name(policy)}" for o, n, policy in self.ranges)
        return f"ByRange({', '.join(named)})"

    def _find(self, fault: Fault) -> tuple[int, int, Policy | None]:
        """The range or the gap that holds the fault: from, to, and its policy."""
        at = bisect_right(self._offsets, fault.offset)
        end = self._offsets[at] if at < len(self._offsets) else fault.region.length
        if at == 0:
            return 0, end, None
        offset, length, policy = self.ranges[at - 1]
        if fault.offset < offset + length:
            return offset, min(offset + length, fault.region.length), policy
        return offset + length, end, None

    def __call__(self, fault: Fault) -> Action | None:
        start, end, policy = self._find(fault)
        return None if policy is None else _within(policy(fault), fault, (start, end))

    def reach(self, fault: Fault) -> Reach:
        """The range or the gap, and in it as far as its policy reaches."""
        start, end, policy = self._find(fault)
        return _both((start, end), None if policy is None else reach(policy, fault))


class FaultAround:
    """What `policy` answers for a page is done for `pages` pages around it, an aligned window, as
    far as the policy's answer reaches.

    A power of two lets windows meet without gaps; anything positive works.
    """

    def __init__(self, policy: Policy, pages: int) -> None:
        if pages < 1:
            raise InvalidRange(f"fault-around of {pages} pages: at least 1 is needed")
        self.policy = policy
        self.pages = pages
        self.moves = moves(policy)
        self._last: tuple[Action | None, Action | None] = (None, None)

    def __repr__(self) -> str:
        return f"FaultAround({policy_name(self.policy)}, {self.pages})"

    def __call__(self, fault: Fault) -> Action | None:
        action = self.policy(fault)
        if action is not self._last[0]:
            widened = action
            if isinstance(action, Fill) and not isinstance(action.extent, Span):
                widened = replace(action, extent=self.pages)
            self._last = action, widened
        return _within(self._last[1], fault, reach(self.policy, fault))

    def reach(self, fault: Fault) -> Reach:
        """That of the policy inside."""
        return reach(self.policy, fault)


def window(fault: Fault, pages: int, low: int, high: int) -> Span:
    """The window of `pages` pages around `fault`, aligned from the region's start, cut to the
    offsets `low` to `high` (bytes)."""
    size = pages * fault.region.page_size
    start = fault.offset - fault.offset % size
    first, end = max(start, low), min(start + size, high)
    return Span(first, end - first)
