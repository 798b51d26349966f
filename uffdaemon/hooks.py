"""Hooks: callables of the application that see each fault and event, and may change actions.

Hooks are sync or async.  A hook that raises is logged and otherwise ignored.  Async hooks run in a
task of their own, in the order of the faults and events; only an async ``before`` makes its fault
wait.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import CoroutineType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeGuard, cast

from uffdaemon.names import name_of, shown

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.log import Log
    from uffdaemon.model.region import Fault
    from uffdaemon.model.statistics import Counters
    from uffdaemon.uapi.events import Event
    from uffdaemon.uapi.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Veto:
    """Returned by a ``before`` hook to refuse an action.

    The fault fails with `PolicyVetoed` and this reason, and the region's ``on_failure`` is done.
    """

    reason: str = "vetoed"


class Resolved(NamedTuple):
    """How a fault ended: the argument of ``after`` hooks."""

    fault: Fault
    outcome: Outcome
    latency: int
    """Nanoseconds from reading the message until the fault was resolved."""
    done: int
    """Bytes that were filled for it; 0 if the operation of another fault filled its page."""


BeforeAnswer: TypeAlias = "Action | Veto | None"
"""Another action, a veto, or None to leave the action as it is."""

Before: TypeAlias = "Callable[[Fault, Action], BeforeAnswer | Awaitable[BeforeAnswer]]"
After: TypeAlias = Callable[[Resolved], Awaitable[None] | None]
Failed: TypeAlias = "Callable[[Fault, Exception], Awaitable[None] | None]"
OnEvent: TypeAlias = "Callable[[Event], Awaitable[None] | None]"
AwaitLater: TypeAlias = Callable[[Awaitable[None], object], None]


@dataclass(frozen=True, slots=True)
class Hooks:
    """A set of hooks, all optional.

    ``before(fault, action)`` is called before an action is carried out, and may replace or veto it.
    It makes every fault go through Python, instead of being resolved by rules in C.
    ``after(resolved)`` is called when a fault has ended, ``failed(fault, error)`` when one fails,
    before the region's ``on_failure``.  ``fork``, ``remap``, ``remove`` and ``unmap`` are called
    with the event of that name.  Raises TypeError for what cannot be called.
    """

    before: Before | None = None
    after: After | None = None
    failed: Failed | None = None
    fork: OnEvent | None = None
    remap: OnEvent | None = None
    remove: OnEvent | None = None
    unmap: OnEvent | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(f"{name} is a hook, which is a callable, not {shown(hook, 100)}")


class HookCalls:
    """Calls hooks, and logs what they raise."""

    def __init__(self, hooks: Sequence[Hooks], counters: Counters, log: Log) -> None:
        self._hooks = tuple(hooks)
        self._counters = counters
        self._log = log
        self.before: list[Before] = [each.before for each in hooks if each.before is not None]
        """The ``before`` hooks, in the order in which they are called."""
        self._after = [each.after for each in hooks if each.after is not None]
        self._await_later: AwaitLater | None = None
        self._early: list[tuple[Awaitable[None], object]] = []
        """What async hooks returned before a task awaits it."""

    @property
    def see_endings(self) -> bool:
        """Whether there is an ``after`` hook."""
        return bool(self._after)

    def await_by(self, await_later: AwaitLater) -> None:
        """From now on, `await_later` awaits what async hooks return, in order, in a task."""
        self._await_later = await_later
        while self._early:
            await_later(*self._early.pop(0))

    def after(self, resolved: Resolved) -> None:
        """A fault has ended."""
        for hook in self._after:
            self._call(hook, resolved)

    def failed(self, fault: Fault, error: Exception) -> None:
        """A fault could not be resolved as its policy decided."""
        for hooks in self._hooks:
            if hooks.failed is not None:
                self._call(hooks.failed, fault, error)

    def event(self, name: str, event: Event) -> None:
        """Call the hooks for an event; `name` is a field of `Hooks`."""
        for hooks in self._hooks:
            hook = getattr(hooks, name, None)
            if hook is not None:
                self._call(hook, event)

    def _call(self, hook: Callable[..., Awaitable[None] | None], *arguments: object) -> None:
        try:
            returned = hook(*arguments)
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            self.raised(hook, error)
            return
        if is_awaitable(returned):
            if self._await_later is None:
                self._early.append((returned, hook))
            else:
                self._await_later(returned, hook)

    def raised(self, hook: object, error: Exception) -> None:
        """Log the error of a hook."""
        self._counters.failures["HookRaised"] += 1
        self._log.error("hook failed", hook=name_of(hook), error=shown(error), exc_info=error)


def is_awaitable(answer: object) -> TypeGuard[Awaitable[None]]:
    """Whether a hook is async, by what it returned; never raises."""
    try:
        return inspect.isawaitable(answer)
    except Exception:  # noqa: BLE001  # its ``__class__`` may raise anything
        return False


def abandon(answer: object) -> None:
    """Nobody is going to await what an async hook returned: its fault has ended."""
    if issubclass(type(answer), CoroutineType):
        cast("CoroutineType[object, object, object]", answer).close()
