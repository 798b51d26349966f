"""A descriptor that several threads use, and that any of them may close."""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING

from uffdaemon import errors

if TYPE_CHECKING:
    from types import TracebackType


class SharedFd:
    """A descriptor that is closed once, after its last use.

    ``with shared as fd:`` keeps `fd` open for the system call inside.  Were it closed between
    looking at its number and the call, the number could already belong to another file.  The call
    must not wait for anything that only a close would end.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._closed = fd < 0
        self._uses = 0
        self._lock = Lock()

    @property
    def closed(self) -> bool:
        """Whether `close` was called.  The last use may not be over yet."""
        return self._closed

    def number(self) -> int:
        """The descriptor.  Raises `ClosedDescriptor` after `close`."""
        if self._closed:
            raise errors.ClosedDescriptor("this userfaultfd has been closed")
        return self._fd

    def __enter__(self) -> int:
        """The descriptor.  Raises `ClosedDescriptor` after `close`."""
        with self._lock:
            fd = self.number()
            self._uses += 1
            return fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._uses -= 1
            last = self._closed and not self._uses
        if last:
            os.close(self._fd)

    def close(self) -> None:
        """Close the descriptor, or have its last user close it.  Closing it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = not self._uses
        if last:
            os.close(self._fd)
