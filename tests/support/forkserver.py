"""Forks the children of real-kernel tests off an interpreter that has imported what all need.

Importing takes longer than most of the tests, so it is done once.  The server does nothing but
fork, in one thread: whatever a test does, it does in a child, in a session of its own.  A child is
reaped when it is asked for, so that its number stays its own until then.

The server is ``python -m tests.support.forkserver fd``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIMIT = 4096  # bytes of a message
_FDS = 4


@dataclass(frozen=True)
class Child:
    """A child that runs, or has ended and was not reaped."""

    pid: int
    server: ForkServer

    def reap(self) -> int:
        """Wait for its end; what `subprocess.Popen.returncode` would say."""
        return self.server.ask({"reap": self.pid})


class ForkServer:
    """The server, as the tests see it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            python = [sys.executable, "-X", "faulthandler", "-W", "error"]
            self._process = subprocess.Popen(
                [*python, "-m", "tests.support.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd=ROOT,
                start_new_session=True,
            )
        atexit.register(self._close)

    def fork(self, what: str, deadline: float, fds: Sequence[int]) -> Child:
        """Run ``module:function`` in a child; `fds` are its standard input, which holds the
        arguments, its standard output and error, and where its report goes."""
        return Child(self.ask({"what": what, "deadline": deadline}, fds), self)

    def ask(self, request: dict[str, object], fds: Sequence[int] = ()) -> int:
        """Send a request, and return the answer.  Raises RuntimeError if there is none."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds))
        answer = self._socket.recv(_LIMIT)
        if not answer:
            raise RuntimeError(f"the fork server has ended with status {self._process.wait()}")
        return int(answer)

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """The one of this process, started when it is first needed."""
    return ForkServer()


def _serve(asked: socket.socket) -> None:
    from tests.support.child import main

    while True:
        message, fds, _, _ = socket.recv_fds(asked, _LIMIT, _FDS)
        if not message:
            return
        request = json.loads(message)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            asked.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            asked.close()
            os.setsid()
            for number, fd in enumerate(fds[:3]):
                os.dup2(fd, number)
                os.close(fd)
            main(request["what"], fds[3], request["deadline"])
        for fd in fds:
            os.close(fd)
        asked.send(b"%d" % pid)


if __name__ == "__main__":
    # A Ctrl-C is for who has started the tests; it ends the children, one by one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        _serve(asked)
