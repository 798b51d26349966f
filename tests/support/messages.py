"""Messages of a userfaultfd, read one by one.

"A thread is stuck in the fault" has one meaning: its message is readable on the userfaultfd.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from uffdaemon.uapi.events import PageFault

if TYPE_CHECKING:
    from uffdaemon.lowlevel import Event, Userfaultfd


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


def count_pending(uffd: Userfaultfd) -> int:
    """How many threads are stuck whose messages nobody has read."""
    return _fdinfo(uffd, "pending:")


def count_waiting(uffd: Userfaultfd) -> int:
    """How many threads are stuck, whether their messages were read or not."""
    return _fdinfo(uffd, "total:")


def _fdinfo(uffd: Userfaultfd, field: str) -> int:
    """userfaultfd_show_fdinfo() of fs/userfaultfd.c."""
    with open(f"/proc/self/fdinfo/{uffd.fileno()}", encoding="ascii") as info:
        return next(int(line.split()[1]) for line in info if line.startswith(field))
