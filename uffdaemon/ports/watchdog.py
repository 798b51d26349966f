"""The watchdog of this process: who waits for Python, when Python cannot say so itself.

Its thread is C's, since a Python thread that holds the GIL while it waits for a page stops all
others.  It looks after what is served, and after what was left by a daemon that has ended.
"""

from __future__ import annotations

import faulthandler
import signal
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, get_args

from uffdaemon.native.ports import Watch, ignore
from uffdaemon.placement import Then, Watchdog

if TYPE_CHECKING:
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.native.ports import Port

_NUMBERS: Final = {name: number for number, name in enumerate(get_args(Then))}
STACKS: Final = signal.SIGRTMAX - 1
"""The signal by which the watchdog has faulthandler write a waiting thread's Python stack."""

_abandoned: Final[dict[Userfaultfd, Watch]] = {}


def watch(uffd: Userfaultfd, port: Port, name: str, watchdog: Watchdog) -> Watch:
    """Look after a port that is served in this process.  Raises OSError."""
    return _watch(uffd, port, name, watchdog, watchdog.then)


def abandon(
    uffd: Userfaultfd, name: str, ranges: list[tuple[int, int]], watchdog: Watchdog, then: Then
) -> None:
    """Nobody serves it any more: look after it until `resume`, or until it is closed.

    Threads that wait in the ranges, (start, end), are woken: their faults have been read, and come
    again, to be seen.
    """
    left = _abandoned[uffd] = _watch(uffd, None, name, watchdog, then)
    uffd.on_close.append(partial(resume, uffd))
    for start, end in ranges:
        left.wake(start, end - start)


def resume(uffd: Userfaultfd) -> None:
    """Somebody serves it again, or it is closed."""
    left = _abandoned.pop(uffd, None)
    if left is not None:
        left.end()


def _watch(
    uffd: Userfaultfd, port: Port | None, name: str, watchdog: Watchdog, then: Then
) -> Watch:
    number = 0
    # Without standard error there is nothing to write to.
    with suppress(OSError, RuntimeError, ValueError):
        # When the interpreter ends, faulthandler restores the action that it found: a thread that
        # is still asked for its stack then must not end the process by the signal's default action.
        ignore(STACKS)
        faulthandler.register(STACKS, file=2, all_threads=False, chain=False)
        number = STACKS
    return Watch(
        uffd.fileno(), port, name, after=watchdog.after, then=_NUMBERS[then], stacks=number
    )
