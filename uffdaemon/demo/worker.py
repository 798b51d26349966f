"""The worker process, which runs SQLite on a memory image.  `python -m uffdaemon.demo.worker`.

The demo starts it with the path of the daemon's Unix socket.  In lazy mode the image is guarded
memory, empty at first, whose userfaultfd the worker sends to the daemon.  In eager mode it is plain
memory, into which the worker reads the whole file first.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import select
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from uffdaemon import Memory, MemoryType
from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.protocol import LIMIT, Json, Message, ProtocolError, decode, encode, short_name
from uffdaemon.demo.residency import present_pages
from uffdaemon.demo.sqlite import MemoryDatabase
from uffdaemon.errors import UffdaemonError
from uffdaemon.lowlevel import RegisterMode, Userfaultfd
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

__all__ = ["main"]

_CHUNK: Final = 1 << 20
_SEARCH: Final = """
SELECT passages.path || ':' || passages.line, snippet(search, 0, '[', ']', '…', 12)
FROM search JOIN passages ON passages.id = search.rowid
WHERE search MATCH ? ORDER BY rank LIMIT 1
"""
_COUNT: Final = "SELECT count(*) FROM search WHERE search MATCH ?"
_READ: Final = "SELECT length(text) FROM passages WHERE id = ?"


class _DaemonGone(Exception):
    """The daemon's side has closed the connection."""


@dataclass(frozen=True, slots=True)
class _MemoryImage:
    """The image in this process: its address, and how to read it without SQLite."""

    start: int
    length: int
    read: Callable[[int, int], bytes]


class _Daemon:
    """The connection to the daemon's side."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, kind: str, fields: dict[str, Json] | None = None) -> None:
        self.sock.sendall(encode(kind, fields))

    def receive(self, *kinds: str) -> Message:
        packet = self.sock.recv(LIMIT)
        if not packet:
            raise _DaemonGone
        message = decode(packet)
        if message.kind not in kinds:
            raise ProtocolError(f"message {message.kind!r} instead of {' or '.join(kinds)}")
        return message

    def has_more(self) -> bool:
        return bool(select.select([self.sock], [], [], 0)[0])

    def exit_when_daemon_closes(self) -> None:
        """Exit this process as soon as the daemon's side closes the connection.

        This process keeps its own descriptor of the userfaultfd, so that missing pages do not turn
        into zeros when the daemon dies.  A thread that touches one then waits forever, so another
        thread has to end the process.
        """

        def wait() -> None:
            poll = select.poll()
            poll.register(self.sock, select.POLLRDHUP)
            poll.poll()
            os._exit(3)

        threading.Thread(target=wait, name="daemon gone", daemon=True).start()


@contextmanager
def _eager_image(path: str, size: int) -> Generator[_MemoryImage]:
    """Plain anonymous memory, with the whole file read into it."""
    memory = mmap.mmap(-1, size)
    first = ctypes.c_char.from_buffer(memory)
    try:
        with open(path, "rb", buffering=0) as file, memoryview(memory) as view:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            done = 0
            while done < size:
                count = file.readinto(view[done : done + _CHUNK])
                if not count:
                    raise DemoError(f"{path} ends after {done} of {size} bytes")
                done += count

        def read(offset: int, length: int) -> bytes:
            return memory[offset : offset + length]

        yield _MemoryImage(ctypes.addressof(first), size, read)
    finally:
        del first
        memory.close()


@contextmanager
def _lazy_image(daemon: _Daemon, size: int) -> Generator[_MemoryImage]:
    """Guarded memory, empty at first: the daemon copies each page there when it is touched."""
    with (
        # Only user code touches this memory: no privilege is needed.
        Userfaultfd.open(user_mode_only=True) as uffd,
        Memory.map(size, MemoryType.ANONYMOUS) as memory,
    ):
        uffd.register(memory.start, memory.length, RegisterMode.MISSING)
        place: dict[str, Json] = {
            "base": memory.start,
            "length": memory.length,
            "pid": os.getpid(),
        }
        uffd.send(daemon.sock, encode("memory", place))
        daemon.receive("served")
        yield _MemoryImage(memory.start, memory.length, memory.read)


def _search(database: MemoryDatabase, query: str) -> Json:
    """The number of passages that match, and the best one."""
    matches = database.query(_COUNT, [query])[0][0]
    best: list[Json] = [value for row in database.query(_SEARCH, [query]) for value in row]
    return {"query": query, "matches": matches, "best": best}


def _answer(
    image: _MemoryImage, database: MemoryDatabase, queries: Sequence[str], begun: float
) -> dict[str, Json]:
    """Run the queries.  Times are in seconds since `begun`, when the queries arrived."""
    opened = time.perf_counter() - begun
    answers: list[Json] = [_search(database, queries[0])]
    first = time.perf_counter() - begun
    # Counting the pages is not part of the time, and touches none.
    counting = time.perf_counter()
    first_pages = present_pages(image.start, image.length)
    counting = time.perf_counter() - counting
    answers += [_search(database, query) for query in queries[1:]]
    last = time.perf_counter() - begun - counting
    return {
        "open_seconds": opened,
        "first_answer_seconds": first,
        "all_answers_seconds": last,
        "first_answer_pages": first_pages,
        "all_answers_pages": present_pages(image.start, image.length),
        "answers": answers,
    }


def _read_passages(database: MemoryDatabase, daemon: _Daemon, passages: int) -> dict[str, Json]:
    """Read passages at random until the daemon's side sends "enough"."""
    chance = random.Random(passages)
    times: list[float] = []
    while not times or not daemon.has_more():
        begun = time.perf_counter()
        database.query(_READ, [chance.randint(1, passages)])
        times.append(time.perf_counter() - begun)
    return {
        "count": len(times),
        "median_seconds": statistics.median(times),
        "slowest_seconds": max(times),
    }


def _verify(image: _MemoryImage, path: str) -> dict[str, Json]:
    """The SHA-256 of the whole memory, and the number of its pages that differ from the file."""
    digest = hashlib.sha256()
    differing = 0
    with open(path, "rb", buffering=0) as file:
        for offset in range(0, image.length, _CHUNK):
            length = min(_CHUNK, image.length - offset)
            data = image.read(offset, length)
            digest.update(data)
            expected = os.pread(file.fileno(), length, offset)
            if data == expected:
                continue
            pages = range(0, length, PAGE_SIZE)
            differing += sum(data[p : p + PAGE_SIZE] != expected[p : p + PAGE_SIZE] for p in pages)
    return {"sha256": digest.hexdigest(), "differing_pages": differing}


def _work(daemon: _Daemon) -> NoReturn:
    """Serve the requests of the daemon's side until it closes the connection."""
    daemon.send("hello", {"pid": os.getpid()})
    start = daemon.receive("start")
    path, size = start.text("image"), start.integer("size")
    begun = time.perf_counter()
    lazy = start.text("mode") == "lazy"
    with (
        _lazy_image(daemon, size) if lazy else _eager_image(path, size) as image,
        MemoryDatabase(image.start, image.length) as database,
    ):
        daemon.send("answers", _answer(image, database, start.texts("queries"), begun))
        while True:
            message = daemon.receive("read", "verify")
            if message.kind == "read":
                fields = _read_passages(database, daemon, message.integer("passages"))
                daemon.receive("enough")
                daemon.send("reads", fields)
            else:
                daemon.send("verified", _verify(image, message.text("image")))


def main(arguments: Sequence[str]) -> int:
    """Serve one run.  The exit status is 1 if it failed; the daemon's side has been told why."""
    # Ctrl-C reaches every process of the terminal; the daemon's side handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with short_name(arguments[0]) as name:
            sock.connect(name)
        daemon = _Daemon(sock)
        daemon.exit_when_daemon_closes()
        try:
            _work(daemon)
        except (_DaemonGone, ConnectionError):
            return 0
        except (DemoError, UffdaemonError, OSError, MemoryError) as error:
            daemon.send("failed", {"error": str(error) or type(error).__name__})
            return 1
        except Exception as error:  # noqa: BLE001  # reported to the daemon's side
            traceback.print_exc()
            daemon.send("failed", {"error": f"{type(error).__name__}: {error}"})
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
