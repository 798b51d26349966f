"""Restore a file into another process's memory, page by page, as that process touches it.

    python lazy_restore.py [FILE]

Without FILE it builds a SQLite database with a full-text index, which the other process queries.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from uffdaemon import CopyFrom, FaultAround, FileSource, Memory, Region, Userfaultfd, open_daemon
from uffdaemon.demo.image import build_image
from uffdaemon.demo.sqlite import MemoryDatabase

QUERY = """SELECT path, line FROM search JOIN passages ON passages.id = search.rowid
           WHERE search MATCH 'weak reference' ORDER BY rank LIMIT 1"""


def client(sock: socket.socket) -> None:
    """The process whose memory is restored.  It uses the memory as if everything were there."""
    length, query = json.loads(sock.recv(1000))
    with Userfaultfd.open(user_mode_only=True) as uffd, Memory.map(length) as memory:
        uffd.register(memory.start, length)
        uffd.send(sock, json.dumps([memory.start, length]).encode())
        print("client: the first bytes are", memory.read(0, 16))  # waits until they are there
        if query:
            with MemoryDatabase(memory.start, length) as database:
                print("client: SQLite answers", database.query(query))
        sock.sendall(b"used")
        sock.recv(100)  # waits until the rest has been filled in
        sock.sendall(hashlib.sha256(memory.read(0, length)).digest())


async def restore(path: Path, query: str, sock: socket.socket) -> bytes:
    """The daemon's side; the client's hash of its memory after all of it was restored."""
    with FileSource(path, zero_tail=True) as source:
        await trio.to_thread.run_sync(sock.sendall, json.dumps([source.size, query]).encode())
        uffd, message = await trio.to_thread.run_sync(Userfaultfd.receive, sock)
        start, length = json.loads(message)
        region = Region(start, length, FaultAround(CopyFrom(source), pages=16))
        with uffd:
            async with open_daemon() as daemon:
                daemon.add_region(uffd, region, register=None)
                await trio.to_thread.run_sync(sock.recv, 100)
                brought = sum(daemon.statistics().bytes_done.values())
                print(f"daemon: {brought} of {length} bytes brought")
                await daemon.fill(region)
                await trio.to_thread.run_sync(sock.sendall, b"filled")
                return await trio.to_thread.run_sync(sock.recv, 100)


def main(path: Path, query: str = "") -> int:
    """Start the client, serve it, and say how it went: the exit status."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--client", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours:
        theirs.close()
        digest = trio.run(restore, path, query, ours)
    expected = path.read_bytes()
    expected += bytes(-len(expected) % 4096)  # memory consists of pages, and zeros follow the end
    equal = digest == hashlib.sha256(expected).digest()
    print("the restored memory", "equals" if equal else "DIFFERS FROM", path)
    return 0 if equal else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client(socket.socket(fileno=int(sys.argv[2])))
    elif sys.argv[1:]:
        sys.exit(main(Path(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            image = build_image(Path(folder, "image"), 16 << 20)
            sys.exit(main(image.path, QUERY))
