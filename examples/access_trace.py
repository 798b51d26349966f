"""Record in which order memory is touched, with a hook, and prefetch by the record.

The first run records the working set.  The second fills it in advance and takes no faults.
"""

import mmap

import trio

import uffdaemon
from uffdaemon import BytesSource, CopyFrom, Hooks, Memory, Resolved

PAGE = mmap.PAGESIZE
IMAGE = b"".join(f"page {number}".encode().ljust(PAGE, b" ") for number in range(1024))
WORKING_SET = (3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)


class Trace:
    """Offsets of pages, in the order of their first faults."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def after(self, resolved: Resolved) -> None:
        self.offsets.append(resolved.fault.offset)


def work(memory: Memory) -> list[bytes]:
    """The application: it reads from its working set."""
    return [memory.read(number * PAGE, 8) for number in WORKING_SET]


async def run(memory: Memory, prefetch: list[int]) -> Trace:
    """One run of the application, with the pages at `prefetch` filled before it starts."""
    trace = Trace()
    async with uffdaemon.open_daemon(hooks=[Hooks(after=trace.after)]) as daemon:
        region = daemon.guard(memory, CopyFrom(BytesSource(IMAGE)))
        assert memory.userfaultfd is not None
        for offset in prefetch:
            memory.userfaultfd.copy(region.start + offset, IMAGE[offset : offset + PAGE])
        words = await trio.to_thread.run_sync(work, memory)
    assert [word.split()[1] for word in words] == [str(n).encode() for n in WORKING_SET]
    return trace


async def main() -> None:
    with Memory.map(len(IMAGE)) as memory:
        recorded = await run(memory, [])
    with Memory.map(len(IMAGE)) as memory:
        replayed = await run(memory, recorded.offsets)
    print(f"recorded: {len(recorded.offsets)} faults, pages", end=" ")
    print(*(offset // PAGE for offset in recorded.offsets))
    print(f"replayed: {len(replayed.offsets)} faults")


if __name__ == "__main__":
    trio.run(main)
