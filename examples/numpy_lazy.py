"""A numpy array of 4 GiB whose parts are decompressed when they are first touched.

The file contains chunks of 1 MiB, each compressed by itself.  The library starts a process that
imports this module and decodes chunks; the numpy code in this process is ordinary.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import struct
import sys
import tempfile
import zlib
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from uffdaemon import (
    AsyncSource,
    CopyFrom,
    FaultAround,
    GuardedRegion,
    Memory,
    Outcome,
    actions,
    open_daemon,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MiB = 1 << 20
CHUNK = MiB
CHUNKS = 4096
SIZE = CHUNK * CHUNKS
STEP = 1024  # equal elements in a row, so that the file is small
ROUND = 16  # chunks after which the contents repeat, so that the file is written fast
INDEX = struct.Struct(f"<{CHUNKS + 1}Q")
IMAGE = "NUMPY_LAZY_IMAGE"


# -- in the other process ----------------------------------------------------------------------


class Image:
    """The file: the offsets of the chunks, the end of the last one, and the chunks."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._offsets = INDEX.unpack(os.pread(self._fd, INDEX.size, 0))

    def _decode(self, number: int) -> bytes:
        start, end = self._offsets[number : number + 2]
        return zlib.decompress(os.pread(self._fd, end - start, start))

    async def fetch(self, offset: int, length: int) -> bytes:
        """Decode in a worker thread.  zlib releases the GIL, so chunks are decoded in parallel."""
        number, within = divmod(offset, CHUNK)
        chunk = await trio.to_thread.run_sync(self._decode, number)
        return chunk[within : within + length]


def policy() -> FaultAround:
    """The policy by the name ``numpy_lazy:policy()``.  One fault fills a whole chunk."""
    source = AsyncSource(Image(os.environ[IMAGE]).fetch, SIZE)
    return FaultAround(CopyFrom(source), pages=CHUNK // PAGESIZE)


# -- in this one -------------------------------------------------------------------------------


def value(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The array's element at an index."""
    return index // STEP % (ROUND * CHUNK // 4 // STEP)


def write_image(path: Path) -> None:
    import numpy as np  # noqa: PLC0415  # the other process does not need it

    every = value(np.arange(ROUND * CHUNK // 4)).astype("<u4").tobytes()
    packed = [zlib.compress(every[at : at + CHUNK], 1) for at in range(0, len(every), CHUNK)]
    offsets = [INDEX.size]
    with path.open("wb") as file:
        file.seek(INDEX.size)
        for number in range(CHUNKS):
            offsets.append(offsets[-1] + file.write(packed[number % ROUND]))
        file.seek(0)
        file.write(INDEX.pack(*offsets))
    print(f"{SIZE // MiB} MiB, compressed to {offsets[-1] // MiB} MiB")


def compute(region: GuardedRegion) -> None:
    """Ordinary numpy code.  Its arrays end with it, and the memory can be closed."""
    import numpy as np  # noqa: PLC0415

    flat = region.array("<u4", readonly=True)
    rows = flat.reshape(CHUNKS, -1)  # a row is a chunk

    total = int(rows[100:116].sum(dtype=np.int64))
    assert total == int(value(np.arange(100 * rows.shape[1], 116 * rows.shape[1])).sum())
    print(f"the sum of 16 rows is {total}")

    picks = np.arange(7, flat.size, flat.size // 32)
    assert (flat[picks] == value(picks)).all()
    print(f"{len(picks)} elements from all over the array are right")

    largest = int(rows[2000:2016, ::STEP].max())
    assert largest == ROUND * CHUNK // 4 // STEP - 1
    print(f"the largest element of 16 more rows is {largest}")


async def main() -> None:
    if importlib.util.find_spec("numpy") is None:
        sys.exit("this example computes with numpy, which is not installed: pip install numpy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        write_image(path)
        os.environ[IMAGE] = str(path)  # inherited by the other process
        with Memory.map(SIZE) as memory:
            async with open_daemon() as daemon:
                region = daemon.guard(
                    memory,
                    "numpy_lazy:policy()",
                    placement="external",
                    on_failure=actions.Poison(),  # a damaged chunk is SIGBUS, not an endless wait
                    name="image",
                )
                worker = daemon.external[region]
                await worker.ready()  # raises the reason if the policy cannot be loaded
                compute(region)
                await worker.refresh()
                decoded = daemon.statistics().bytes_done[Outcome.COPIED]
    print(f"{decoded // MiB} of {SIZE // MiB} MiB were decoded")
    assert decoded == (16 + 32 + 16) * CHUNK
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < SIZE // 8


if __name__ == "__main__":
    trio.run(main)
