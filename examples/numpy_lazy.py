"""A numpy array of 4 GiB whose pieces are decompressed when somebody first looks at them.

The file holds chunks of 1 MiB, each compressed by itself.  A process that the library starts
imports this module, and decodes; the numpy code below knows nothing of that.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import struct
import sys
import tempfile
import zlib
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
STEP = 1024  # elements in a row that are equal, so that the file is small
ROUND = 16  # chunks after which all begins anew, so that it is written in no time
INDEX = struct.Struct(f"<{CHUNKS + 1}Q")
IMAGE = "NUMPY_LAZY_IMAGE"


# -- in the other process ----------------------------------------------------------------------


class Image:
    """The file: where each chunk begins, where the last one ends, and the chunks."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._offsets = INDEX.unpack(os.pread(self._fd, INDEX.size, 0))

    def _decode(self, number: int) -> bytes:
        start, end = self._offsets[number : number + 2]
        return zlib.decompress(os.pread(self._fd, end - start, start))

    async def fetch(self, offset: int, length: int) -> bytes:
        """Decode in a worker thread: zlib releases the GIL, and others wait for other chunks."""
        number, within = divmod(offset, CHUNK)
        chunk = await trio.to_thread.run_sync(self._decode, number)
        return chunk[within : within + length]


def policy() -> FaultAround:
    """What the name ``numpy_lazy:policy()`` makes.  One decoding fills the whole chunk."""
    source = AsyncSource(Image(os.environ[IMAGE]).fetch, SIZE)
    return FaultAround(CopyFrom(source), pages=CHUNK // 4096)


# -- in this one -------------------------------------------------------------------------------


def value(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the array holds at an index."""
    return index // STEP % (ROUND * CHUNK // 4 // STEP)


def write_image(path: Path) -> None:
    import numpy as np  # noqa: PLC0415  # the other process has no use for it

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
    """Ordinary numpy code.  Its arrays end with it, so that the memory can be closed."""
    import numpy as np  # noqa: PLC0415

    flat = region.array("<u4", readonly=True)
    rows = flat.reshape(CHUNKS, -1)  # a row for each chunk

    total = int(rows[100:116].sum(dtype=np.int64))
    assert total == int(value(np.arange(100 * rows.shape[1], 116 * rows.shape[1])).sum())
    print(f"the sum of 16 rows is {total}")

    picks = np.arange(7, flat.size, flat.size // 32)
    assert (flat[picks] == value(picks)).all()
    print(f"{len(picks)} elements, picked all over it, are right")

    highest = int(rows[2000:2016, ::STEP].max())
    assert highest == ROUND * CHUNK // 4 // STEP - 1
    print(f"the highest of 16 more rows is {highest}")


async def main() -> None:
    if importlib.util.find_spec("numpy") is None:
        sys.exit("this example computes with numpy, which is not installed: pip install numpy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        write_image(path)
        os.environ[IMAGE] = str(path)  # the other process inherits it
        with Memory.map(SIZE) as memory:
            async with open_daemon() as daemon:
                region = daemon.guard(
                    memory,
                    "numpy_lazy:policy()",
                    placement="external",
                    on_failure=actions.Poison(),  # of a damaged chunk: SIGBUS, and no endless wait
                    name="image",
                )
                worker = daemon.external[region]
                await worker.ready()  # says why, if the policy cannot be had
                compute(region)
                await worker.refresh()
                brought = daemon.statistics().bytes_done[Outcome.COPIED]
    print(f"{brought // MiB} of {SIZE // MiB} MiB came into being")
    assert brought == (16 + 32 + 16) * CHUNK
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < SIZE // 8


if __name__ == "__main__":
    trio.run(main)
