"""Deciding what to do about a fault: ask its region's policy, then the ``before`` hooks.

Whatever a policy or a hook does, the result is an action, a wait, or a failure that names the
culprit.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, cast

import trio

from uffdaemon import errors
from uffdaemon.actions import Action, Unprotect
from uffdaemon.engine.failures import is_action, not_an_action, untrusted
from uffdaemon.engine.next_step import AskHook, Failed
from uffdaemon.engine.shortages import is_shortage, try_later
from uffdaemon.engine.write_protect import AFTER_COPY, waits_for_copy
from uffdaemon.hooks import Veto, is_awaitable
from uffdaemon.model.region import policy_name
from uffdaemon.names import name_of, shown
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault, Policy

_clock = time.perf_counter_ns


def decide(served: Served, fault: Fault) -> Next:
    """Ask the region's policy, then the hooks."""
    copying = served.uffd.copies.any_yet
    if copying and waits_for_copy(served, fault):
        return AFTER_COPY
    region = fault.region
    policy = region.policy
    begun = _clock()
    try:
        action = untrusted(_ask(policy, fault))
    except KeyboardInterrupt as error:
        # Not here: this task has more to do.  trio delivers it to the main task.
        signal.raise_signal(signal.SIGINT)
        raised = errors.PolicyRaised(policy_name(policy), "was interrupted by Ctrl-C")
        raised.__cause__ = error
        return Failed(raised)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the policy's
        raised = errors.PolicyRaised(policy_name(policy), f"raised {shown(error)}")
        raised.__cause__ = error
        if is_shortage(error):
            return try_later(served, fault, None, raised)
        return Failed(raised)
    took = (_clock() - begun) / 1e9
    if took > region.policy_timeout:
        return Failed(errors.PolicyTooSlow(policy_name(policy), f"took {took:.3f} s"))
    if action is None:
        if copying and fault.kind is FaultKind.WP:
            # The protection was that of an exact copy, which has ended.
            return Unprotect()
        what = f"does not answer {fault.kind.value} faults here"
        return Failed(errors.NoAnswer(policy_name(policy), what))
    if not is_action(action):
        return Failed(errors.PolicyAnswerInvalid(policy_name(policy), not_an_action(action)))
    return ask_hooks(served, fault, action, 0) if served.hooks.before else action


@trio.lowlevel.disable_ki_protection
def _ask(policy: Policy, fault: Fault) -> Action | None:
    """Call the policy, which Ctrl-C may interrupt: it could run for ever."""
    return policy(fault)


def ask_hooks(served: Served, fault: Fault, action: Action, first: int) -> Next:
    """Ask the ``before`` hooks from number `first` on."""
    before = served.hooks.before
    for index in range(first, len(before)):
        hook = before[index]
        try:
            answer = hook(fault, action)
        except Exception as error:  # noqa: BLE001  # a hook must not lose the fault
            served.hooks.raised(hook, error)
            continue
        if is_awaitable(answer):
            return AskHook(action, answer, index)
        replaced = _apply_hook(served, action, answer, hook)
        if isinstance(replaced, Failed):
            return replaced
        action = replaced
    return action


def resume_hooks(served: Served, fault: Fault, action: Action, answer: object, index: int) -> Next:
    """Continue after the async hook number `index` has returned `answer`."""
    replaced = _apply_hook(served, action, answer, served.hooks.before[index])
    if isinstance(replaced, Failed):
        return replaced
    return ask_hooks(served, fault, replaced, index + 1)


def _apply_hook(served: Served, action: Action, answer: object, hook: object) -> Action | Failed:
    """The action to continue with after a hook has returned `answer`."""
    if is_action(answer):
        return answer
    if issubclass(type(answer), Veto):
        reason = cast("Veto", answer).reason
        return Failed(errors.PolicyVetoed(name_of(hook), f"vetoed: {reason}"))
    if answer is not None:
        wrong = TypeError(f"{name_of(hook)} returned {shown(answer)}, which is no action")
        served.hooks.raised(hook, wrong)
    return action
