"""Calls in a thread or in a fork of this process, and barriers between them.

None waits with a limit of its own: the deadline of the test is the limit.
"""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Call(Generic[T]):
    """A call that runs in a thread of its own; `result` waits for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001  # raised again by `result`
            self._error = error
            # Who should call `result` may be waiting for this thread's answer, until the deadline.
            traceback.print_exc()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
    """Call `function` in a thread.  It must not touch guarded memory with the GIL held."""
    return Call(lambda: function(*args, **kwargs))


class Child(Generic[T]):
    """A fork of this process that calls one function; `result` waits for what it returns.

    Fork before starting threads, and do not fork memory that a thread of this process answers for
    while EVENT_FORK is on: os.fork() keeps the GIL until the event has been read.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._results, results = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._results)
                os.write(results, pickle.dumps(function()))
                status = 0
            except BaseException:  # noqa: BLE001  # the parent sees the status
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(results)

    def wait(self) -> int:
        """Reap the child, and return its wait status."""
        return os.waitpid(self.pid, 0)[1]

    def result(self) -> T:
        """What the function returned.  Fails if the child did."""
        with os.fdopen(self._results, "rb") as results:
            data = results.read()
        status = self.wait()
        assert status == 0, f"forked child ended with wait status {status:#x}; see standard error"
        value: T = pickle.loads(data)  # noqa: S301  # from our own fork
        return value


def in_child(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Child[T]:
    """Call `function` in a fork of this process."""
    return Child(lambda: function(*args, **kwargs))


class Barrier:
    """Crossed by one side, waited for by the other; works between forks."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def cross(self) -> None:
        os.write(self._write, b"x")

    def wait(self) -> None:
        assert os.read(self._read, 1) == b"x"
