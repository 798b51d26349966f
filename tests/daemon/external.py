"""What tests of external policies share."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon import Daemon, Memory, Region
    from uffdaemon.external.owner import ExternalServer

POLICIES = "tests.daemon.external_policies:"


def read_with_gil(memory: Memory, offset: int = 0, length: int | None = None) -> bytes:
    """A plain access of Python's: nobody else in this interpreter runs until it is answered."""
    length = memory.length - offset if length is None else length
    return bytes((ctypes.c_char * length).from_address(memory.start + offset).raw)


def server_of(daemon: Daemon, region: Region) -> ExternalServer:
    return daemon.external[region]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # of other processes nothing tells
        await trio.sleep(0.001)


async def has_noted(daemon: Daemon, server: ExternalServer, events: dict[str, int]) -> None:
    """Wait until the worker has seen to events, which it has counted before."""
    while daemon.statistics().events != events:
        await server.refresh()
    await server.refresh()


async def has_ended(pid: int) -> None:
    """Wait until a process that need not be our child is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)
