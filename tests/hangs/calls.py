"""Patterns in which a system call touches the memory: EFAULT where the kernel may not wait.

What is asked for is what comes: a call that is cut short by a missing page does not pass for one
that worked.
"""

from __future__ import annotations

import io
import os
import socket
import tempfile

from tests.hangs.pattern import PAGE, Guarded, pattern


def _reversed(guarded: Guarded) -> bytes:
    """Other bytes than the memory's, to be read into it."""
    return guarded.data[::-1]


@pattern("released", system_call=True)
def os_write_to_a_pipe(guarded: Guarded) -> None:
    reading, writing = os.pipe()
    try:
        assert os.write(writing, guarded.buffer) == guarded.length
        assert os.read(reading, guarded.length) == guarded.data
    finally:
        os.close(reading)
        os.close(writing)


@pattern("released", system_call=True)
def os_write_to_a_file(guarded: Guarded) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        assert os.write(file.fileno(), guarded.buffer) == guarded.length
        assert os.pread(file.fileno(), guarded.length, 0) == guarded.data


@pattern("released", system_call=True)
def os_pwritev(guarded: Guarded) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        parts = [guarded.buffer[:PAGE], guarded.buffer[PAGE:]]
        assert os.pwritev(file.fileno(), parts, 0) == guarded.length
        assert os.pread(file.fileno(), guarded.length, 0) == guarded.data


@pattern("released", system_call=True, writes=True)
def os_preadv(guarded: Guarded) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(_reversed(guarded))
        assert os.preadv(file.fileno(), [guarded.buffer], 0) == guarded.length
    assert guarded.buffer == _reversed(guarded)


@pattern("released", system_call=True, writes=True)
def file_readinto(guarded: Guarded) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(_reversed(guarded))
        file.seek(0)
        assert io.FileIO(file.fileno(), closefd=False).readinto(guarded.buffer) == guarded.length
    assert guarded.buffer == _reversed(guarded)


@pattern("released", system_call=True)
def file_write_past_the_buffer(guarded: Guarded) -> None:
    """What is longer than the buffer of an ordinary file is written as it is."""
    with tempfile.TemporaryFile(buffering=8192) as file:
        file.write(guarded.buffer)
        file.flush()
        file.seek(0)
        assert file.read() == guarded.data


@pattern("held")
def file_write_into_the_buffer(guarded: Guarded) -> None:
    """What fits into the buffer of an ordinary file is copied there."""
    with tempfile.TemporaryFile() as file:
        file.write(guarded.buffer[:100])
        file.seek(0)
        assert file.read() == guarded.data[:100]


@pattern("released", system_call=True)
def socket_send(guarded: Guarded) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert ours.send(guarded.buffer) == guarded.length
        assert theirs.recv(guarded.length, socket.MSG_WAITALL) == guarded.data


@pattern("released", system_call=True, writes=True)
def socket_recv_into(guarded: Guarded) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(_reversed(guarded))
        found = ours.recv_into(guarded.buffer, 0, socket.MSG_WAITALL)
        assert found == guarded.length
    assert guarded.buffer == _reversed(guarded)
