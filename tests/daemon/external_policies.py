"""Policies that another process imports: see `tests.daemon.test_external`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.support.page_contents import PAGE, content
from uffdaemon import (
    AsyncSource,
    ByKind,
    BytesSource,
    CopyFrom,
    Fault,
    StrictMove,
    ZeroPage,
    actions,
)

if TYPE_CHECKING:
    from uffdaemon.actions import Action

PAGES = 256
DATA = content(PAGES)

copied = CopyFrom(BytesSource(DATA))
moved = StrictMove(PAGE)
missing_only = ByKind(missing=ZeroPage())
number = 7


class Shop:
    """Where policies are made."""

    made = ZeroPage()

    def __call__(self, fault: Fault) -> Action | None:
        return actions.Zero()


def make() -> CopyFrom:
    return copied


def make_nonsense() -> int:
    return 7


def make_trouble() -> CopyFrom:
    raise LookupError("the image is not there")


def leave() -> CopyFrom:
    sys.exit("enough")


def broken(fault: Fault) -> Action | None:
    raise LookupError("no such page")


def deadly(fault: Fault) -> Action | None:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def dies_now_and_then(fault: Fault) -> Action | None:
    """Its process dies of every 64th page, once, in the middle of the fault."""
    mark = Path(os.environ["MARKS"], str(fault.page))
    if fault.page % 64 == 10 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return copied(fault)


async def _fetch(offset: int, length: int) -> bytes:
    """Wait until somebody opens the gate, which is a pipe with a name."""
    async with await trio.open_file(Path(os.environ["MARKS"], "gate"), "rb") as gate:
        await gate.read()
    return DATA[offset : offset + length]


gated = CopyFrom(AsyncSource(_fetch, len(DATA)))
