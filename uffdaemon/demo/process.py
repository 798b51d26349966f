"""The worker process as the daemon's side sees it: start, messages, exit."""

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

from uffdaemon.demo.errors import DemoError, WorkerDied, WorkerFailed
from uffdaemon.demo.protocol import LIMIT, Json, Message, ProtocolError, decode, encode, short_name
from uffdaemon.lowlevel import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

__all__ = ["Worker", "start_worker"]

_START_TIMEOUT: Final = 60.0  # seconds for Python to start on a busy machine
_EXIT_TIMEOUT: Final = 2.0  # seconds for the process to exit by itself
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


class Worker:
    """A worker process and the connection to it.

    `receive` raises `WorkerDied` if the worker has exited, and `WorkerFailed` if the worker
    reported an error.
    """

    def __init__(self, process: trio.Process, errors: int, name: str) -> None:
        self.process = process
        self.name = name
        self._errors = errors
        self._sock: socket.socket | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    async def send(self, kind: str, fields: dict[str, Json] | None = None) -> None:
        """Send a message.  If the worker has gone, `receive` raises, after its last messages."""
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

    async def receive(self, kind: str) -> Message:
        """Receive the next message.  Raises `ProtocolError` if it is not of this kind."""
        return await self._receive(kind, 0)

    async def receive_userfaultfd(self) -> tuple[Userfaultfd, Message]:
        """Receive the worker's userfaultfd, with the address of the guarded memory."""
        # If the worker could not open one, it sends "failed" without a descriptor: peek first.
        message = await self._receive("memory", socket.MSG_PEEK)
        uffd, _packet = Userfaultfd.receive(self._connection(), LIMIT)
        return uffd, message

    async def _receive(self, kind: str, flags: int) -> Message:
        sock = self._connection()
        await trio.lowlevel.wait_readable(sock)
        try:
            packet = sock.recv(LIMIT, flags)
        except ConnectionResetError:
            # Returned once if the worker closed with unread data.  Its messages are still queued.
            packet = sock.recv(LIMIT, flags)
        if not packet:
            raise await self.exit_error()
        message = decode(packet)
        if message.kind == "failed":
            raise WorkerFailed(f"the worker ({self.name}): {message.text('error')}")
        if message.kind != kind:
            raise ProtocolError(f"the worker sent {message.kind!r} instead of {kind!r}")
        return message

    def _connection(self) -> socket.socket:
        if self._sock is None:
            raise DemoError("the worker is not connected")
        return self._sock

    async def connect(self, listener: socket.socket) -> None:
        """Accept the worker's connection.  Raises `DemoError` if another process connected."""
        async with trio.open_nursery() as nursery:

            async def cancel_at_exit() -> None:
                await self.process.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_at_exit)
            with trio.move_on_after(_START_TIMEOUT):
                await trio.lowlevel.wait_readable(listener)
            nursery.cancel_scope.cancel()
        try:
            sock, _address = listener.accept()
        except BlockingIOError as error:
            raise await self.exit_error() from error
        sock.settimeout(0)
        self._sock = sock
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[0] != self.pid:
            raise DemoError("another process connected in the worker's place")

    async def end(self) -> None:
        """Close the connection, at which the worker exits; kill it if it does not."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        with trio.CancelScope(shield=True):
            if not await self._wait_briefly():
                self.process.kill()
                await self.process.wait()

    async def _wait_briefly(self) -> bool:
        with trio.move_on_after(_EXIT_TIMEOUT):
            await self.process.wait()
        return self.process.returncode is not None

    async def exit_error(self) -> WorkerDied:
        """The error for a worker that closed its connection, or never connected."""
        if not await self._wait_briefly():
            return WorkerDied(f"the worker ({self.name}, pid {self.pid}) does not respond")
        status = self.process.returncode or 0
        text = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
        last = self._last_error_line()
        return WorkerDied(
            f"the worker ({self.name}, pid {self.pid}) {text}{': ' if last else ''}{last}"
        )

    def _last_error_line(self) -> str:
        size = os.fstat(self._errors).st_size
        written = os.pread(self._errors, 4096, max(size - 4096, 0)).decode(errors="replace")
        lines = written.strip().splitlines()
        return lines[-1] if lines else ""


@asynccontextmanager
async def start_worker(folder: Path, name: str) -> AsyncGenerator[Worker]:
    """Start a worker and connect to it.  It has exited when the block ends.

    The Unix socket is made in `folder`; `name` is for messages to the user.
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
                process_group=0,  # Ctrl-C is for the daemon's side only
            )
            worker = Worker(process, errors, name)
            try:
                await worker.connect(listener)
                await worker.receive("hello")
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
