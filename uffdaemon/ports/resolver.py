"""The resolver of a daemon: a thread that answers by rules, and never needs the interpreter.

It is started with the first userfaultfd that wants it.  Where faulting threads answer themselves,
it still reads the events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.native.ports import ResolverThread
from uffdaemon.placement import Resolver

if TYPE_CHECKING:
    from uffdaemon.native.ports import Port


class Resolving:
    """Starts and stops the thread, and gives it ports."""

    def __init__(self) -> None:
        self._thread: ResolverThread | None = None

    def add(self, port: Port, resolver: Resolver) -> None:
        """Have a port served.  Raises OSError."""
        if self._thread is None:
            self._thread = ResolverThread()
        number = self._thread.add(port)
        if number == 0 and resolver is Resolver.IN_THREAD:
            number = port.answer_in_thread()
        if number < 0:
            raise OSError(-number, f"serving a userfaultfd by {resolver.value}")

    def remove(self, port: Port, resolver: Resolver) -> None:
        """Have it served no more."""
        if self._thread is None:
            return
        if resolver is Resolver.IN_THREAD:
            port.leave_threads()
        self._thread.remove(port)

    def close(self) -> None:
        """End the thread; whatever it served has been taken from it."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
