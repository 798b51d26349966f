"""The probes: each tries one thing on the running kernel, in a child process.

`uffdaemon.check.isolation` runs them.  A probe changes nothing outside of its child.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from uffdaemon import native
from uffdaemon.errors import OpenRefused
from uffdaemon.kernel.memory import Memory
from uffdaemon.kernel.page_scan import PageCategory, scan_pages
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind, PageFault
from uffdaemon.uapi.features import Features, RegisterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from uffdaemon.check.facts import Attempt, Json
    from uffdaemon.check.isolation import Probe
    from uffdaemon.kernel.descriptor import How

Details: TypeAlias = "Mapping[str, Json]"

_DEADLINE: Final = 10.0  # seconds
_CONTENT: Final = bytes(range(256)) * (PAGE_SIZE // 256)
_NOTHING: Final[Details] = {}


class Way(NamedTuple):
    """A way to open a userfaultfd; `name` is also the name of its probe."""

    name: str
    how: How
    user_mode_only: bool = False

    def open(self, features: Features = Features(0)) -> Userfaultfd:  # noqa: B008  # immutable
        """Open a userfaultfd this way, and negotiate `features`."""
        return Userfaultfd.open(features, how=self.how, user_mode_only=self.user_mode_only)


_WAYS: Final = (
    Way("syscall", "syscall"),
    Way("device", "device"),
    Way("user_mode", "syscall", user_mode_only=True),
)
"""In order of preference."""


class UnexpectedError(Exception):
    """The kernel did something that the probe did not expect."""


def opens(way: Way) -> Details:
    """Open a userfaultfd and close it."""
    way.open().close()
    return _NOTHING


def features(way: Way) -> Details:
    """Ask the kernel for its features, without negotiating any."""
    open_it = native.open_device if way.how == "device" else native.open_syscall
    fd = open_it(user_mode_only=way.user_mode_only)
    number, bits, _ = native.handshake(fd, 0) if fd >= 0 else (fd, 0, 0)
    if number < 0:
        raise OpenRefused(-number, "UFFDIO_API" if fd >= 0 else "userfaultfd")
    return {"bits": bits}


def event_fork(way: Way) -> Details:
    """Negotiate EVENT_FORK."""
    way.open(Features.EVENT_FORK).close()
    return _NOTHING


def core(way: Way) -> Details:
    """Register a page, touch it in a thread, read the fault, copy a page there, compare."""
    uffd = way.open()
    memory = Memory.map(PAGE_SIZE)
    memory.userfaultfd = uffd
    uffd.register(memory.start, memory.length)
    seen: list[bytes] = []
    toucher = threading.Thread(target=lambda: seen.append(memory.read(0, PAGE_SIZE)), daemon=True)
    toucher.start()
    _await_fault(uffd, memory)
    result = uffd.copy(memory.start, _CONTENT)
    if not result.complete or result.done != PAGE_SIZE:
        raise UnexpectedError(f"COPY returned {result}")
    toucher.join(_DEADLINE)
    if seen != [_CONTENT]:
        raise UnexpectedError("the thread that faulted did not see the copied page")
    memory.close()
    return {"how": way.how, "kernel_faults": not way.user_mode_only}


def _await_fault(uffd: Userfaultfd, memory: Memory) -> None:
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    if not poll.poll(_DEADLINE * 1000):
        raise UnexpectedError(f"no fault was reported within {_DEADLINE:g} seconds")
    events = uffd.read_events()
    match events:
        case [PageFault(address, FaultKind.MISSING)] if address == memory.start:
            return
        case _:
            raise UnexpectedError(f"a missing page was touched, and the kernel reported {events}")


def move(way: Way) -> Details:
    """Move a page, and check that its source is empty."""
    uffd = way.open(Features.MOVE)
    source = Memory.map(PAGE_SIZE, dont_fork=True)
    target = Memory.map(PAGE_SIZE, dont_fork=True)
    target.userfaultfd = uffd
    source.write(0, _CONTENT)
    uffd.register(target.start, target.length, RegisterMode.MISSING)
    result = uffd.move(target.start, source.start, PAGE_SIZE)
    if not result.complete:
        raise UnexpectedError(f"MOVE returned {result}")
    if target.read(0, PAGE_SIZE) != _CONTENT or source.read(0, PAGE_SIZE) != bytes(PAGE_SIZE):
        raise UnexpectedError(
            "the target does not have the page's contents, or the source still does"
        )
    target.close()
    source.close()
    return _NOTHING


def pagemap_scan() -> Details:
    """Scan four pages of which one is present."""
    with Memory.map(4 * PAGE_SIZE) as memory:
        memory.touch(PAGE_SIZE, PAGE_SIZE, write=True)
        found = scan_pages(memory.start, memory.length, required=PageCategory.PRESENT)
        if [(run.start, run.length) for run in found] != [(memory.start + PAGE_SIZE, PAGE_SIZE)]:
            raise UnexpectedError(f"one page of four is present, and PAGEMAP_SCAN found {found}")
    return _NOTHING


def pidfd_getfd() -> Details:
    """Take a descriptor from this process, and one from its parent as an example of another."""
    reading, _ = os.pipe()
    refused = _take_descriptor(os.getpid(), reading)
    if refused:
        raise OpenRefused(refused, "pidfd_getfd")
    refused = _take_descriptor(os.getppid(), 0)
    # The kernel checks the permission before the number: EBADF means that it was granted.
    if refused in (0, errno.EBADF):
        return {"other_process": ""}
    return {"other_process": errno.errorcode.get(refused, str(refused))}


def _take_descriptor(pid: int, fd: int) -> int:
    """Duplicate descriptor `fd` of process `pid` and close it.  Returns 0 or an errno."""
    pidfd = native.pidfd_open(pid)
    if pidfd < 0:
        return -pidfd
    taken = native.pidfd_getfd(pidfd, fd)
    os.close(pidfd)
    if taken < 0:
        return -taken
    os.close(taken)
    return 0


def run_all(run: Callable[[Probe], Attempt]) -> dict[str, Attempt]:
    """Run every probe by `run`, which is `uffdaemon.check.isolation.attempt`.

    A probe that needs a userfaultfd opens it the best way that worked: a seccomp filter may kill
    a process for trying another.
    """
    found = {way.name: run(partial(opens, way)) for way in _WAYS}
    best = next((way for way in _WAYS if found[way.name].worked), _WAYS[-1])
    for probe in (features, event_fork, core, move):
        found[probe.__name__] = run(partial(probe, best))
    for alone in (pagemap_scan, pidfd_getfd):
        found[alone.__name__] = run(alone)
    return found
