"""The open file descriptors of this process."""

from __future__ import annotations

from pathlib import Path

from uffdaemon import Memory, ZeroPage, open_daemon
from uffdaemon.ranges import PAGE_SIZE


def open_descriptors() -> set[str]:
    """The descriptors of this process, with what they are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:  # the one that lists them
            continue
    return found


async def open_kept_descriptors() -> None:
    """Have the library open what a process keeps from its first daemon on: the pipe to which
    threads write their stacks."""
    with Memory.map(PAGE_SIZE) as memory:
        async with open_daemon() as daemon:
            daemon.guard(memory, ZeroPage())
