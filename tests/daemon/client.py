"""A client: another process, which owns guarded memory and touches it when it is told to.

It is a fork of the test, made before anything else.  Each call runs in a thread of its own over
there, so that many can be stuck at a time; what comes back travels over a socket of its own.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import trio

from tests.support.clib import Helpers
from tests.support.messages import count_pending
from tests.support.page_contents import content
from uffdaemon import Advice, Memory, MemoryType, Region
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Guarded(NamedTuple):
    """What the daemon's side is told about memory that it shall guard."""

    start: int
    length: int
    page_size: int


@dataclass
class Inside:
    """What the client has."""

    hand: socket.socket
    """Where its userfaultfd is handed over."""
    memories: list[Memory] = field(default_factory=list)
    uffd: Userfaultfd | None = None
    kept: list[object] = field(default_factory=list)

    def map(
        self, length: int, kind: MemoryType = MemoryType.ANONYMOUS, *, huge: bool = False
    ) -> Guarded:
        memory = Memory.map(length, kind, transparent_huge=huge)
        self.memories.append(memory)
        return Guarded(memory.start, memory.length, memory.page_size)

    def open(self, features: Features = Features.THREAD_ID) -> None:
        """Open the userfaultfd, and send it to the daemon."""
        self.uffd = Userfaultfd.open(features)
        self.uffd.send(self.hand, b"mine")

    def register(self, which: int = -1, mode: RegisterMode = RegisterMode.MISSING) -> None:
        assert self.uffd is not None
        memory = self.memories[which]
        self.uffd.register(memory.start, memory.length, mode)

    def close_uffd(self) -> None:
        """Leave the descriptor to the daemon alone."""
        assert self.uffd is not None
        self.uffd.close()

    def make_blocking(self) -> None:
        """Clear O_NONBLOCK of the open file description that the daemon uses, too."""
        assert self.uffd is not None
        os.set_blocking(self.uffd.fileno(), True)

    def read(self, offset: int, length: int, which: int = -1) -> bytes:
        return self.memories[which].read(offset, length)

    def read_all(self, which: int = -1) -> bytes:
        return self.memories[which].read(0, self.memories[which].length)

    def write(self, offset: int, data: bytes, which: int = -1) -> None:
        self.memories[which].write(offset, data)

    def touch(
        self, offset: int = 0, length: int | None = None, which: int = -1, *, write: bool = False
    ) -> None:
        self.memories[which].touch(offset, length, write=write)

    def advise(
        self, advice: Advice, offset: int = 0, length: int | None = None, which: int = -1
    ) -> None:
        self.memories[which].advise(advice, offset, length)

    def unmap(self, offset: int, length: int, which: int = -1) -> None:
        self.memories[which].unmap(offset, length)

    def remap(self, which: int = -1) -> int:
        """Move all of it elsewhere; the new start."""
        self.memories[which].remap()
        return self.memories[which].start

    def fill_alias(self, which: int = -1) -> None:
        """Write `content` into the page cache, past the guard."""
        memory = self.memories[which]
        with memory.alias() as alias:
            alias.write(0, content(memory.length // memory.page_size, memory.page_size))

    def sigbus(self, library: Path, offset: int, *, write: bool = False) -> int:
        """Touch a byte; the si_code of the SIGBUS that came of it, 0 for none."""
        return Helpers(library).touch(self.memories[-1].start + offset, write=write)

    def fork(self, offset: int, length: int) -> bytes:
        """What a forked child reads of the newest memory."""
        reading, writing = os.pipe()
        pid = _fork()
        if pid == 0:
            _say(writing, self.memories[-1].read(offset, length))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = pipe.read()
        os.waitpid(pid, 0)
        return found


class ClientCall(Generic[T]):
    """A call that runs in a thread of the client."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said_thread = False

    async def thread(self) -> int:
        """The id of its thread, which is about to begin.  To be asked once, before `result`."""
        self._said_thread = True
        return int.from_bytes(await _receive_exactly(self._sock, 4), "little")

    async def result(self) -> T:
        """What the function returned.  Raises what it raised, and EOFError if the client died."""
        if not self._said_thread:
            await self.thread()
        length = int.from_bytes(await _receive_exactly(self._sock, 8), "little")
        pickled = await _receive_exactly(self._sock, length)
        self._sock.close()
        good, value = pickle.loads(pickled)  # noqa: S301  # from our own fork
        if not good:
            raise AssertionError(f"in the client: {value}")
        result: T = value
        return result


class Client:
    """The other side of the process.  Make it before opening what it must not inherit."""

    def __init__(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hand, hand = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Kept, since nobody needs to ask for what a call returned.
        self._calls: list[object] = []
        self.pid = _fork()
        if self.pid == 0:
            self._control.close()
            self.hand.close()
            _serve(control, Inside(hand))
        control.close()
        hand.close()

    def start(
        self, function: Callable[Concatenate[Inside, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> ClientCall[T]:
        """Have the client call a function, a method of `Inside` for instance."""
        ours, theirs = socket.socketpair()
        with theirs:
            wanted = pickle.dumps((function, args, kwargs))
            socket.send_fds(self._control, [wanted], [theirs.fileno()])
        call = ClientCall[T](ours)
        self._calls.append(call)
        return call

    async def run(
        self, function: Callable[Concatenate[Inside, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same, to its end."""
        return await self.start(function, *args, **kwargs).result()

    async def uffd(self, features: Features = Features.THREAD_ID) -> Userfaultfd:
        """Have the client open its userfaultfd; ours."""
        await self.run(Inside.open, features)
        uffd, message = Userfaultfd.receive(self.hand)
        assert message == b"mine"
        return uffd

    async def guarded(
        self,
        length: int,
        kind: MemoryType = MemoryType.ANONYMOUS,
        mode: RegisterMode = RegisterMode.MISSING,
        *,
        huge: bool = False,
    ) -> Guarded:
        """New memory, registered; `uffd` comes first."""
        memory = await self.run(Inside.map, length, kind, huge=huge)
        await self.run(Inside.register, -1, mode)
        return memory

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def status(self) -> int:
        """Wait until it has ended; `os.waitstatus_to_exitcode`."""
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])  # noqa: ASYNC222  # it has


async def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    """Not to the end of the stream: a fork of the client may keep it open."""
    data = b""
    while len(data) < length:
        await trio.lowlevel.wait_readable(sock)
        try:
            piece = sock.recv(length - len(data))
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise EOFError("the client died")
        data += piece
    return data


def region_of(guarded: tuple[int, int, int], policy: object, **options: object) -> Region:
    """The region for memory of a client."""
    start, length, page_size = guarded
    return Region(start, length, policy, page_size, **options)  # type: ignore[arg-type]


async def faults_pending(uffd: Userfaultfd, count: int) -> None:
    """Wait until so many threads are stuck whose messages nobody has read."""
    while count_pending(uffd) != count:
        await trio.lowlevel.checkpoint()


# -- over there --------------------------------------------------------------------------------


def _fork() -> int:
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, and count that of faulthandler.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _say(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as pipe:
        pipe.write(data)


def _serve(control: socket.socket, inside: Inside) -> None:
    status = 1
    try:
        while True:
            wanted, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not fds:
                break
            threading.Thread(target=_call, args=(inside, wanted, fds[0]), daemon=True).start()
        status = 0
    finally:
        os._exit(status)


def _call(inside: Inside, wanted: bytes, fd: int) -> None:
    function, args, kwargs = pickle.loads(wanted)  # noqa: S301  # from whom we were forked
    with socket.socket(fileno=fd) as sock:
        sock.sendall(threading.get_native_id().to_bytes(4, "little"))
        try:
            answer = True, function(inside, *args, **kwargs)
        except BaseException:  # noqa: BLE001  # the test hears of it
            answer = False, traceback.format_exc()
        pickled = pickle.dumps(answer)
        sock.sendall(len(pickled).to_bytes(8, "little") + pickled)
