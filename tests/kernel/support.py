"""What the bodies of kernel tests share.  None of it waits with a limit: the deadline is the limit.

"A thread is stuck in the fault" has one meaning: its message is readable on the userfaultfd.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import threading
import traceback
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from uffdaemon.uapi.events import PageFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon import Event, Userfaultfd

P = ParamSpec("P")
T = TypeVar("T")

PAGE = 4096
_PAGEMAP_WP = 1 << 57  # Documentation/admin-guide/mm/pagemap.rst
_PAGEMAP_EXCLUSIVE = 1 << 56


# -- threads -----------------------------------------------------------------------------------


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


# -- messages ----------------------------------------------------------------------------------


def wait_readable(fd: int | Userfaultfd) -> None:
    """Wait until something is there to read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    [(_, what)] = poll.poll()
    assert what & select.POLLIN, f"poll says {what:#x}"


def next_events(uffd: Userfaultfd) -> list[Event]:
    """Wait for messages, and read all that are pending."""
    wait_readable(uffd)
    return uffd.read_events()


def next_event(uffd: Userfaultfd) -> Event:
    """Wait for the one message that is to come."""
    [event] = next_events(uffd)
    return event


def next_fault(uffd: Userfaultfd) -> PageFault:
    """Wait until a thread is stuck, and say where."""
    event = next_event(uffd)
    assert isinstance(event, PageFault), event
    return event


# -- processes ---------------------------------------------------------------------------------


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


# -- memory ------------------------------------------------------------------------------------


def _pagemap(address: int) -> int:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        [entry] = struct.unpack("=Q", pagemap.read(8))
    return int(entry)


def write_protected(address: int) -> bool:
    """Whether the page of this process carries the uffd-wp bit, or a marker that does."""
    return bool(_pagemap(address) & _PAGEMAP_WP)


def exclusive(address: int) -> bool:
    """Whether the page is mapped by this process alone."""
    return bool(_pagemap(address) & _PAGEMAP_EXCLUSIVE)
