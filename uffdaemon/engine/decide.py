"""Deciding about a fault: its region's policy is asked, then the hooks have their say.

Whatever a policy or a hook does, exactly one of two things follows: an action is carried out, or
the fault fails with an error that names who is to blame.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import ACTIONS, Action, Unprotect
from uffdaemon.engine.failures import fail, nonsense, untrusted
from uffdaemon.engine.move_faults import waits_for_copy
from uffdaemon.hooks import Veto, hook_name
from uffdaemon.model.region import policy_name
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from uffdaemon.handlers import Handler
    from uffdaemon.model.region import Fault

_clock = time.perf_counter_ns


def decide(handler: Handler, fault: Fault) -> None:
    """Ask the region's policy, then the hooks, and have the action carried out."""
    if handler.uffd.copies.any_yet and waits_for_copy(handler, fault):
        return
    region = fault.region
    policy = region.policy
    begun = _clock()
    try:
        action = untrusted(policy(fault))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the policy's
        raised = errors.PolicyRaised(policy_name(policy), f"raised {error!r}")
        raised.__cause__ = error
        fail(handler, fault, raised)
        return
    took = (_clock() - begun) / 1e9
    if took > region.policy_timeout:
        fail(handler, fault, errors.PolicyTooSlow(policy_name(policy), f"took {took:.3f} s"))
    elif action is None and handler.uffd.copies.any_yet and fault.kind is FaultKind.WP:
        # Nobody else protects pages here: it comes from an exact copy that has ended since.
        handler.carry_out(fault, Unprotect())
    elif action is None:
        what = f"does not answer {fault.kind.value} faults here"
        fail(handler, fault, errors.NoAnswer(policy_name(policy), what))
    elif not isinstance(action, ACTIONS):
        fail(handler, fault, errors.PolicyAnswerInvalid(policy_name(policy), nonsense(action)))
    elif handler.hooks.before:
        ask_hooks(handler, fault, action, 0)
    else:
        handler.carry_out(fault, action)


def ask_hooks(handler: Handler, fault: Fault, action: Action, first: int) -> None:
    """Let the ``before`` hooks from number `first` on have their say."""
    before = handler.hooks.before
    for index in range(first, len(before)):
        hook = before[index]
        try:
            answer = hook(fault, action)
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            handler.hooks.raised(hook, error)
            continue
        if inspect.isawaitable(answer):
            handler.slow.ask_hook(fault, action, answer, index)
            return
        replaced = _heed(handler, fault, action, answer, hook)
        if replaced is None:
            return
        action = replaced
    handler.carry_out(fault, action)


def resume_hooks(
    handler: Handler, fault: Fault, action: Action, answer: object, index: int
) -> None:
    """Go on after the async hook number `index` has answered."""
    replaced = _heed(handler, fault, action, answer, handler.hooks.before[index])
    if replaced is not None:
        ask_hooks(handler, fault, replaced, index + 1)


def _heed(
    handler: Handler, fault: Fault, action: Action, answer: object, hook: object
) -> Action | None:
    """The action to go on with after a hook has answered; None: the fault has failed."""
    if isinstance(answer, ACTIONS):
        return answer
    if isinstance(answer, Veto):
        fail(handler, fault, errors.PolicyVetoed(hook_name(hook), f"vetoed: {answer.reason}"))
        return None
    if answer is not None:
        wrong = TypeError(f"{hook_name(hook)} returned {answer!r}, which is no action")
        handler.hooks.raised(hook, wrong)
    return action
