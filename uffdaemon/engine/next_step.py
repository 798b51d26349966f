"""What comes next for a fault: the closed union that the engine's decisions return.

A decision never calls the handler.  It returns an action to carry out, or one of the steps below,
and `uffdaemon.handlers` takes it: there is one loop to read, and no way back up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from uffdaemon.actions import Action, Hold, Perform

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from uffdaemon.actions import Copy, Move
    from uffdaemon.uapi.outcomes import Outcome


class Failed(NamedTuple):
    """The fault could not be resolved: do what its region declares for that."""

    error: Exception


class Later(NamedTuple):
    """Try again when a timer expires."""

    action: Action | None
    """None: ask the policy again."""
    reason: str
    due: int | None = None
    """``time.perf_counter_ns``; None: after a delay that doubles each time, counted as DEFERRED."""


EVENT_IN_FLIGHT: Final = "an event is in flight (EAGAIN)"
"""The reason of a `Later`: events that Python has not seen come first."""


class Fetch(NamedTuple):
    """Get `length` bytes for address `start` from the action's source, then carry it out."""

    action: Copy
    start: int
    length: int


class Climb(NamedTuple):
    """MOVE alone does not help: climb the ladder in a task."""

    action: Move
    dst: int
    src: int


class AskHook(NamedTuple):
    """Await what the async ``before`` hook number `number` has returned for `action`."""

    action: Action
    answer: Awaitable[object]
    number: int


class Claimed(NamedTuple):
    """The application's own work says that it has resolved the fault: wake the thread."""

    outcome: Outcome


class Ended(NamedTuple):
    """The fault has its final outcome; `done` bytes were filled for it."""

    outcome: Outcome
    done: int = 0


class ClientGone(NamedTuple):
    """The process is gone, and its faults with it."""


Last: TypeAlias = Hold | Later | ClientGone | Fetch | Climb | AskHook | Perform
"""After these nothing is left to do for now: the fault waits, or its process is gone."""

Next: TypeAlias = Action | Ended | Failed | Claimed | Last | None
"""None: the fault is in the batch."""
