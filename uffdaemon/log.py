"""The daemon's log lines, handed to the application's structlog by a thread of their own.

An application's logger may raise, or block on a full disk or pipe.  Neither stops the daemon: a
line is waited for only as long as the lines before it were written in time, and lines that are
lost are counted.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE: Final = 0.02
"""Seconds that a line is waited for, so that it is written when the call returns."""
_MOST: Final = 1000
"""Lines that wait for a logger that blocks; further ones are lost."""


class LogThread:
    """Calls a logger in a thread that exists while there are lines to write.

    `lost` is the number of lines that were dropped, or for which the logger raised.
    """

    def __init__(self) -> None:
        self.lost: int = 0
        self._lines: deque[_Line] = deque()
        self._lock = threading.Lock()
        self._running = False
        self._pid = 0
        self._late: _Line | None = None

    def write(self, call: Callable[[], object]) -> None:
        """Have `call` made, and wait for it for a short time."""
        line = _Line(call)
        late = self._late
        if self._pid != os.getpid():
            # The first line, or a forked child: the thread and its lock are the parent's.
            self._pid, self._lock, self._running, late = os.getpid(), threading.Lock(), False, None
            self._lines = deque()
        with self._lock:
            if len(self._lines) >= _MOST:
                self.lost += 1
                return
            self._lines.append(line)
            start, self._running = not self._running, True
        if start:
            try:
                threading.Thread(target=self._run, name="uffdaemon log", daemon=True).start()
            except RuntimeError:  # no more threads, or the interpreter ends
                self._running = False
                self._lines.clear()
                line.write(self)
                return
        if late is None or late.done.is_set():
            self._late = None if line.done.wait(_PATIENCE) else line

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._lines:
                    self._running = False
                    return
                line = self._lines.popleft()
            line.write(self)


class _Line:
    def __init__(self, call: Callable[[], object]) -> None:
        self.done = threading.Event()
        self._call = call
        self._context = contextvars.copy_context()

    def write(self, thread: LogThread) -> None:
        try:
            self._context.run(self._call)
        except BaseException:  # noqa: BLE001  # whatever the logger raises ends this line only
            thread.lost += 1
        finally:
            self.done.set()


class Log:
    """A logger with fields that each line gets; `logger` is structlog's, and may do anything."""

    def __init__(self, logger: object, thread: LogThread, **fields: object) -> None:
        self._logger = logger
        self._thread = thread
        self._fields = fields

    def bind(self, **fields: object) -> Log:
        """The same logger, with more fields."""
        return Log(self._logger, self._thread, **{**self._fields, **fields})

    def write(self, level: str, event: str, **fields: object) -> None:
        """Write a line at a level of structlog's; never raises."""
        line = {**self._fields, **fields}

        def call() -> None:
            method = getattr(self._logger, level, None) or getattr(self._logger, "warning")  # noqa: B009
            method(event, **line)

        self._thread.write(call)

    def info(self, event: str, **fields: object) -> None:
        """Write a line for information."""
        self.write("info", event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write a warning."""
        self.write("warning", event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Write an error."""
        self.write("error", event, **fields)
