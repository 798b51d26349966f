"""Hooks: what an application may see of each fault and event, and change about it.

A hook is a callable, sync or async.  One that raises is logged and otherwise ignored: the fault
goes on.  Async hooks run in a task of their own, in the order of what they are told; only an async
``before`` keeps its fault waiting.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

    from uffdaemon.actions import Action
    from uffdaemon.model.region import Fault
    from uffdaemon.model.statistics import Counters
    from uffdaemon.uapi.events import Event
    from uffdaemon.uapi.outcomes import Outcome


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


class HookCalls:
    """Calls hooks, and survives what they do."""

    def __init__(self, hooks: Sequence[Hooks], counters: Counters, log: BoundLogger) -> None:
        self._hooks = tuple(hooks)
        self._counters = counters
        self._log = log
        self.before = [each.before for each in hooks if each.before is not None]
        """The ``before`` hooks, in the order in which they are asked."""
        self._after = [each.after for each in hooks if each.after is not None]
        self.await_later: Callable[[Awaitable[None], object], None]
        """Has what an async hook returned awaited, after what was handed over earlier."""

    @property
    def see_endings(self) -> bool:
        """Whether there is a hook that wants to know how faults end."""
        return bool(self._after)

    def after(self, resolved: Resolved) -> None:
        """A fault has ended."""
        for hook in self._after:
            self._call(hook, resolved)

    def failed(self, fault: Fault, error: Exception) -> None:
        """A fault could not be answered as its policy wanted."""
        for hooks in self._hooks:
            if hooks.failed is not None:
                self._call(hooks.failed, fault, error)

    def event(self, name: str, event: Event) -> None:
        """An event of the name of one of the fields of `Hooks` has come."""
        for hooks in self._hooks:
            hook = getattr(hooks, name, None)
            if hook is not None:
                self._call(hook, event)

    def _call(self, hook: Callable[..., Awaitable[None] | None], *arguments: object) -> None:
        try:
            answer = hook(*arguments)
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            self.raised(hook, error)
            return
        if inspect.isawaitable(answer):
            self.await_later(answer, hook)

    def raised(self, hook: object, error: Exception) -> None:
        """Log what a hook did wrong; the fault goes on."""
        self._counters.failures["HookRaised"] += 1
        self._log.error("hook failed", hook=hook_name(hook), error=repr(error), exc_info=error)


def hook_name(hook: object) -> str:
    """What a hook is called in logs."""
    return str(getattr(hook, "__qualname__", None) or repr(hook))
