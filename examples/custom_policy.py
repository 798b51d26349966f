"""Write a policy: each page contains its own number.

Prints the beginning of page 42, which no code ever wrote.
"""

from mmap import PAGESIZE

import trio

import uffdaemon
from uffdaemon import BytesSource, Fault, Memory, actions


def page_numbers(fault: Fault) -> actions.Action | None:
    """A missing page contains its number.  Other kinds of fault are not this policy's."""
    if fault.kind is not uffdaemon.FaultKind.MISSING:
        return None
    page = f"page {fault.page:4d}\n".encode().ljust(PAGESIZE, b".")
    return actions.Copy(BytesSource(page), offset=-fault.offset)


async def main() -> None:
    with Memory.map(256 * PAGESIZE) as memory:
        async with uffdaemon.open_daemon() as daemon:
            daemon.guard(memory, page_numbers)
            print((await trio.to_thread.run_sync(memory.read, 42 * PAGESIZE, 9)).decode())


if __name__ == "__main__":
    trio.run(main)
