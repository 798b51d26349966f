"""The keeper's process: holds descriptors by name, and sends them to whoever connects.

``python process.py PATH`` listens at the Unix socket PATH, and exits when it is told to; with
``--detach`` in front, as a background process.  It uses only the standard library, and takes no
part in serving: a few milliseconds to start, and nothing in it that could fail.

Packets of the socket (SOCK_SEQPACKET) are text, with descriptors where noted:

    keep NAME     with descriptors: hold them under this name, in place of those it held before
    forget NAME   close them
    list          it sends "held NAME" with the descriptors for each name, then "all"
    stop          close everything, and exit
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

LIMIT = 2048
"""The maximum length of a packet, in bytes."""
MOST = 16
"""Descriptors in a packet."""
READY = b"ready\n"


class _Keeper:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._held: dict[str, list[int]] = {}
        self._peers: dict[int, socket.socket] = {}
        self._stopped = False
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self) -> None:
        """Serve until somebody sends "stop"."""
        while not self._stopped:
            for fd, _ in self._poll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._peers:
                    self._handle(fd)

    def _accept(self) -> None:
        with suppress(OSError):  # no descriptors: it stays in the queue
            peer, _ = self._listener.accept()
            self._peers[peer.fileno()] = peer
            self._poll.register(peer, select.POLLIN)

    def _handle(self, number: int) -> None:
        """Handle one packet."""
        peer = self._peers[number]
        try:
            text, fds, flags, _ = socket.recv_fds(peer, LIMIT, MOST)
        except OSError:
            text, fds, flags = b"", [], 0
        word, _, name = text.decode(errors="replace").partition(" ")
        if not text:
            self._poll.unregister(number)
            self._peers.pop(number).close()
        elif word == "keep" and not flags & socket.MSG_CTRUNC:
            self._forget(name)
            self._held[name], fds = fds, []
        elif word == "forget":
            self._forget(name)
        elif word == "list":
            self._catch_up(number)
            with suppress(OSError):  # it has gone
                self._send_all(peer)
        elif word == "stop":
            self._stopped = True
        for fd in fds:
            os.close(fd)

    def _catch_up(self, asking: int) -> None:
        """Handle what others have sent by now: the last of them may have been killed since."""
        poll = select.poll()
        for number in self._peers:
            if number != asking:
                poll.register(number, select.POLLIN)
        while ready := [fd for fd, _ in poll.poll(0) if fd in self._peers]:
            for number in ready:
                self._handle(number)
                if number not in self._peers:
                    poll.unregister(number)

    def _forget(self, name: str) -> None:
        for fd in self._held.pop(name, []):
            os.close(fd)

    def _send_all(self, peer: socket.socket) -> None:
        for name, fds in self._held.items():
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
            peer.sendmsg([f"held {name}".encode()], [rights] if fds else [])
        peer.send(b"all")


def _detach() -> None:
    """Go on as a background process, whose parent does not wait for it."""
    if os.fork():
        os._exit(0)
    os.setsid()


def _release_output() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)


def main(path: str, *, detach: bool) -> None:
    """Listen at `path`, and serve.  With `detach`, writes "ready" to standard output first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon
    if detach:
        _detach()
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108  # pathlib takes time to import
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        mask = os.umask(0o077)  # for this user alone
        listener.bind(path)
        os.umask(mask)
        listener.listen(16)
        if detach:
            with suppress(OSError):  # whoever has started it may be gone
                os.write(1, READY)
            _release_output()
        try:
            _Keeper(listener).run()
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108  # as above


if __name__ == "__main__":
    main(sys.argv[-1], detach="--detach" in sys.argv[1:-1])
