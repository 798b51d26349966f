"""uffdaemon: own a Linux userfaultfd, and decide in trio how memory comes into being."""

from importlib.metadata import version

from uffdaemon import actions, errors
from uffdaemon.actions import Action, Fallback, Hold, Perform, Source, Span
from uffdaemon.daemon.daemon import Daemon
from uffdaemon.daemon.entry import open_daemon, serve
from uffdaemon.errors import (
    KernelRefusal,
    MoveRefused,
    OperationError,
    PageNotExclusive,
    PermissionRefused,
    PlacementRefused,
    UffdaemonError,
    UsageError,
)
from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.hooks import Hooks, Resolved, Veto
from uffdaemon.kernel.descriptor import supported_features
from uffdaemon.kernel.memory import Advice, Memory, MemoryType
from uffdaemon.kernel.page_scan import PageCategory, PageRange, scan_pages
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.model.ledger import OpenFault
from uffdaemon.model.region import Fault, Policy, Region, Retry
from uffdaemon.model.statistics import Statistics
from uffdaemon.moves.calls import copy_exactly, move, move_in_trio, move_many
from uffdaemon.moves.preview import can_move
from uffdaemon.moves.staging import Staging
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
from uffdaemon.uapi.events import Event, FaultKind, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent
from uffdaemon.uapi.features import Features, IoctlSet, RegisterMode
from uffdaemon.uapi.moved import Cause, Moved, Run
from uffdaemon.uapi.outcomes import Code, Operation, Outcome, Result, Status

__version__ = version("uffdaemon")

__all__ = [
    "Action",
    "Advice",
    "AsyncSource",
    "ByKind",
    "ByRange",
    "BytesSource",
    "Cause",
    "Code",
    "Continue",
    "CopyFrom",
    "Daemon",
    "Event",
    "Fallback",
    "Fault",
    "FaultAround",
    "FaultKind",
    "Features",
    "FileSource",
    "FirstOf",
    "ForkEvent",
    "GuardedRegion",
    "Hold",
    "Hooks",
    "IoctlSet",
    "KernelRefusal",
    "Memory",
    "MemoryType",
    "MoveOrCopy",
    "MoveRefused",
    "Moved",
    "OpenFault",
    "Operation",
    "OperationError",
    "Outcome",
    "PageCategory",
    "PageNotExclusive",
    "PageRange",
    "Perform",
    "PermissionRefused",
    "Placement",
    "PlacementRefused",
    "Poison",
    "Policy",
    "Region",
    "RegisterMode",
    "RemapEvent",
    "RemoveEvent",
    "Resolved",
    "Resolver",
    "Result",
    "Retry",
    "Run",
    "Shutdown",
    "Source",
    "Span",
    "Staging",
    "Statistics",
    "Status",
    "StrictMove",
    "UffdaemonError",
    "UnmapEvent",
    "Unprotect",
    "UsageError",
    "Userfaultfd",
    "Veto",
    "Watchdog",
    "ZeroPage",
    "actions",
    "can_move",
    "copy_exactly",
    "errors",
    "move",
    "move_in_trio",
    "move_many",
    "open_daemon",
    "scan_pages",
    "serve",
    "supported_features",
]
