"""Policies of the programs that end, for themselves and for the process that serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.hangs.hung import InPython
from tests.support.page_contents import content
from uffdaemon import BytesSource, CopyFrom, Fault, Poison, ZeroPage, actions

if TYPE_CHECKING:
    from uffdaemon.actions import Action

DATA = content(4)

copied = CopyFrom(BytesSource(DATA))
answered = InPython(DATA)


def held(fault: Fault) -> Action | None:
    return actions.Hold("for the test")


poisoned = Poison()
zeros = ZeroPage()


def poisoned_by_python(fault: Fault) -> Action | None:
    return actions.Poison()


def broken(fault: Fault) -> Action | None:
    raise LookupError("no such page")
