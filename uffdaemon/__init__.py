"""Serve Linux page faults from trio: you decide what each page contains.

Each public name has one home:

- `uffdaemon`: the daemon, memory, regions, policies, hooks, sources, placement, statistics
- `uffdaemon.actions`: what a policy returns
- `uffdaemon.errors`: all exceptions
- `uffdaemon.moves`: moving pages with UFFDIO_MOVE
- `uffdaemon.lowlevel`: userfaultfds and page scans without a daemon

All other packages and modules are private: they can be imported, and may change in any release.
"""

from typing import TYPE_CHECKING

from uffdaemon.lazy import lazy

if TYPE_CHECKING:
    from uffdaemon import actions as actions
    from uffdaemon import errors as errors
    from uffdaemon import lowlevel as lowlevel
    from uffdaemon import moves as moves
    from uffdaemon.actions import Source
    from uffdaemon.daemon.daemon import Daemon
    from uffdaemon.daemon.entry import open_daemon, serve
    from uffdaemon.guard.guarded_region import GuardedRegion
    from uffdaemon.hooks import Hooks, Resolved, Veto
    from uffdaemon.journal.journal import Journal
    from uffdaemon.keeper.keeper import Keeper
    from uffdaemon.kernel.memory import Advice, Memory, MemoryType
    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.model.region import Fault, Policy, Region, Retry
    from uffdaemon.model.statistics import OpenFaultDict, Statistics, StatisticsDict
    from uffdaemon.placement import Placement, Resolver, Shutdown, Watchdog
    from uffdaemon.policy import (
        ByKind,
        ByRange,
        Continue,
        CopyFrom,
        FaultAround,
        FirstOf,
        MoveOrCopy,
        Poison,
        StrictMove,
        Unprotect,
        ZeroPage,
    )
    from uffdaemon.sources import AsyncSource, BytesSource, FileSource
    from uffdaemon.uapi.events import FaultKind
    from uffdaemon.uapi.outcomes import Outcome

    __version__: str

__all__ = [
    "Advice",
    "AsyncSource",
    "ByKind",
    "ByRange",
    "BytesSource",
    "Continue",
    "CopyFrom",
    "Daemon",
    "Fault",
    "FaultAround",
    "FaultKind",
    "FileSource",
    "FirstOf",
    "GuardedRegion",
    "Hooks",
    "Journal",
    "Keeper",
    "Memory",
    "MemoryType",
    "MoveOrCopy",
    "OpenFault",
    "OpenFaultDict",
    "Outcome",
    "Placement",
    "Poison",
    "Policy",
    "Region",
    "Resolved",
    "Resolver",
    "Retry",
    "Shutdown",
    "Source",
    "Statistics",
    "StatisticsDict",
    "StrictMove",
    "Unprotect",
    "Veto",
    "Watchdog",
    "ZeroPage",
    "open_daemon",
    "serve",
]

_HOMES = ("actions", "errors", "lowlevel", "moves")
_MODULES = {
    "uffdaemon.actions": ("Source",),
    "uffdaemon.daemon.daemon": ("Daemon",),
    "uffdaemon.daemon.entry": ("open_daemon", "serve"),
    "uffdaemon.guard.guarded_region": ("GuardedRegion",),
    "uffdaemon.hooks": ("Hooks", "Resolved", "Veto"),
    "uffdaemon.journal.journal": ("Journal",),
    "uffdaemon.keeper.keeper": ("Keeper",),
    "uffdaemon.kernel.memory": ("Advice", "Memory", "MemoryType"),
    "uffdaemon.model.ledger": ("OpenFault",),
    "uffdaemon.model.region": ("Fault", "Policy", "Region", "Retry"),
    "uffdaemon.model.statistics": ("OpenFaultDict", "Statistics", "StatisticsDict"),
    "uffdaemon.placement": ("Placement", "Resolver", "Shutdown", "Watchdog"),
    "uffdaemon.policy": (
        "ByKind",
        "ByRange",
        "Continue",
        "CopyFrom",
        "FaultAround",
        "FirstOf",
        "MoveOrCopy",
        "Poison",
        "StrictMove",
        "Unprotect",
        "ZeroPage",
    ),
    "uffdaemon.sources": ("AsyncSource", "BytesSource", "FileSource"),
    "uffdaemon.uapi.events": ("FaultKind",),
    "uffdaemon.uapi.outcomes": ("Outcome",),
}


if not TYPE_CHECKING:  # checkers believe that a module with `__getattr__` has every name
    _find, __dir__ = lazy(__name__, _MODULES, _HOMES)

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415  # takes a third of trio's time

            return version("uffdaemon")
        return _find(name)
