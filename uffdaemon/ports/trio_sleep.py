"""Serves userfaultfds while trio sleeps.

When no task is runnable, trio is about to sleep in epoll_wait(2).  At that moment
(`trio.abc.Instrument.before_io_wait`) a `Sleeper` sleeps in its place, in C and without the GIL.
It waits for the userfaultfds and for trio's own epoll descriptor together, and resolves faults by
rules.  It returns as soon as trio has anything to do.  So trio schedules its tasks as ever, while a
fault costs what it costs in C.

No private interface is needed to find trio's epoll descriptor: it is the one whose fdinfo lists a
descriptor that a task is waiting for.  If that fails, or under a guest loop, whose thread must not
sleep here, `Sleeper.join` returns None, and tasks serve the userfaultfds.
"""

from __future__ import annotations

import errno
import inspect
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import errors
from uffdaemon.native.ports import LOOP, WAIT_LOOP, WAIT_TIME, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.native.ports import Port

_MAX_TIMEOUT: Final = 3600.0


class Sleeper(trio.abc.Instrument):
    """Sleeps for one trio run, and serves its ports."""

    def __init__(self, loop_epoll: int) -> None:
        self._waiter = Waiter()
        number = self._waiter.add(loop_epoll, LOOP)
        if number < 0:
            os.close(self._waiter.fd)
            raise OSError(-number, "epoll_ctl on the event loop's descriptor")
        self._users: list[Callable[[], None]] = []
        self._token = trio.lowlevel.current_trio_token()
        self._ports = 0
        self.failed: bool = False
        """Whether sleeping has failed: then tasks must serve the userfaultfds."""

    @classmethod
    async def join(cls, wake: Callable[[], None]) -> Sleeper | None:
        """The sleeper of the current trio run; it calls `wake` when a port has records.

        All daemons of a run share one, since only one can sleep at a time.  None if trio's
        descriptor cannot be found.
        """
        epoll = await _find_loop_epoll()
        if epoll is None:
            return None
        sleeper = _sleeper.get()
        if sleeper is None:
            sleeper = cls(epoll)
            trio.lowlevel.add_instrument(sleeper)
            _sleeper.set(sleeper)
        sleeper._users.append(wake)  # an attribute of the same class
        return sleeper

    def leave(self, wake: Callable[[], None]) -> None:
        """Undo `join`.  After the last one, trio sleeps in its own epoll again."""
        self._users.remove(wake)
        if not self._users:
            trio.lowlevel.remove_instrument(self)
            _sleeper.set(None)
            os.close(self._waiter.fd)

    def add(self, fd: int, port: Port) -> None:
        """Serve a port while asleep."""
        number = self._waiter.add(fd, port.address)
        if number == -errno.EEXIST:
            raise errors.AlreadyServed(f"userfaultfd {fd} is served by another daemon")
        if number < 0:
            raise OSError(-number, "epoll_ctl on a userfaultfd")
        self._ports += 1

    def remove(self, fd: int) -> None:
        """Stop serving the userfaultfd, which must still be open."""
        self._waiter.remove(fd)
        self._ports -= 1

    def before_io_wait(self, timeout: float) -> None:
        """Sleep in trio's place; trio is about to sleep for at most `timeout` seconds."""
        if not self._ports or self.failed:
            return
        came = self._waiter.wait(int(min(timeout, _MAX_TIMEOUT) * 1e9))
        self.failed = came < 0
        # After this trio sleeps for `timeout`, unless its own descriptor is ready: wake it.
        if came not in (WAIT_TIME, WAIT_LOOP) or (came == WAIT_TIME and timeout > 0):
            self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        for wake in self._users:
            wake()


def in_guest_mode() -> bool:
    """Whether trio runs as a guest of another event loop, which must not sleep in its place.

    To be called in trio.  A guest is not run by `trio.run`.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not trio.run.__code__:
        frame = frame.f_back
    return frame is None


_sleeper: trio.lowlevel.RunVar[Sleeper | None] = trio.lowlevel.RunVar("uffdaemon sleeper", None)


async def _find_loop_epoll() -> int | None:
    """The epoll descriptor on which trio waits: the one that has a descriptor of a waiting task."""
    ours, theirs = socket.socketpair()
    found: int | None = None
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, ours)
            # After these the task has run, and waits.
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            found = _epoll_with(ours.fileno())
            nursery.cancel_scope.cancel()
    return found


def _epoll_with(fd: int) -> int | None:
    """The epoll descriptor of this process that has `fd` in its interest list."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) != "anon_inode:[eventpoll]":
                continue
            lines = Path("/proc/self/fdinfo", entry.name).read_text("ascii").splitlines()
        except OSError:  # closed meanwhile, or no /proc
            continue
        for line in lines:
            words = line.split()
            if words[:1] == ["tfd:"] and int(words[1]) == fd:
                return int(entry.name)
    return None
