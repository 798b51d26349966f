"""uffdaemon: own a Linux userfaultfd, and decide in trio how memory comes into being."""

from importlib.metadata import version

from uffdaemon import actions, errors
from uffdaemon.actions import Action, Fallback, Hold, Perform, Source, Span
from uffdaemon.causes import Cause, Moved, Run
from uffdaemon.daemon import Daemon
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
from uffdaemon.events import Event, FaultKind, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent
from uffdaemon.features import Features, IoctlSet, RegisterMode
from uffdaemon.foretelling import can_move
from uffdaemon.guarded import GuardedRegion
from uffdaemon.hooks import Hooks, Resolved, Veto
from uffdaemon.leaving import Shutdown
from uffdaemon.ledger import OpenFault
from uffdaemon.memory import Advice, Memory, MemoryType
from uffdaemon.mover import copy_exactly, move, move_in_trio, move_many
from uffdaemon.opening import supported_features
from uffdaemon.outcomes import Code, Operation, Outcome, Result, Status
from uffdaemon.pagemap import PageCategory, PageRange, scan_pages
from uffdaemon.placement import Placement, Resolver, Watchdog
from uffdaemon.policy import (
    ByKind,
    ByRange,
    Continue,
    CopyFrom,
    Fault,
    FaultAround,
    FirstOf,
    MoveOrCopy,
    Poison,
    Policy,
    StrictMove,
    Unprotect,
    ZeroPage,
)
from uffdaemon.region import Region, Retry
from uffdaemon.serving import open_daemon, serve
from uffdaemon.sources import AsyncSource, BytesSource, FileSource
from uffdaemon.staging import Staging
from uffdaemon.statistics import Statistics
from uffdaemon.uffd import Userfaultfd

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
