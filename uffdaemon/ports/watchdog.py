"""The watchdog of this process: reports faults that Python does not dequeue or finish in time.

It is a C thread, because a thread that waits for a page with the GIL held stops all Python threads.
It covers the userfaultfds that are served, and those that a daemon left when it ended.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, get_args

from uffdaemon.native.ports import Watch, ignore, read_stacks_from
from uffdaemon.placement import Then, Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.native.ports import Port

_NUMBERS: Final = {name: number for number, name in enumerate(get_args(Then))}
STACKS: Final = signal.SIGRTMAX - 1
"""The signal at which faulthandler writes the Python stack of a waiting thread."""

_pipes: Final[dict[int, int]] = {}
"""By process: the write end of the pipe that threads write their stacks to."""

_abandoned: Final[dict[Userfaultfd, tuple[Watch, Callable[[], None]]]] = {}


def watch(uffd: Userfaultfd, port: Port, name: str, watchdog: Watchdog) -> Watch:
    """Start the watchdog for a port that this process serves.  Raises OSError."""
    return _watch(uffd, port, name, watchdog, watchdog.then)


def abandon(
    uffd: Userfaultfd, name: str, ranges: list[tuple[int, int]], watchdog: Watchdog, then: Then
) -> None:
    """Start the watchdog for a userfaultfd that is no longer served, until `resume` or its close.

    Threads that wait in the ranges, (start, end), are woken.  Their faults have been read before;
    they fault again, and the watchdog sees them.
    """
    left = _watch(uffd, None, name, watchdog, then)
    closing = partial(resume, uffd)
    _abandoned[uffd] = left, closing
    uffd.on_close.append(closing)
    for start, end in ranges:
        left.wake(start, end - start)


def resume(uffd: Userfaultfd) -> None:
    """Undo `abandon`: it is served again, or closed."""
    if uffd in _abandoned:
        left, closing = _abandoned.pop(uffd)
        if closing in uffd.on_close:
            uffd.on_close.remove(closing)
        left.end()


def _watch(
    uffd: Userfaultfd, port: Port | None, name: str, watchdog: Watchdog, then: Then
) -> Watch:
    number = 0
    with suppress(OSError, RuntimeError, ValueError):
        # When the interpreter ends, faulthandler restores the action that it found: a thread that
        # is still asked for its stack then must not end the process by the signal's default action.
        ignore(STACKS)
        faulthandler.register(STACKS, file=_stacks_pipe(), all_threads=False, chain=False)
        number = STACKS
    return Watch(
        uffd.fileno(), port, name, after=watchdog.after, then=_NUMBERS[then], stacks=number
    )


def _stacks_pipe() -> int:
    """Where threads of this process write their stacks: a pipe, since standard error may be full.
    What finds no room there is lost."""
    process = os.getpid()
    if process not in _pipes:  # a forked child must not write to its parent's
        reading, _pipes[process] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        read_stacks_from(reading)
    return _pipes[process]
