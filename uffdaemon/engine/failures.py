"""Faults that could not be resolved: what their region declares for that, and those that are held.

A held fault is listed until its page is filled for another fault, or its thread faults again.
"""

from __future__ import annotations

import os
import time
from types import CoroutineType
from typing import TYPE_CHECKING, TypeGuard

from uffdaemon import errors
from uffdaemon.actions import ACTIONS, Action, Hold
from uffdaemon.engine.next_step import Failed
from uffdaemon.hooks import abandon
from uffdaemon.model.ledger import Waiting
from uffdaemon.model.region import policy_name
from uffdaemon.model.region_table import outside_every_region
from uffdaemon.names import shown, text_of
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.hooks import HookCalls
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import PageFault


def fail(served: Served, fault: Fault, error: Exception) -> Action:
    """An open fault could not be resolved: returns what its region declares for that.

    A second failure means that the declared action has failed, too: then the fault is held.
    """
    served.counters.failures[type(error).__name__] += 1
    served.hooks.failed(fault, error)
    record = served.ledger.find(fault)
    again = record is None or record.failed
    action = Hold() if again else _declared_action(served.hooks, fault, error)
    if record is not None:
        record.failed = True
    _log(served, fault, error, type(action).__name__.lower())
    return Hold(f"{type(error).__name__}: {text_of(error)}") if isinstance(action, Hold) else action


def unless_discarded(served: Served, fault: Fault, step: Next) -> Next:
    """What comes next after work for a fault; zeros, if it is in vain and its page was discarded
    meanwhile: then nothing was needed."""
    if isinstance(step, Failed | Hold) and served.discarded(fault):
        return served.zeros_for(fault)
    return step


def refused_in_c(served: Served, fault: Fault, number: int) -> None:
    """A rule could not fill a page, and has done what the region declares for that."""
    error = errors.SourceFailed(f"{os.strerror(number)}: page contents unavailable")
    served.counters.failures[type(error).__name__] += 1
    served.hooks.failed(fault, error)
    _log(served, fault, error, "poison")


def comes_back(served: Served, fault: Fault, limit: int) -> Failed | None:
    """A thread is about to be woken.  Returns a failure if waking it did not help: if it faulted
    again at once, more than `limit` times in a row."""
    count = served.refaults.woken(fault, time.perf_counter_ns(), limit)
    if not count:
        return None
    if fault.region.policy is outside_every_region:
        where = f"{fault.exact_address:#x} is {fault.region.label}"
        return Failed(errors.NotServed(f"{where}, and there is no `default` for such faults"))
    name = policy_name(fault.region.policy)
    what = f"says that the page is there; {count} times in a row the thread found it is not"
    return Failed(errors.PolicyAnswerInvalid(name, what))


def hold(served: Served, fault: Fault, reason: str) -> None:
    """Hold an open fault: its thread waits on, and the fault stays listed with the reason."""
    served.ledger.wait(fault, Waiting.NOBODY, reason)
    if fault.kind is not FaultKind.WP:
        # The page is known to be missing now.  If it is filled later, the fault ends.
        fault.region.pages.present.discard_range(fault.page, fault.page + 1)
    served.counters.outcomes[fault.kind, Outcome.HELD] += 1
    served.loop.wake()


def arrived(served: Served) -> list[Fault]:
    """Held faults whose pages have been filled for another fault, such as a neighbour's window:
    the kernel has woken their threads."""
    return [
        fault
        for fault in served.ledger.held_faults()
        if fault.kind is not FaultKind.WP and fault.page in fault.region.pages.present
    ]


def resolved_by_rule(served: Served, event: PageFault) -> list[Fault]:
    """Held faults of the page that a rule has resolved for the thread of `event`."""
    return [
        fault
        for fault in served.ledger.held_faults()
        if fault.kind is event.kind and 0 <= event.address - fault.address < fault.region.page_size
    ]


def _log(served: Served, fault: Fault, error: Exception, then: str) -> None:
    served.log.error(
        "fault failed",
        region=fault.region.label,
        policy=policy_name(fault.region.policy),
        address=hex(fault.exact_address),
        kind=fault.kind.value,
        thread=fault.thread,
        error=text_of(error),
        error_type=type(error).__name__,
        then=then,
        exc_info=error.__cause__ if isinstance(error, errors.PolicyRaised) else None,
    )


def _declared_action(hooks: HookCalls, fault: Fault, error: Exception) -> Action:
    """The action that the region declares for a failed fault; ``on_failure`` may be a callable."""
    declared = fault.region.on_failure
    if isinstance(declared, ACTIONS):
        return declared
    try:
        answer = untrusted(declared(fault, error))
    except Exception as raised:  # noqa: BLE001  # whatever it is, the fault is held
        hooks.raised(declared, raised)
        return Hold()
    if is_action(answer):
        return answer
    if answer is not None:
        hooks.raised(declared, TypeError(f"on_failure {not_an_action(answer)}"))
    return Hold()


def untrusted(answer: object) -> object:
    """The return value of code that is not ours: its type is checked, not trusted."""
    return answer


def is_action(answer: object) -> TypeGuard[Action]:
    """Whether it is an action: by its type, since its ``__class__`` may raise anything."""
    return issubclass(type(answer), ACTIONS)


def not_an_action(answer: object) -> str:
    """Describe a return value that is not an action."""
    if issubclass(type(answer), CoroutineType):
        abandon(answer)
        return "returned a coroutine: it has to decide at once, and to return Perform to wait"
    return f"returned {shown(answer)}, which is no action"
