"""How long a client waits when its daemon is killed: from the kill to the first fault resolved.

The successor resumes what a keeper and a journal have.  It is warm (a process that has imported
everything, and waits to be told) or cold (started by the kill); both are held against starting a
bare interpreter that imports trio.  The client has a region of 1 GiB.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from benchmarks.build import ROOT
from benchmarks.rows import Row, compare, script
from uffdaemon import Keeper, Memory, Region, ZeroPage, open_daemon
from uffdaemon.lowlevel import Features, Userfaultfd

_LENGTH = 1 << 30
_PAGE = os.sysconf("SC_PAGESIZE")
_HANDSHAKE = struct.Struct("=Q")
_FEATURES = Features.EVENT_REMOVE | Features.EVENT_REMAP | Features.EVENT_UNMAP


def _client(hand: socket.socket, sock: socket.socket) -> None:
    """Hand the userfaultfd over; touch the next page whenever told to, and say so."""
    with Userfaultfd.open(_FEATURES) as uffd, Memory.map(_LENGTH) as memory:
        uffd.register(memory.start, memory.length)
        uffd.send(hand, _HANDSHAKE.pack(memory.start))
        page = 0
        while sock.recv(1):
            memory.touch(page * _PAGE, 1)
            page += 1
            sock.send(b"t")


async def _serve(path: Path, sock: socket.socket | None) -> None:
    with Keeper.open(path) as keeper:
        async with open_daemon(keeper=keeper) as daemon:
            if sock is None:
                daemon.resume_kept(ZeroPage())
            else:
                uffd, message = Userfaultfd.receive(sock)
                (start,) = _HANDSHAKE.unpack(message)
                daemon.add_region(uffd, Region(start, _LENGTH, ZeroPage()), register=None)
            await trio.sleep_forever()


def _forked(path: Path, sock: socket.socket | None, wait: int) -> int:
    """A daemon in a process that has everything imported, and waits for a byte."""
    pid = os.fork()
    if not pid:
        if wait >= 0:
            os.read(wait, 1)
        trio.run(_serve, path, sock)
    return pid


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _touched(sock: socket.socket) -> None:
    sock.send(b"t")
    sock.recv(1)


def _stalls(rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of warm and of cold takeovers."""
    warm, cold = list[float](), list[float]()
    ours, theirs = socket.socketpair()
    receiving, sending = socket.socketpair()
    client = os.fork()
    if not client:
        ours.close()
        _client(sending, theirs)
        os._exit(0)
    theirs.close()
    sending.close()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keeper"
        with Keeper.open(path):
            daemon = _forked(path, receiving, -1)
            _touched(ours)
            for _ in range(rounds):
                reading, writing = os.pipe()
                standby = _forked(path, None, reading)
                begun = time.perf_counter()
                _end(daemon)
                os.write(writing, b"g")
                _touched(ours)
                warm.append((time.perf_counter() - begun) * 1e3)
                begun = time.perf_counter()
                _end(standby)
                command = [sys.executable, "-m", "benchmarks.takeover", "--resume", str(path)]
                started = subprocess.Popen(command, cwd=ROOT)
                _touched(ours)
                cold.append((time.perf_counter() - begun) * 1e3)
                daemon = started.pid
                os.close(reading)
                os.close(writing)
            ours.close()
            os.waitpid(client, 0)
            _end(daemon)
        Keeper.open(path, start=False).stop()
    return warm, cold


def _starts(rounds: int) -> list[float]:
    """Milliseconds to start an interpreter that imports trio."""
    found = list[float]()
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import trio"], check=True)
        found.append((time.perf_counter() - begun) * 1e3)
    return found


def measure(rounds: int) -> list[Row]:
    """Rows for a warm and a cold successor."""
    rounds = max(rounds, 3)
    warm, cold = _stalls(rounds)
    starts = _starts(rounds)
    against = "python -c 'import trio'"
    return [
        compare(
            f"from kill -9 to the next fault, {what} successor",
            stalls,
            starts,
            against=against,
            cores="any core",
            unit="ms",
        )
        for what, stalls in (("warm", warm), ("cold", cold))
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resume"]:
        trio.run(_serve, Path(sys.argv[2]), None)
    else:
        script(measure, __doc__)
