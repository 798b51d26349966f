"""Hooks: what an application may see of each fault and event, and change about it.

A hook is a callable, sync or async.  One that raises is logged and otherwise ignored: the fault
goes on.  Async hooks run in a task of their own, in the order of what they are told; only an async
``before`` keeps its fault waiting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.events import Event
    from uffdaemon.outcomes import Outcome
    from uffdaemon.policy import Fault


@dataclass(frozen=True, slots=True)
class Veto:
    """Returned by a ``before`` hook: the action shall not be done.  The fault fails with this
    reason, and the region's ``on_failure`` says what becomes of it."""

    reason: str = "vetoed"


class Resolved(NamedTuple):
    """What ``after`` hooks are told: how a fault ended."""

    fault: Fault
    outcome: Outcome
    latency: int
    """Nanoseconds from reading the message to having answered."""
    done: int
    """Bytes that were filled for it; 0 when another fault's answer filled its page as well."""


BeforeAnswer: TypeAlias = "Action | Veto | None"
"""Another action, a veto, or None: go on."""

Before: TypeAlias = "Callable[[Fault, Action], BeforeAnswer | Awaitable[BeforeAnswer]]"
After: TypeAlias = Callable[[Resolved], Awaitable[None] | None]
Failed: TypeAlias = "Callable[[Fault, Exception], Awaitable[None] | None]"
OnEvent: TypeAlias = "Callable[[Event], Awaitable[None] | None]"


@dataclass(frozen=True, slots=True)
class Hooks:
    """A set of hooks; each may be left out.

    ``before`` gets every fault and its action before it is carried out, and may replace or veto
    it: faults then go through Python one by one, instead of being answered by rules in C.
    ``after`` gets every fault that has ended.  ``failed`` gets every failure, before what the
    region declares for it is done.  The others get the event of their name.
    """

    before: Before | None = None
    after: After | None = None
    failed: Failed | None = None
    fork: OnEvent | None = None
    remap: OnEvent | None = None
    remove: OnEvent | None = None
    unmap: OnEvent | None = None
