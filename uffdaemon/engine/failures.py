"""Faults that could not be answered: what their region declares for that, and those that are held.

A held fault is listed until its page comes by other ways, or its thread asks once more.
"""

from __future__ import annotations

import inspect
import os
import time
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import ACTIONS, Action, Hold
from uffdaemon.model.ledger import Waiting
from uffdaemon.model.region import policy_name
from uffdaemon.model.region_table import outside_every_region
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from uffdaemon.handlers import Handler
    from uffdaemon.hooks import HookCalls
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import PageFault


def fail(handler: Handler, fault: Fault, error: Exception) -> None:
    """The fault could not be answered: do what the region declares for that."""
    if not handler.ledger.is_open(fault):
        return
    handler.counters.failures[type(error).__name__] += 1
    handler.hooks.failed(fault, error)
    key = (fault.address, fault.kind)
    # What was to be done about the failure may fail itself: then nobody knows.
    known = key in handler.failing
    action = Hold() if known else _declared_action(handler.hooks, fault, error)
    handler.failing.add(key)
    _log(handler, fault, error, type(action).__name__.lower())
    if isinstance(action, Hold):
        hold(handler, fault, f"{type(error).__name__}: {error}")
    else:
        handler.carry_out(fault, action)


def refused_in_c(handler: Handler, fault: Fault, number: int) -> None:
    """A rule could not bring a page, and has done at once what the region declares for that."""
    error = errors.SourceFailed(f"{os.strerror(number)}: what is due there cannot be had")
    handler.counters.failures[type(error).__name__] += 1
    handler.hooks.failed(fault, error)
    _log(handler, fault, error, "poison")


def comes_back(handler: Handler, fault: Fault, limit: int) -> bool:
    """Whether a thread that is to be woken came back too often already: then it has failed."""
    count = handler.repeats.woken(fault, time.perf_counter_ns(), limit)
    if not count:
        return False
    if fault.region.policy is outside_every_region:
        fail(handler, fault, errors.NotServed("no region that is served holds this address"))
        return True
    name = policy_name(fault.region.policy)
    what = f"says that the page is there; {count} times in a row the thread found it is not"
    fail(handler, fault, errors.PolicyAnswerInvalid(name, what))
    return True


def hold(handler: Handler, fault: Fault, reason: str) -> None:
    """Nobody is going to answer the open fault: it is listed, with the reason."""
    handler.ledger.wait(fault, Waiting.NOBODY, reason)
    handler.held.add(fault)
    if fault.kind is not FaultKind.WP:
        # Known by now not to be there; should it come, the thread is held no longer.
        fault.region.pages.present.discard_range(fault.page, fault.page + 1)
    handler.counters.outcomes[fault.kind, Outcome.HELD] += 1
    handler.wake()


def release_held(handler: Handler) -> None:
    """Let go of held faults whose pages have come by other ways, such as a neighbour's window: the
    kernel has woken their threads."""
    for fault in list(handler.held):
        if fault.kind is not FaultKind.WP and fault.page in fault.region.pages.present:
            handler.resolve(fault, Outcome.ALREADY_PRESENT)


def answered_anew(handler: Handler, event: PageFault) -> None:
    """A rule has answered a page whose fault is held: that is how it has ended."""
    for fault in list(handler.held):
        start = fault.address
        if fault.kind is event.kind and 0 <= event.address - start < fault.region.page_size:
            handler.held.discard(fault)
            handler.failing.discard((start, fault.kind))
            handler.ledger.leave(fault)
            handler.counters.joined += 1


def _log(handler: Handler, fault: Fault, error: Exception, then: str) -> None:
    handler.log.error(
        "fault failed",
        region=fault.region.label,
        policy=policy_name(fault.region.policy),
        address=hex(fault.exact_address),
        kind=fault.kind.value,
        thread=fault.thread,
        error=str(error),
        error_type=type(error).__name__,
        then=then,
        exc_info=error.__cause__ if isinstance(error, errors.PolicyRaised) else None,
    )


def _declared_action(hooks: HookCalls, fault: Fault, error: Exception) -> Action:
    """What the region declares for a fault that failed; its application may be asked."""
    declared = fault.region.on_failure
    if isinstance(declared, ACTIONS):
        return declared
    try:
        answer = untrusted(declared(fault, error))
    except Exception as raised:  # noqa: BLE001  # then nobody knows: hold
        hooks.raised(declared, raised)
        return Hold()
    if isinstance(answer, ACTIONS):
        return answer
    if answer is not None:
        hooks.raised(declared, TypeError(f"on_failure {nonsense(answer)}"))
    return Hold()


def untrusted(answer: object) -> object:
    """What somebody else's code returned, whatever its types promise."""
    return answer


def nonsense(answer: object) -> str:
    """What is wrong with an answer that is no action."""
    if inspect.iscoroutine(answer):
        answer.close()
        return "returned a coroutine: it has to decide at once, and to return Perform to wait"
    return f"returned {answer!r}, which is no action"
