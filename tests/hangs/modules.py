"""Patterns of the standard library that stay in user mode."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import pickle
import re
import sqlite3
import zlib
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

from tests.hangs.pattern import PAGE, Guarded, padded, pages, pattern, text

if TYPE_CHECKING:
    from collections.abc import Generator

# -- serialisation -----------------------------------------------------------------------------


@pattern("held")
def pickle_in_band(guarded: Guarded) -> None:
    found = pickle.dumps(pickle.PickleBuffer(guarded.buffer), protocol=5)
    assert pickle.loads(found) == guarded.data  # noqa: S301  # our own


@pattern("held")
def pickle_out_of_band(guarded: Guarded) -> None:
    """The buffer itself travels, untouched, until somebody looks into it."""
    buffers: list[pickle.PickleBuffer] = []
    found = pickle.dumps(
        pickle.PickleBuffer(guarded.buffer), protocol=5, buffer_callback=buffers.append
    )
    [travelled] = buffers
    assert bytes(pickle.loads(found, buffers=[travelled])) == guarded.data  # noqa: S301  # our own


@pattern("held", lambda: padded(pickle.dumps({"key": list(range(3000))})))
def pickle_loads(guarded: Guarded) -> None:
    assert pickle.loads(guarded.buffer) == {"key": list(range(3000))}  # noqa: S301  # our own


@pattern("held", lambda: padded(json.dumps(list(range(2000))).encode(), b" "))
def json_of_decoded_text(guarded: Guarded) -> None:
    assert json.loads(str(guarded.buffer, "ascii")) == list(range(2000))


@pattern("held", text(b"a needle in the hay; ", 400))
def regular_expression(guarded: Guarded) -> None:
    found = [match.start() for match in re.finditer(b"needle", guarded.buffer)]
    assert found == [match.start() for match in re.finditer(b"needle", guarded.data)]


# -- checksums, compression, encodings ---------------------------------------------------------


@pattern("held")
def hashlib_small(guarded: Guarded) -> None:
    assert (
        hashlib.sha256(guarded.buffer[:100]).digest() == hashlib.sha256(guarded.data[:100]).digest()
    )


@pattern("released")
def hashlib_large(guarded: Guarded) -> None:
    assert hashlib.sha256(guarded.buffer).digest() == hashlib.sha256(guarded.data).digest()


@pattern("released")
def hashlib_blake2(guarded: Guarded) -> None:
    assert hashlib.blake2b(guarded.buffer).digest() == hashlib.blake2b(guarded.data).digest()


@pattern("released")
def zlib_compress(guarded: Guarded) -> None:
    assert zlib.decompress(zlib.compress(guarded.buffer)) == guarded.data


@pattern("released", lambda: padded(zlib.compress(pages(8)(), 0)))
def zlib_decompress(guarded: Guarded) -> None:
    assert zlib.decompressobj().decompress(guarded.buffer) == pages(8)()


@pattern("released")
def zlib_crc32(guarded: Guarded) -> None:
    assert zlib.crc32(guarded.buffer) == zlib.crc32(guarded.data)


@pattern("held")
def zlib_crc32_small(guarded: Guarded) -> None:
    assert zlib.crc32(guarded.buffer[:100]) == zlib.crc32(guarded.data[:100])


@pattern("released")
def zlib_adler32(guarded: Guarded) -> None:
    assert zlib.adler32(guarded.buffer) == zlib.adler32(guarded.data)


@pattern("released")
def binascii_crc32(guarded: Guarded) -> None:
    assert binascii.crc32(guarded.buffer) == binascii.crc32(guarded.data)


@pattern("held")
def binascii_hexlify(guarded: Guarded) -> None:
    assert binascii.hexlify(guarded.buffer) == guarded.data.hex().encode()


@pattern("held")
def base64_encode(guarded: Guarded) -> None:
    assert base64.b64encode(guarded.buffer) == base64.b64encode(guarded.data)


# -- objects that copy -------------------------------------------------------------------------


@pattern("held")
def bytes_io(guarded: Guarded) -> None:
    assert io.BytesIO(guarded.buffer).read() == guarded.data


@pattern("held", writes=True)
def bytes_io_readinto(guarded: Guarded) -> None:
    assert io.BytesIO(guarded.data[::-1]).readinto(guarded.buffer) == guarded.length
    assert guarded.buffer == guarded.data[::-1]


@pattern("held")
def sqlite_blob(guarded: Guarded) -> None:
    connection = sqlite3.connect(":memory:")
    try:
        [(found,)] = connection.execute("select ?", (guarded.buffer,)).fetchall()
    finally:
        connection.close()
    assert found == guarded.data


@pattern("held")
def shared_memory_out(guarded: Guarded) -> None:
    """Out of guarded memory, into a block that other processes can open."""
    with _shared_memory(guarded.length) as block:
        block[: guarded.length] = guarded.buffer
        assert bytes(block[: guarded.length]) == guarded.data


@pattern("held", writes=True)
def shared_memory_in(guarded: Guarded) -> None:
    with _shared_memory(PAGE) as block:
        block[:PAGE] = guarded.data[:PAGE][::-1]
        guarded.buffer[PAGE : 2 * PAGE] = block[:PAGE]
    expected = guarded.data[:PAGE] + guarded.data[:PAGE][::-1] + guarded.data[2 * PAGE :]
    assert guarded.buffer == expected


@contextmanager
def _shared_memory(length: int) -> Generator[memoryview]:
    block = SharedMemory(create=True, size=length)
    try:
        assert block.buf is not None
        yield block.buf
    finally:
        block.close()
        block.unlink()
