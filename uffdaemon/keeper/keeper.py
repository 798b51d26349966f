"""The daemon's side of a keeper."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uffdaemon.keeper.process
from uffdaemon import errors
from uffdaemon.journal.journal import Journal
from uffdaemon.keeper.process import LIMIT, MOST, READY

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_JOURNAL: Final = "journal"
_TIMEOUT: Final = 5.0
"""Seconds that the keeper has to take a packet, or to send one."""
_CLOEXEC: Final = 0x40000000  # MSG_CMSG_CLOEXEC, unnamed in socket before 3.13


class Keeper:
    """A process that holds descriptors, so that they outlive a daemon that is killed.

    Pass it to `open_daemon`, which then gives it the userfaultfds of other processes, those of
    their children, the pidfds of `Daemon.watch_client`, and the journal.  `Daemon.resume_kept`
    takes them over.

    It listens at a Unix socket, for this user alone.  It survives the program that has started it,
    and ends with `stop`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def open(cls, path: str | Path, *, start: bool = True) -> Self:
        """Connect to the keeper that listens at `path`; start one if there is none.

        Its process is a session of its own, with this interpreter.  Raises `KeeperError`.
        """
        sock = _connect(str(path))
        if sock is None and start:
            sock = _connect_or_start(str(path))
        if sock is None:
            raise errors.KeeperError(f"no keeper listens at {path}")
        sock.settimeout(_TIMEOUT)
        return cls(sock)

    def __repr__(self) -> str:
        state = "closed" if self.fileno() < 0 else f"fd={self.fileno()}"
        return f"<Keeper {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor of the socket; -1 after `close`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection.  The keeper goes on holding what it has."""
        self._sock.close()

    def stop(self) -> None:
        """Have the keeper close everything and exit, and close the connection.

        Missing pages of processes that nobody else serves become zeros.
        """
        self._send("stop")
        self.close()

    def keep(self, name: str, *fds: int) -> None:
        """Hold descriptors under a name, in place of those it held before.

        A name has no line breaks and at most 1,000 characters.  Raises ValueError, and
        `KeeperError`.
        """
        if not name.isprintable() or not 0 < len(name) <= 1000:  # noqa: PLR2004  # as documented
            raise ValueError(f"not a name: {name!r:.100}")
        if len(fds) > MOST:
            raise ValueError(f"{len(fds)} descriptors, and a keeper takes {MOST} at once")
        self._send(f"keep {name}", *fds)

    def forget(self, name: str) -> None:
        """Have it close what it holds under a name, if anything.  Raises `KeeperError`."""
        self._send(f"forget {name}")

    def kept(self) -> dict[str, list[int]]:
        """Duplicates of all descriptors that it holds, by name.  The caller closes them.

        Raises `KeeperError`; nothing is left open then.
        """
        found: dict[str, list[int]] = {}
        self._send("list")
        try:
            while (packet := self._receive()) is not None:
                found[packet[0]] = packet[1]
        except errors.KeeperError:
            for fd in [fd for fds in found.values() for fd in fds]:
                os.close(fd)
            raise
        return found

    def journal(self) -> Journal:
        """The journal that it holds, or a new one, which it holds from now on.

        Raises `KeeperError`, `JournalError` and OSError.
        """
        kept = self.kept()
        try:
            for fd in kept.get(_JOURNAL, []):
                return Journal(fd)
        finally:
            for fd in [fd for fds in kept.values() for fd in fds]:
                os.close(fd)
        made = Journal()
        self.keep(_JOURNAL, made.fileno())
        return made

    def _send(self, text: str, *fds: int) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
        try:
            self._sock.sendmsg([text.encode()], [rights] if fds else [], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise errors.KeeperError(f"the keeper cannot be reached: {error}") from error

    def _receive(self) -> tuple[str, list[int]] | None:
        """A name and its descriptors; None after the last."""
        try:
            text, control, flags, _ = self._sock.recvmsg(
                LIMIT, socket.CMSG_SPACE(4 * MOST), _CLOEXEC
            )
        except OSError as error:
            raise errors.KeeperError(f"the keeper cannot be reached: {error}") from error
        fds = [fd for *_, data in control for (fd,) in struct.iter_unpack("=i", data)]
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise errors.KeeperError("there are no descriptors left to receive those kept")
        if not text:
            raise errors.KeeperError("the keeper has ended")
        word, _, name = text.decode().partition(" ")
        return None if word == "all" else (name, fds)


def _connect(path: str) -> socket.socket | None:
    """A connection to the keeper that listens at `path`; None if none does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise errors.KeeperError(f"{path}: {error}") from error
    _, uid, _ = struct.unpack("=3i", credentials)
    if uid not in (0, os.geteuid()):
        sock.close()
        raise errors.KeeperError(f"the keeper at {path} belongs to user {uid}")
    return sock


def _connect_or_start(path: str) -> socket.socket | None:
    """One of several programs that need the same keeper at once starts it."""
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.KeeperError(f"{path}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _connect(path) or _start(path)
    finally:
        os.close(lock)


def _start(path: str) -> socket.socket | None:
    """Start a keeper and connect to it."""
    command = [sys.executable, "-I", uffdaemon.keeper.process.__file__, "--detach", path]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.stdout != READY:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise errors.KeeperError(f"a keeper cannot be started at {path}: {last}")
    return _connect(path)
