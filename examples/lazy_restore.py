"""Restore a file into another process's memory, page by page, as that process touches it.

    python lazy_restore.py [FILE]

Without FILE it builds a SQLite database with a full-text index, which the other process queries.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import closing
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from uffdaemon import CopyFrom, FaultAround, FileSource, Memory, Region, open_daemon
from uffdaemon.lowlevel import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Sequence

QUERY = "SELECT path FROM search WHERE search MATCH '\"weak reference\"' ORDER BY rank LIMIT 1"


def build(path: Path) -> None:
    """Index the sources of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE VIRTUAL TABLE search USING fts5(path, text)")
        for file in sorted(library.glob("*.py")):
            text = file.read_text(errors="replace")
            database.execute("INSERT INTO search VALUES (?, ?)", (file.name, text))


def query(address: int, size: int, statement: str) -> list[str]:
    """The first column of a query of the database that lies in memory at `address`.

    sqlite3.Connection.deserialize would copy all of it first; the C function reads in place.
    """
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", "libsqlite3.so.0"))
    found: list[str] = []

    def call(name: str, *arguments: object) -> None:
        status = getattr(library, f"sqlite3_{name}")(*arguments)
        if status:
            raise RuntimeError(f"sqlite3_{name} failed: {status}")

    def row(_context: None, _columns: int, values: Sequence[bytes], _names: object) -> int:
        found.append(values[0].decode())
        return 0

    callback = CFUNCTYPE(c_int, c_void_p, c_int, POINTER(c_char_p), POINTER(c_char_p))(row)
    database, length, readonly = c_void_p(), c_int64(size), 4
    call("open", b":memory:", byref(database))
    call("deserialize", database, b"main", c_void_p(address), length, length, readonly)
    call("exec", database, statement.encode(), callback, None, None)
    call("close", database)
    return found


def client(sock: socket.socket) -> None:
    """The process whose memory is restored.  It uses the memory as if all pages were there."""
    length, statement = json.loads(sock.recv(1000))
    with Userfaultfd.open(user_mode_only=True) as uffd, Memory.map(length) as memory:
        uffd.register(memory.start, length)
        uffd.send(sock, json.dumps([memory.start, length]).encode())
        print("client: the first bytes are", memory.read(0, 16))  # waits for the page
        if statement:
            print("client: SQLite finds", query(memory.start, length, statement))
        sock.sendall(b"used")
        sock.recv(100)  # waits until the rest has been filled
        sock.sendall(hashlib.sha256(memory.read(0, length)).digest())


async def restore(path: Path, statement: str, sock: socket.socket) -> bytes:
    """Serve the client.  Returns the client's hash of its memory after the whole restore."""
    with FileSource(path, zero_tail=True) as source:
        await trio.to_thread.run_sync(sock.sendall, json.dumps([source.size, statement]).encode())
        uffd, message = await trio.to_thread.run_sync(Userfaultfd.receive, sock)
        start, length = json.loads(message)
        region = Region(start, length, FaultAround(CopyFrom(source), pages=16))
        with uffd:
            async with open_daemon() as daemon:
                daemon.add_region(uffd, region, register=None)
                await trio.to_thread.run_sync(sock.recv, 100)
                copied = sum(daemon.statistics().bytes_done.values())
                print(f"daemon: {copied} of {length} bytes copied")
                await daemon.fill(region)
                await trio.to_thread.run_sync(sock.sendall, b"filled")
                return await trio.to_thread.run_sync(sock.recv, 100)


def main(path: Path, statement: str = "") -> int:
    """Start the client, serve it, and compare its memory with the file; returns the exit status."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--client", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours:
        theirs.close()
        digest = trio.run(restore, path, statement, ours)
    expected = path.read_bytes()
    expected += bytes(-len(expected) % PAGESIZE)  # memory consists of pages; zeros follow the file
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
            image = Path(folder, "image")
            build(image)
            sys.exit(main(image, QUERY))
