"""The endpoint of one userfaultfd: its port, what serves the port, and the watchdog.

A port is served by the event loop in its sleep, or from a task if that is not possible; or by the
resolver thread; or by the faulting threads.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import trio

from uffdaemon.native.ports import Port
from uffdaemon.placement import Resolver
from uffdaemon.ports.watchdog import abandon, resume, watch

if TYPE_CHECKING:
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.native.message_journal import MessageJournal
    from uffdaemon.native.ports import Watch
    from uffdaemon.placement import Then, Watchdog
    from uffdaemon.ports.resolver import SharedResolver
    from uffdaemon.ports.trio_sleep import Sleeper


class Backends(NamedTuple):
    """What a daemon has to serve its userfaultfds."""

    sleeper: Sleeper | None
    shared_resolver: SharedResolver
    watchdog: Watchdog | None
    rereads: int


class Endpoint:
    """Serves one userfaultfd.  Raises `AlreadyServed` and OSError."""

    def __init__(
        self,
        uffd: Userfaultfd,
        resolver: Resolver,
        backends: Backends,
        name: str,
    ) -> None:
        self.resolver = resolver
        self.native: bool = resolver is not Resolver.LOOP
        """Whether C serves it independently of the event loop."""
        self.port: Port = Port(uffd.fileno(), backends.rereads, notified=self.native)
        self._uffd = uffd
        self._fd = uffd.fileno()
        self._name = name
        self._sleeper = None if self.native else backends.sleeper
        self._shared_resolver = backends.shared_resolver if self.native else None
        self._watchdog = backends.watchdog if uffd.same_process else None
        self._watch: Watch | None = None

    def start(self, journal: MessageJournal | None = None) -> None:
        """Start serving; what is read goes through the journal, if there is one."""
        if journal is not None:
            self.port.read_through(journal)
        resume(self._uffd)
        if self._sleeper is not None:
            self._sleeper.add(self._fd, self.port)
        self._uffd.copies.observers.append(self.port)
        if self._shared_resolver is not None:
            self._shared_resolver.add(self.port, self.resolver)
        if self._watchdog is not None:
            self._watch = watch(self._uffd, self.port, self._name, self._watchdog)

    def stop(self) -> None:
        """Stop serving.  Pending records can be dequeued from the port until `close`."""
        if self._watch is not None:
            self._watch.end()
        if self._sleeper is not None:
            self._sleeper.remove(self._fd)
        self._uffd.copies.observers.remove(self.port)
        if not self.native:
            self.port.hand_over()
        if self._shared_resolver is not None:
            self._shared_resolver.remove(self.port, self.resolver)

    def close(self) -> None:
        """Close the port, and wake the tasks that wait for it."""
        if self.native:
            trio.lowlevel.notify_closing(self.port.notify)
        self.port.close()
        trio.lowlevel.notify_closing(self._fd)

    @property
    def sleep_failed(self) -> bool:
        """Whether the event loop's sleep has failed, and no longer serves it."""
        return self._sleeper is not None and self._sleeper.failed

    @property
    def served_in_sleep(self) -> bool:
        """Whether the event loop's sleep serves it, so that its task only waits to be woken."""
        return self._sleeper is not None and not self._sleeper.failed

    async def wait(self) -> None:
        """Wait until there may be a record.  Raises `trio.ClosedResourceError`."""
        if self.native:
            await trio.lowlevel.wait_readable(self.port.notify)
            return
        with suppress(OSError):  # closed meanwhile
            if os.get_blocking(self._fd):  # a client cleared it: epoll would always be ready
                os.set_blocking(self._fd, False)  # the standard library's
        await trio.lowlevel.wait_readable(self._fd)

    def abandon(self, ranges: list[tuple[int, int]], then: Then | None) -> None:
        """Leave the ranges to the watchdog: threads may touch them, but nothing serves them.

        `then` overrides what the watchdog does about their faults.
        """
        if self._watchdog is not None and self.resolver is not Resolver.IN_THREAD:
            watchdog = self._watchdog
            abandon(self._uffd, self._name, ranges, watchdog, then or watchdog.then)
