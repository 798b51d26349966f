"""A daemon that is killed again and again, while its client discards, moves and forks.

The client is a process of its own that knows what each of its pages contains.  Its daemon keeps a
journal, and a keeper holds the descriptors; each successor resumes what they have.  No read may
return a wrong byte, and none may wait for ever: ``python -m tests.soak.kills 1000 7`` kills a
thousand with seed 7.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import structlog
import trio

from tests.support.deadline import DEADLINE
from uffdaemon import BytesSource, CopyFrom, Keeper, Region, actions, native, open_daemon
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon import Fault, Policy
    from uffdaemon.placement import ResolverName

PAGES: Final = 256
WAYS: Final = ("rules", "python", "thread")
"""What resolves the faults: rules in trio's sleep, a Python policy, rules in a thread."""
_COUNTS: Final = ("reads", "wrong", "discards", "moves", "writes", "forks", "lost")
FEATURES: Final = (
    Features.EVENT_REMAP | Features.EVENT_REMOVE | Features.EVENT_UNMAP | Features.EVENT_FORK
)
_HANDSHAKE: Final = struct.Struct("=QQ")
_CHILD_ACTIONS: Final = 60
_MOST_CHILDREN: Final = 3

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
_MAYMOVE_FIXED: Final = 3
_DONTNEED: Final = 4


def contents(page: int) -> bytes:
    """What the source has for a page."""
    return page.to_bytes(8, "little") * (PAGE_SIZE // 8)


IMAGE: Final = b"".join(map(contents, range(PAGES)))


class Shared:
    """Counters, and whether to end, in memory that the client and its children share."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, PAGE_SIZE)).cast("Q")

    def add(self, name: str) -> None:
        """Count one; the client's children count as well, and may get lost."""
        self._memory[_COUNTS.index(name)] += 1

    def counts(self) -> Counter[str]:
        """All counters."""
        return Counter({name: self._memory[at] for at, name in enumerate(_COUNTS)})

    @property
    def over(self) -> bool:
        """Whether the client is to end."""
        return bool(self._memory[-1])

    @over.setter
    def over(self, value: bool) -> None:
        self._memory[-1] = value


# -- the client --------------------------------------------------------------------------------


@dataclass
class Pages:
    """Where the pages of the client are, and what they contain."""

    at: list[int]
    discarded: set[int] = field(default_factory=set)
    written: dict[int, bytes] = field(default_factory=dict)

    def expected(self, page: int) -> bytes:
        """The contents of a page."""
        if page in self.written:
            return self.written[page]
        return bytes(PAGE_SIZE) if page in self.discarded else contents(page)


class Client:
    """Touches, discards, moves and writes pages, and forks children that do the same."""

    def __init__(self, pages: Pages, shared: Shared, seed: float) -> None:
        self._pages = pages
        self._shared = shared
        self._random = random.Random(seed)  # no secret
        self._children: list[int] = []

    def act(self, *, may_fork: bool) -> None:
        """Do one thing, chosen at random."""
        page, choice = self._random.randrange(PAGES), self._random.random()
        if choice < 0.6:
            self._read(page)
        elif choice < 0.85:
            for each in range(page, min(page + self._random.choice([1, 1, 3]), PAGES)):
                self._discard(each)
        elif choice < 0.93:
            self._move(page)
        elif choice < 0.97 or not may_fork:
            self._write(page)
        else:
            self._fork()

    def _read(self, page: int) -> None:
        found = native.read_memory(self._pages.at[page], PAGE_SIZE)
        self._shared.add("reads")
        if found != self._pages.expected(page):
            self._shared.add("wrong")
            print(f"page {page}: {found[:8]!r}, expected {self._pages.expected(page)[:8]!r}")

    def _discard(self, page: int) -> None:
        assert native.advise(self._pages.at[page], PAGE_SIZE, _DONTNEED) == 0
        self._pages.discarded.add(page)
        self._pages.written.pop(page, None)
        self._shared.add("discards")

    def _move(self, page: int) -> None:
        target = mapped(PAGE_SIZE)
        moved = _libc.mremap(self._pages.at[page], PAGE_SIZE, PAGE_SIZE, _MAYMOVE_FIXED, target)
        assert moved == target, os.strerror(ctypes.get_errno())
        self._pages.at[page] = target
        self._shared.add("moves")

    def _write(self, page: int) -> None:
        data = self._random.randbytes(8) * (PAGE_SIZE // 8)
        native.write_memory(self._pages.at[page], data)
        self._pages.written[page] = data
        self._shared.add("writes")

    def _fork(self) -> None:
        seed = self._random.random()
        pid = os.fork()
        if not pid:
            child = Client(self._pages, self._shared, seed)
            in_process(child.act_alone)
        self._shared.add("forks")
        self._children.append(pid)
        while len(self._children) > _MOST_CHILDREN:
            self.join()

    def act_alone(self) -> None:
        """What a child does."""
        for _ in range(_CHILD_ACTIONS):
            self.act(may_fork=False)

    def join(self) -> None:
        """Wait for the oldest child."""
        _, status = os.waitpid(self._children.pop(0), 0)
        if status:
            self._shared.add("wrong")

    def run(self) -> None:
        """Go on until told to end."""
        while not self._shared.over:
            self.act(may_fork=True)
        while self._children:
            self.join()
        for page in range(PAGES):
            self._read(page)


def mapped(length: int) -> int:
    """The address of new anonymous memory."""
    number, address = native.map_memory(-1, length, 0, PAGE_SIZE)
    assert number == 0, os.strerror(-number)
    return address


def in_process(body: Callable[[], object]) -> NoReturn:
    """Run `body` in this forked child, and end it."""
    status = 1
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(status)


def client(sock: socket.socket, shared: Shared, seed: int) -> None:
    """Register memory, hand the userfaultfd over, and use the memory."""
    start = mapped(PAGES * PAGE_SIZE)
    with Userfaultfd.open(FEATURES) as uffd:
        uffd.register(start, PAGES * PAGE_SIZE)
        socket.send_fds(sock, [_HANDSHAKE.pack(start, os.getpid())], [uffd.fileno()])
        assert sock.recv(1) == b"r"
    Client(Pages([start + page * PAGE_SIZE for page in range(PAGES)]), shared, seed).run()


# -- the daemon --------------------------------------------------------------------------------


def policy(way: str) -> Policy:
    """The policy of each daemon."""

    def ask(fault: Fault) -> actions.Action:
        del fault
        return actions.Copy(source)

    source = BytesSource(IMAGE)
    return ask if way == "python" else CopyFrom(source)


async def daemon(
    path: Path, way: str, shared: Shared, ready: int, sock: socket.socket | None
) -> None:
    """Serve the client of `sock`, or with None resume what the last daemon served."""

    def note(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
        if str(event["event"]).startswith(("child lost", "userfaultfd not kept")):
            shared.add("lost")
        raise structlog.DropEvent

    structlog.configure(processors=[note])
    resolver: ResolverName = "thread" if way == "thread" else "loop"
    with Keeper.open(path) as keeper:
        async with open_daemon(keeper=keeper) as serving:
            if sock is None:
                serving.resume_kept({"block": policy(way)}, resolver=resolver)
            else:
                uffd, message = Userfaultfd.receive(sock)
                start, pid = _HANDSHAKE.unpack(message)
                region = Region(start, PAGES * PAGE_SIZE, policy(way), name="block")
                serving.add_region(uffd, region, register=None, resolver=resolver)
                serving.watch_client(uffd, pid)
                sock.send(b"r")
            os.write(ready, b"r")
            await trio.sleep_forever()


# -- the kills ---------------------------------------------------------------------------------


@dataclass
class Report:
    """What happened."""

    kills: int
    hung: bool
    failed: bool
    """Whether a daemon or the client ended by itself in any other way than it should."""
    counts: Counter[str]

    @property
    def clean(self) -> bool:
        """Whether no byte was wrong and nobody waits."""
        return not (self.hung or self.failed or self.counts["wrong"])


class Killing:
    """One client, and one daemon at a time."""

    def __init__(self, path: Path, way: str, seed: int) -> None:
        self._path = path
        self._way = way
        self._random = random.Random(seed)  # no secret
        self._shared = Shared()
        self._failed = False
        ours, theirs = socket.socketpair()
        self._client = forked(lambda: client(theirs, self._shared, seed))
        self._daemon, self._ready = self._start(ours)
        os.read(self._ready, 1)
        self._wait_for_ready = False

    def _start(self, sock: socket.socket | None) -> tuple[int, int]:
        reader, writer = os.pipe()
        args = (self._path, self._way, self._shared, writer, sock)
        pid = forked(lambda: trio.run(daemon, *args))
        os.close(writer)
        return pid, reader

    def kill(self) -> None:
        """Kill the daemon at some moment, which may be before it is ready; start another one."""
        if self._wait_for_ready:
            self._failed |= not os.read(self._ready, 1)
        time.sleep(self._random.random() * 0.03)
        os.kill(self._daemon, signal.SIGKILL)
        os.close(self._ready)
        _, status = os.waitpid(self._daemon, 0)
        self._failed |= status != signal.SIGKILL
        self._daemon, self._ready = self._start(None)
        self._wait_for_ready = self._random.random() < 0.7

    def end(self, kills: int) -> Report:
        """Have the client end, with the daemon that is there now."""
        self._shared.over = True
        ended = select.poll()
        ended.register(os.pidfd_open(self._client))
        hung = not ended.poll(DEADLINE * 1000)
        if hung:
            os.kill(self._client, signal.SIGKILL)
        _, status = os.waitpid(self._client, 0)
        os.kill(self._daemon, signal.SIGKILL)
        os.waitpid(self._daemon, 0)
        os.close(self._ready)
        with Keeper.open(self._path, start=False) as keeper:
            keeper.stop()
        return Report(kills, hung, self._failed or bool(status), self._shared.counts())


def forked(body: Callable[[], object]) -> int:
    """The process id of a child that runs `body` and ends."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        in_process(body)
    return pid


def killed(way: str, kills: int, seed: int) -> Report:
    """Kill so many daemons of a client."""
    with tempfile.TemporaryDirectory() as directory:
        killing = Killing(Path(directory) / "keeper", way, seed)
        for _ in range(kills):
            killing.kill()
        return killing.end(kills)


def main() -> int:
    """Kill daemons of each kind; the exit status is 1 if a byte was wrong, or anybody waits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--way", choices=WAYS, action="append")
    options = parser.parse_args()
    reports = {way: killed(way, options.kills, options.seed) for way in options.way or WAYS}
    for way, report in reports.items():
        print(way, report)  # the result
    return 0 if all(report.clean for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
