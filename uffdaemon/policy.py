"""Policies: callables that take a `Fault` and return an `Action`, or None to decline.

A policy only decides: it does not wait and issues no operations.  The shipped policies are small
frozen dataclasses; a function works as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from uffdaemon import actions
from uffdaemon.actions import Action, Fallback, Fill, Source, Span
from uffdaemon.arguments import check_policy, check_type
from uffdaemon.errors import InvalidRange
from uffdaemon.model.batch import cut, window
from uffdaemon.model.region import Fault, Policy, policy_name
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.kernel.userfaultfd import Userfaultfd


class HasStart(Protocol):
    """Anything with a start address, such as `Memory`.

    The address is read when the policy is lowered and when memory of the library is unmapped, not
    at each fault.
    """

    @property
    def start(self) -> int: ...


def moves(policy: Policy) -> bool:
    """Whether `policy` is known to move pages, which only the owner of the memory can do."""
    return bool(getattr(policy, "moves", False))


_MISSING = FaultKind.MISSING


@dataclass(frozen=True)
class ZeroPage:
    """Fill missing pages with zeros."""

    def __call__(self, fault: Fault) -> Action | None:
        return _ZERO if fault.kind is _MISSING else None


@dataclass(frozen=True)
class CopyFrom:
    """Copy missing pages from `source`.  Byte `offset` of the source goes to the region's start.

    Raises TypeError if `source` is not a source.  A page that is not wholly inside the source
    fails with `SourceTooShort`.
    """

    source: Source
    offset: int = 0
    write_protect: bool = False
    """Whether to place pages write-protected, so that the first write to each is a WP fault."""
    _action: actions.Copy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(getattr(self.source, "address", None)):
            kind = type(self.source).__name__
            raise TypeError(f"copying takes a source, such as BytesSource(data), not {kind}")
        check_type("offset", self.offset, int)
        # One action serves all faults; `frozen` leaves no other way to set it.
        action = actions.Copy(self.source, self.offset, write_protect=self.write_protect)
        object.__setattr__(self, "_action", action)

    def __call__(self, fault: Fault) -> Action | None:
        return self._action if fault.kind is _MISSING else None


def _start(source: int | HasStart) -> int:
    return source if isinstance(source, int) else source.start


def _length(source: int | HasStart) -> int | None:
    """How many bytes may be taken, if the source has a length."""
    length = getattr(source, "length", None)
    return length if isinstance(length, int) else None


def where_from(source: int | HasStart) -> tuple[int, int | None]:
    """The current address of a move's source, and its length in bytes if known."""
    return _start(source), _length(source)


def _check_memory(source: object) -> None:
    if not isinstance(source, int) and not isinstance(getattr(source, "start", None), int):
        raise TypeError(f"moving takes a Memory or an address, not {type(source).__name__}")


@dataclass(frozen=True)
class StrictMove:
    """Move missing pages from the same offset of `source`, atomically; the fault fails otherwise.

    `source` (memory, or an address in bytes) belongs to the same process and is empty afterwards.
    It must be memory that this library mapped, unless `foreign` is true.  `verify` checks that the
    source is empty: see `actions.Move`.  Faults fail with a subclass of `MoveRefused`.  Serving
    another process's memory with it raises `PlacementRefused`.  See docs/move.md.
    """

    source: int | HasStart
    foreign: bool = False
    verify: bool = False

    moves = True

    def __post_init__(self) -> None:
        _check_memory(self.source)

    def __call__(self, fault: Fault) -> Action | None:
        if fault.kind is not _MISSING:
            return None
        source = self.source
        length = _length(source)
        return actions.Move(_start(source), length=length, foreign=self.foreign, verify=self.verify)


@dataclass(frozen=True)
class MoveOrCopy:
    """Like `StrictMove`, but a page that cannot be moved is handled as `fallback` allows.

    Where that does not help, faults fail with a subclass of `MoveRefused`.

    For a fault of another process the page is copied there from memory of this one, and released
    here; for that copy to be exact, `source_uffd` is the userfaultfd that the source is registered
    with.  See docs/move.md.
    """

    source: int | HasStart
    fallback: Fallback = Fallback()
    foreign: bool = False
    source_uffd: Userfaultfd | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        _check_memory(self.source)

    def __call__(self, fault: Fault) -> Action | None:
        if fault.kind is not _MISSING:
            return None
        return actions.Move(
            _start(self.source),
            fallback=self.fallback,
            length=_length(self.source),
            foreign=self.foreign,
            source_uffd=self.source_uffd,
            verify=self.verify,
        )


@dataclass(frozen=True)
class Continue:
    """Resolve minor faults by mapping the page from the page cache, where it was written before."""

    write_protect: bool = False

    def __call__(self, fault: Fault) -> Action | None:
        if fault.kind is not FaultKind.MINOR:
            return None
        return actions.Continue(write_protect=self.write_protect)


@dataclass(frozen=True)
class Poison:
    """Poison pages: touching a missing page, or one that is only in the page cache, is SIGBUS."""

    def __call__(self, fault: Fault) -> Action | None:
        return _POISON if fault.kind in (_MISSING, FaultKind.MINOR) else None


@dataclass(frozen=True)
class Unprotect:
    """Let writes to write-protected pages go through.  Hooks see the first write to each page."""

    def __call__(self, fault: Fault) -> Action | None:
        return _UNPROTECT if fault.kind is FaultKind.WP else None


_ZERO = actions.Zero()
_POISON = actions.Poison()
_UNPROTECT = actions.Unprotect()


# -- combinators -------------------------------------------------------------------------------

Reach: TypeAlias = tuple[int, int] | None
"""The offsets (bytes, from and to) around a fault within which a policy returns the same; None is
the whole region."""


def reach(policy: Policy, fault: Fault) -> Reach:
    """How far the decision of `policy` about `fault` holds.

    A policy of your own is assumed to hold for the whole region, unless it has a method
    ``reach(fault)``.
    """
    method = getattr(policy, "reach", None)
    return None if method is None else method(fault)


def _both(left: Reach, right: Reach) -> Reach:
    if left is None or right is None:
        return right if left is None else left
    return max(left[0], right[0]), min(left[1], right[1])


def _within(action: Action | None, fault: Fault, limits: Reach) -> Action | None:
    """`action`, with its window cut at `limits`."""
    if limits is None or not isinstance(action, Fill) or action.extent == 1:
        return action
    extent = action.extent
    if not isinstance(extent, Span):
        return replace(action, extent=window(fault, extent, *limits))
    part = cut(fault, extent.offset, extent.offset + extent.length, limits)
    # A span that does not contain the fault is invalid, and is refused unchanged.
    holds = part.offset <= fault.offset < part.offset + part.length
    return replace(action, extent=part) if holds and part != extent else action


class Combinator(ABC):
    """A policy made of others, each of which is called at most once per fault."""

    @abstractmethod
    def ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        """The decision, and how far it holds."""

    def __call__(self, fault: Fault) -> Action | None:
        return self.ask(fault)[0]

    def reach(self, fault: Fault) -> Reach:
        """How far the decision holds: offsets in bytes, or None for the whole region."""
        return self.ask(fault)[1]


def _ask(policy: Policy, fault: Fault) -> tuple[Action | None, Reach]:
    """The decision of any policy, and how far it holds."""
    if isinstance(policy, Combinator):
        kind = type(policy)
        # A subclass may override either method.
        if kind.__call__ is Combinator.__call__ and kind.reach is Combinator.reach:
            return policy.ask(fault)
    return policy(fault), reach(policy, fault)


class FirstOf(Combinator):
    """Use the first policy that returns an action.  A window is cut where an earlier policy would
    return an action."""

    def __init__(self, *policies: Policy) -> None:
        for policy in policies:
            check_policy("policy", policy)
        self.policies = policies
        self.moves: bool = any(map(moves, policies))

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(policy_name, self.policies))})"

    def ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        """The decision holds where the same policy decides and all before it return None."""
        limits: Reach = None
        for policy in self.policies:
            action, holds = _ask(policy, fault)
            limits = _both(limits, holds)
            if action is not None:
                return _within(action, fault, limits), limits
        return None, limits


class ByKind(Combinator):
    """One policy for each kind of fault.  Returns None for a kind without one."""

    def __init__(
        self,
        *,
        missing: Policy | None = None,
        minor: Policy | None = None,
        write_protect: Policy | None = None,
    ) -> None:
        self.policies: dict[FaultKind, Policy | None] = {
            FaultKind.MISSING: missing,
            FaultKind.MINOR: minor,
            FaultKind.WP: write_protect,
        }
        for kind, policy in self.policies.items():
            if policy is not None:
                check_policy(kind.value.replace("-", "_"), policy)
        self.moves: bool = any(
            moves(policy) for policy in self.policies.values() if policy is not None
        )

    def __repr__(self) -> str:
        named = (
            f"{kind.value}={policy_name(policy)}"
            for kind, policy in self.policies.items()
            if policy is not None
        )
        return f"ByKind({', '.join(named)})"

    def ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        """The decision of the policy for the fault's kind."""
        policy = self.policies.get(fault.kind)
        return (None, None) if policy is None else _ask(policy, fault)


class ByRange(Combinator):
    """One policy for each range (offset, length, policy; in bytes) of the region.

    Returns None in gaps.  A page belongs to the range that contains its first byte.  Windows end
    where their range ends.  Raises `InvalidRange` if ranges are empty or overlap.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, Policy]]) -> None:
        self.ranges: list[tuple[int, int, Policy]] = sorted(ranges, key=lambda entry: entry[0])
        end = 0
        for offset, length, policy in self.ranges:
            check_type("offset", offset, int)
            check_type("length", length, int)
            check_policy("policy", policy)
            if offset < end or length <= 0:
                raise InvalidRange(
                    f"range {offset:#x}, {length} bytes, for {policy_name(policy)} is empty or "
                    f"overlaps the one that ends at {end:#x}"
                )
            end = offset + length
        self._offsets = [offset for offset, _, _ in self.ranges]
        self.moves: bool = any(moves(policy) for _, _, policy in self.ranges)

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

    def ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        """The decision of the range's policy, limited to that range; None in a gap."""
        start, end, policy = self._find(fault)
        if policy is None:
            return None, (start, end)
        action, holds = _ask(policy, fault)
        limits = _both((start, end), holds)
        return _within(action, fault, limits), limits


class FaultAround(Combinator):
    """Apply what `policy` decides for a page to the aligned window of `pages` pages around it.

    The window is cut where the policy's decision ends.  An action for more than one page is left as
    it is.  With a power of two, windows meet without gaps; any positive number works.  Raises
    `InvalidRange` for less than 1.
    """

    def __init__(self, policy: Policy, pages: int) -> None:
        check_policy("policy", policy)
        check_type("pages", pages, int)
        if pages < 1:
            raise InvalidRange(f"fault-around of {pages} pages: at least 1 is needed")
        self.policy = policy
        self.pages = pages
        self.moves: bool = moves(policy)
        self._last: tuple[Action | None, Action | None] = (None, None)

    def __repr__(self) -> str:
        return f"FaultAround({policy_name(self.policy)}, {self.pages})"

    def ask(self, fault: Fault) -> tuple[Action | None, Reach]:
        """The decision of the inner policy, widened."""
        action, limits = _ask(self.policy, fault)
        if action is not self._last[0]:
            widened = action
            if isinstance(action, Fill) and action.extent == 1:
                widened = replace(action, extent=self.pages)
            self._last = action, widened
        return _within(self._last[1], fault, limits), limits
