"""The supervisor of an external policy: starts the worker, and a successor when that dies.

A script of its own, which the owner of the memory runs with four descriptors:
``python supervising.py USERFAULTFD SOCKET PLAN REMOVED``.  It needs the standard library alone, and
nothing of its owner, whose interpreter may be stopped when a worker dies, by a thread that waits
for a page with the GIL held.  As long as it lives, it holds the userfaultfd.

It ends, with the worker, when its owner's end of the socket closes or is shut down.  A worker that
dies is followed by another: at once, then after delays that double.  After ``restarts`` deaths in a
row the policy is given up: the next workers do not load it, and fail each fault with the reason.
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
_STEADY = 10.0
"""Seconds after which a worker that dies has not died in a row with those before it."""
HEARING = 1.0
"""Seconds that the owner has for taking what it is told."""


class Lines:
    """What the owner has to hear of, and if its interpreter is stopped, whoever reads standard
    error."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unheard: list[str] = []
        self._since = 0.0

    def say(self, packet: bytes, line: str) -> bool:
        """Tell the owner, without waiting for it; `line` is the same for people.  False: it could
        not be told."""
        try:
            self._sock.send(packet, socket.MSG_DONTWAIT)
        except BlockingIOError:  # it has not read for long
            _print(line)
            return False
        except OSError:  # it is gone, and nobody is left who wants to know
            return False
        if not self._unheard:
            self._since = time.monotonic()
        self._unheard.append(line)
        return True

    @property
    def due(self) -> float | None:
        """In how many seconds `check` wants to be called; None: not at all."""
        if not self._unheard:
            return None
        return max(self._since + HEARING - time.monotonic(), 0.0)

    def check(self) -> None:
        """Print what the owner has not taken, if it has had its time."""
        heard = self._heard()
        if not self._unheard or (self.due and not heard):
            return
        if not heard:
            self.show("does not listen")
        self._unheard.clear()

    def show(self, why: str) -> None:
        """Print what the owner has perhaps not taken, and why that is."""
        if self._unheard:
            _print(f"uffdaemon: the process whose memory it is {why}; for it:")
            for line in self._unheard:
                _print(line)
        self._unheard.clear()

    def _heard(self) -> bool:
        """Whether all that was ever sent has been read."""
        answer = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        return struct.unpack("=i", answer) == (0,)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  # the last way to be heard


class _Estate:
    """What workers leave to their successors: messages, each with the descriptors that belong to
    it, by number.  Descriptors of children live as long as they are kept here: were they closed,
    the children would read zeros."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[bytes, list[int]]] = {}

    def take(self, sock: socket.socket) -> bool:
        """Take one message; False: no more will come."""
        message, control, _, _ = sock.recvmsg(
            1 << 16, socket.CMSG_SPACE(8), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            return False
        fds = [fd for *_, data in control for (fd,) in struct.iter_unpack("=i", data)]
        read = json.loads(message)
        _, known = self._kept.pop(read["number"], (b"", []))
        if read["segments"] is None:  # its process is gone
            for fd in known:
                os.close(fd)
        else:
            self._kept[read["number"]] = message, fds or known
        return True

    def hand_over(self, sock: socket.socket) -> None:
        """Give a worker everything.  Raises OSError when it is gone before it has taken it."""
        for message, fds in self._kept.values():
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
            sock.sendmsg([message], [rights] if fds else [])
        sock.send(b"all")


class _Supervisor:
    def __init__(self, uffd: int, sock: socket.socket, plan: int, removed: int) -> None:
        read = json.loads(os.pread(plan, os.fstat(plan).st_size, 0))
        self._command: list[str] = read["command"]
        self._name: str = read["policy"]
        self._patience: float = read["patience"]
        self._restarts: int = read["restarts"]
        self._fds = (uffd, sock.fileno(), plan, removed)
        self._sock = sock
        self._lines = Lines(sock)
        self._deaths = 0
        self._estate = _Estate()

    def run(self) -> None:
        """Until the owner is gone, or has had enough."""
        given_up = ""
        while True:
            begun = time.monotonic()
            status = self._run_worker(given_up)
            if status is None:
                return
            self._deaths = 1 if time.monotonic() - begun > _STEADY else self._deaths + 1
            delay = min(_FIRST_DELAY * 2.0 ** (self._deaths - 2), _MAX_DELAY)
            if self._deaths == 1:
                delay = 0.0
            self._tell("died", f"the worker {status}", again_in=delay)
            if self._deaths == self._restarts + 1 and not given_up:
                given_up = f"its worker died {self._deaths} times in a row; the last one {status}"
                self._tell("given up", given_up)
            if self._owner_leaves(delay):
                return

    def _run_worker(self, given_up: str) -> str | None:
        """Start one, and say how it ended.  None: the owner is gone, and so is the worker."""
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
                    self._estate.hand_over(ours)
                if self._wait(pidfd, ours):
                    return _status(worker.wait())
                # It has seen the same, and ends by itself.
                if not _readable(pidfd, self._patience):
                    worker.kill()
                worker.wait()
                return None
            finally:
                os.close(pidfd)

    def _wait(self, pidfd: int, estate: socket.socket) -> bool:
        """Until the worker has ended; False: until the owner is gone."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._sock, select.POLLRDHUP)
        poll.register(estate, select.POLLIN)
        while True:
            due = self._lines.due
            found = dict(poll.poll(None if due is None else due * 1000 + 1))
            self._lines.check()
            # What a worker said before it died is heard, and comes first.
            if estate.fileno() in found:
                if not self._estate.take(estate):
                    poll.unregister(estate)
            elif self._sock.fileno() in found:
                return False
            elif pidfd in found:
                return True

    def _owner_leaves(self, seconds: float) -> bool:
        """Wait; whether the owner is gone by then."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        left = bool(poll.poll(seconds * 1000))
        self._lines.check()
        return left

    def _tell(self, kind: str, text: str, **fields: float) -> None:
        packet = json.dumps({"kind": kind, "text": text, **fields}).encode()
        self._lines.say(packet, f"uffdaemon: external policy {self._name}: {text}")


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
    """Run with the descriptors that the owner has passed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    fds = [int(argument) for argument in arguments]
    for fd in fds:
        os.set_inheritable(fd, False)  # noqa: FBT003  # the standard library's
    uffd, sock, plan, removed = fds
    _Supervisor(uffd, socket.socket(fileno=sock), plan, removed).run()


if __name__ == "__main__":
    main(sys.argv[1:])
