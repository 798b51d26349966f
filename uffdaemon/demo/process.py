"""Starting the worker, talking with it, and noticing when it dies."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import Userfaultfd
from uffdaemon.demo.errors import DemoError, WorkerDied, WorkerFailed
from uffdaemon.demo.protocol import LIMIT, Json, Message, ProtocolError, decode, encode, short_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

__all__ = ["Worker", "started_worker"]

_PATIENCE: Final = 60.0  # seconds for a Python to start on a busy machine
_FAREWELL: Final = 2.0  # seconds for a process to end that has no reason to stay
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


class Worker:
    """A worker process and the connection with it.

    Whatever is asked of a worker that is gone raises `WorkerDied`: its end of the socket closes
    with it, however it ended.  One that says it failed raises `WorkerFailed` with its reason.
    """

    def __init__(self, process: trio.Process, errors: int, name: str) -> None:
        self.process = process
        self.name = name
        self._errors = errors
        self._sock: socket.socket | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    async def say(self, kind: str, fields: dict[str, Json] | None = None) -> None:
        """Send a message.  That nobody is there any more is for `hear` to find out, which also
        finds what the worker said last."""
        sock = self._connection()
        packet = encode(kind, fields)
        while True:
            try:
                sock.send(packet)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            except ConnectionError:
                return
            else:
                return

    async def hear(self, kind: str) -> Message:
        """The next message, which has to be of this kind."""
        return await self._hear(kind, 0)

    async def hear_userfaultfd(self) -> tuple[Userfaultfd, Message]:
        """The place of the worker's guarded memory, and its userfaultfd."""
        # A worker that could not open one says so in a packet without a descriptor: look first.
        message = await self._hear("memory", socket.MSG_PEEK)
        uffd, _packet = Userfaultfd.receive(self._connection(), LIMIT)
        return uffd, message

    async def _hear(self, kind: str, flags: int) -> Message:
        sock = self._connection()
        await trio.lowlevel.wait_readable(sock)
        try:
            packet = sock.recv(LIMIT, flags)
        except ConnectionResetError:
            # Said once, when the worker closed with something unread; what it said is still there.
            packet = sock.recv(LIMIT, flags)
        if not packet:
            raise await self.death()
        message = decode(packet)
        if message.kind == "failed":
            raise WorkerFailed(f"the worker ({self.name}): {message.text('error')}")
        if message.kind != kind:
            raise ProtocolError(f"the worker said {message.kind!r} and not {kind!r}")
        return message

    def _connection(self) -> socket.socket:
        if self._sock is None:
            raise DemoError("the worker is not connected")
        return self._sock

    async def connect(self, listener: socket.socket) -> None:
        """Wait until the worker, and nobody else, has connected."""
        async with trio.open_nursery() as nursery:

            async def until_it_ends() -> None:
                await self.process.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_it_ends)
            with trio.move_on_after(_PATIENCE):
                await trio.lowlevel.wait_readable(listener)
            nursery.cancel_scope.cancel()
        try:
            sock, _address = listener.accept()
        except BlockingIOError as error:
            raise await self.death() from error
        sock.settimeout(0)
        self._sock = sock
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[0] != self.pid:
            raise DemoError("another process connected in the worker's place")

    async def end(self) -> None:
        """Make sure that the process is gone: it ends when its connection does, or is killed."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        with trio.CancelScope(shield=True):
            if not await self._ended():
                self.process.kill()
                await self.process.wait()

    async def _ended(self) -> bool:
        with trio.move_on_after(_FAREWELL):
            await self.process.wait()
        return self.process.returncode is not None

    async def death(self) -> WorkerDied:
        """What there is to say about a worker that closed its connection, or never had one."""
        if not await self._ended():
            return WorkerDied(f"the worker ({self.name}, pid {self.pid}) does not answer")
        status = self.process.returncode or 0
        text = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
        last = self._last_words()
        return WorkerDied(
            f"the worker ({self.name}, pid {self.pid}) {text}{': ' if last else ''}{last}"
        )

    def _last_words(self) -> str:
        size = os.fstat(self._errors).st_size
        written = os.pread(self._errors, 4096, max(size - 4096, 0)).decode(errors="replace")
        lines = written.strip().splitlines()
        return lines[-1] if lines else ""


@asynccontextmanager
async def started_worker(folder: Path, name: str) -> AsyncGenerator[Worker]:
    """A connected worker, which is gone at the end of the block.

    `folder` is where its Unix socket is made; `name` is for people.
    """
    path = folder / "daemon.socket"
    errors = os.memfd_create("worker errors")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(0)
            with short_name(os.fspath(path)) as name_for_bind:
                listener.bind(name_for_bind)
            listener.listen(1)
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "uffdaemon.demo.worker", os.fspath(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                process_group=0,  # Ctrl-C is for the daemon's side to answer
            )
            worker = Worker(process, errors, name)
            try:
                await worker.connect(listener)
                await worker.hear("hello")
                yield worker
            finally:
                await worker.end()
    finally:
        os.close(errors)
        path.unlink(missing_ok=True)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
