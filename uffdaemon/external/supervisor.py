"""The supervisor of an external policy: starts the worker, and another one when it dies.

The owner of the memory runs this file as a script, with four descriptors:
``python supervisor.py USERFAULTFD SOCKET PLAN PAGES``.  It uses only the standard library, and
never waits for the owner: when the worker dies, a thread that waits for a page with the GIL held
may have stopped the owner's interpreter.  It keeps the userfaultfd open as long as it runs.

It exits, with the worker, when the owner closes the socket or shuts it down.  It restarts a worker
that dies: at once the first time, then after delays that double.  After ``restarts`` deaths in a
row it gives the policy up: later workers do not load it, and fail every fault with the reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

_FIRST_DELAY = 0.05
_MAX_DELAY = 5.0
_STABLE = 10.0
"""Seconds after which the death of a worker does not count as one in a row."""
READ_TIMEOUT = 1.0
"""Seconds that the owner has to read a report."""


class OwnerLog:
    """Reports to the owner, or on standard error if the owner does not read them in time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unread: list[str] = []
        self._since = 0.0

    def write(self, packet: bytes, line: str) -> bool:
        """Send a packet to the owner, without waiting; `line` is its text for standard error.

        Returns whether the packet was sent.
        """
        try:
            self._sock.send(packet, socket.MSG_DONTWAIT)
        except BlockingIOError:  # the owner has not read for a long time
            _print(line)
            return False
        except OSError:  # the owner is gone
            return False
        if not self._unread:
            self._since = time.monotonic()
        self._unread.append(line)
        return True

    @property
    def check_in(self) -> float | None:
        """Seconds until `check` should be called; None if there is nothing to check."""
        if not self._unread:
            return None
        return max(self._since + READ_TIMEOUT - time.monotonic(), 0.0)

    def check(self) -> None:
        """Print what the owner has not read in time."""
        all_read = self._all_read()
        if not self._unread or (self.check_in and not all_read):
            return
        if not all_read:
            self.print_unread("is not reading its reports")
        self._unread.clear()

    def print_unread(self, why: str) -> None:
        """Print the lines that the owner may not have read, and why."""
        if self._unread:
            _print(f"uffdaemon: owner {why}; logging on its behalf:")
            for line in self._unread:
                _print(line)
        self._unread.clear()

    def _all_read(self) -> bool:
        """Whether the owner has read every packet."""
        queued = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        return struct.unpack("=i", queued) == (0,)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  # the owner does not read


class _SavedState:
    """What the next worker needs to know: messages by number, each with its descriptors.

    The userfaultfds of forked children must stay open: if they were closed, the children would read
    zeros.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[bytes, list[int]]] = {}

    def receive(self, sock: socket.socket) -> bool:
        """Receive one message from the worker; False at the end of the stream."""
        message, control, _, _ = sock.recvmsg(
            1 << 16, socket.CMSG_SPACE(8), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            return False
        fds = [fd for *_, data in control for (fd,) in struct.iter_unpack("=i", data)]
        fields = json.loads(message)
        _, known = self._kept.pop(fields["number"], (b"", []))
        if fields["segments"] is None:  # its process is gone
            for fd in known:
                os.close(fd)
        else:
            self._kept[fields["number"]] = message, fds or known
        return True

    def send(self, sock: socket.socket) -> None:
        """Send everything to a worker.  Raises OSError if it exits before it has read it."""
        for message, fds in self._kept.values():
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
            sock.sendmsg([message], [rights] if fds else [])
        sock.send(b"all")


class _Supervisor:
    def __init__(self, uffd: int, sock: socket.socket, plan: int, pages: int) -> None:
        fields = json.loads(os.pread(plan, os.fstat(plan).st_size, 0))
        self._command: list[str] = fields["command"]
        self._name: str = fields["policy"]
        self._exit_timeout: float = fields["exit_timeout"]
        self._restarts: int = fields["restarts"]
        self._fds = (uffd, sock.fileno(), plan, pages)
        self._sock = sock
        self._log = OwnerLog(sock)
        self._deaths = 0
        self._saved = _SavedState()

    def run(self) -> None:
        """Run workers until the owner closes the socket or shuts it down."""
        given_up = ""
        while True:
            begun = time.monotonic()
            status = self._run_worker(given_up)
            if status is None:
                return
            self._deaths = 1 if time.monotonic() - begun > _STABLE else self._deaths + 1
            delay = min(_FIRST_DELAY * 2.0 ** (self._deaths - 2), _MAX_DELAY)
            if self._deaths == 1:
                delay = 0.0
            self._report("died", f"the worker {status}", again_in=delay)
            if self._deaths == self._restarts + 1 and not given_up:
                given_up = f"its worker died {self._deaths} times in a row; the last one {status}"
                self._report("given up", given_up)
            if self._owner_closes(delay):
                return

    def _run_worker(self, given_up: str) -> str | None:
        """Run one worker and return how it ended; None if the owner has closed the socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (*self._fds, theirs.fileno())
        with ours:
            with theirs:
                command = [*self._command, *map(str, fds), given_up]
                try:
                    worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds)
                except OSError as error:
                    return f"cannot be started: {error}"
            pidfd = os.pidfd_open(worker.pid)
            try:
                with suppress(OSError):
                    self._saved.send(ours)
                if self._wait(pidfd, ours):
                    return _status(worker.wait())
                # The worker sees the owner close, too, and exits by itself.
                if not _readable(pidfd, self._exit_timeout):
                    worker.kill()
                worker.wait()
                return None
            finally:
                os.close(pidfd)

    def _wait(self, pidfd: int, worker: socket.socket) -> bool:
        """Wait until the worker has exited (True) or the owner has closed the socket (False)."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._sock, select.POLLRDHUP)
        poll.register(worker, select.POLLIN)
        while True:
            seconds = self._log.check_in
            found = dict(poll.poll(None if seconds is None else seconds * 1000 + 1))
            self._log.check()
            # First what the worker sent before it exited.
            if worker.fileno() in found:
                if not self._saved.receive(worker):
                    poll.unregister(worker)
            elif self._sock.fileno() in found:
                return False
            elif pidfd in found:
                return True

    def _owner_closes(self, seconds: float) -> bool:
        """Wait; returns whether the owner has closed the socket by then."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        closed = bool(poll.poll(seconds * 1000))
        self._log.check()
        return closed

    def _report(self, kind: str, text: str, **fields: float) -> None:
        packet = json.dumps({"kind": kind, "text": text, **fields}).encode()
        self._log.write(packet, f"uffdaemon: external policy {self._name}: {text}")


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _status(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}"


def main(arguments: list[str]) -> None:
    """Run with the descriptors that the owner passes as arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    fds = [int(argument) for argument in arguments]
    for fd in fds:
        os.set_inheritable(fd, False)  # noqa: FBT003  # the standard library's
    uffd, sock, plan, pages = fds
    _Supervisor(uffd, socket.socket(fileno=sock), plan, pages).run()


if __name__ == "__main__":
    main(sys.argv[1:])
