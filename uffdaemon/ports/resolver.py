"""The resolver thread of a daemon: it resolves faults by rules, without the interpreter.

It starts with the first userfaultfd that needs it.  If faulting threads resolve their own faults,
it still reads the events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.native.ports import ResolverThread
from uffdaemon.placement import Resolver

if TYPE_CHECKING:
    from uffdaemon.native.ports import Port


class SharedResolver:
    """Starts and stops the thread, and assigns ports to it."""

    def __init__(self) -> None:
        self._thread: ResolverThread | None = None

    def add(self, port: Port, resolver: Resolver) -> None:
        """Start serving a port.  Raises OSError."""
        if self._thread is None:
            self._thread = ResolverThread()
        number = self._thread.add(port)
        if number == 0 and resolver is Resolver.IN_THREAD:
            number = port.resolve_in_threads()
        if number < 0:
            raise OSError(-number, f"serving a userfaultfd by {resolver.value}")

    def remove(self, port: Port, resolver: Resolver) -> None:
        """Stop serving a port."""
        if self._thread is None:
            return
        if resolver is Resolver.IN_THREAD:
            port.leave_threads()
        self._thread.remove(port)

    def close(self) -> None:
        """Stop the thread.  All ports must have been removed."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
