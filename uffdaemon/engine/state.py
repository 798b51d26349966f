"""What the parts of the engine share about one userfaultfd that is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from uffdaemon.actions import Zero
from uffdaemon.hooks import HookCalls
from uffdaemon.model.ledger import Ledger
from uffdaemon.model.refaults import Refaults
from uffdaemon.model.region_table import RegionTable, nowhere, outside_every_region
from uffdaemon.model.statistics import Counters
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from uffdaemon.hooks import Hooks
    from uffdaemon.kernel.userfaultfd import CarryOut, Userfaultfd
    from uffdaemon.log import Log
    from uffdaemon.model.region import Fault, Policy, Region
    from uffdaemon.uapi.events import ForkEvent, PageFault
    from uffdaemon.uapi.outcomes import Operation, Result


class Forked(NamedTuple):
    """A forked child that is not served yet."""

    event: ForkEvent
    regions: RegionTable
    place: int
    """Of the event in the journal; 0: there is none."""


class Loop(Protocol):
    """What the engine needs of the loop that serves the userfaultfd."""

    @property
    def carry_out(self) -> CarryOut | None:
        """How operations are carried out where C may have read events that Python has not seen;
        None: by a plain call."""
        ...

    def wake(self) -> None:
        """Run another turn: something has changed."""
        ...

    def drain(self) -> bool:
        """Handle what C has read by now.  Tasks call it before they act."""
        ...

    def events_applied(self) -> None:
        """Everything that was read until now has been applied."""
        ...

    def peers(self) -> Iterable[Served]:
        """All userfaultfds of this process that the daemon serves, this one among them."""
        ...


class Served:
    """One userfaultfd: its regions, its open faults, its counters and its hooks."""

    def __init__(
        self,
        uffd: Userfaultfd,
        hooks: Sequence[Hooks],
        log: Log,
        loop: Loop,
        regions: RegionTable | None = None,
    ) -> None:
        self.uffd = uffd
        self.number: int = uffd.fileno()
        self.log = log
        self.loop = loop
        self.regions: RegionTable = RegionTable() if regions is None else regions
        self.ledger: Ledger = Ledger()
        self.counters: Counters = Counters()
        self.hooks: HookCalls = HookCalls(hooks, self.counters, log)
        self.refaults: Refaults = Refaults()
        self.forks: list[Forked] = []
        self.stale: set[int] = set()
        """Which page maps (by id) have changed so that rules made from them no longer hold."""
        self.client_gone = False
        self.default: Policy = outside_every_region
        """Decides about faults outside every region."""
        self.process = "this process" if uffd.same_process else ""
        """Whose memory it is, for people; "": not known."""

    def outside(self, event: PageFault) -> Region:
        """The placeholder for a fault outside every region, which names the userfaultfd."""
        owner = f"{self.number} ({self.process})" if self.process else str(self.number)
        size = self.regions.page_size_below(event.address)
        return nowhere(event, self.default, f"userfaultfd {owner}", size)

    def execute(self, operations: Sequence[Operation]) -> list[Result]:
        """Carry operations out as the loop has it done."""
        return self.uffd.execute(operations, self.loop.carry_out)

    def zeros_for(self, fault: Fault) -> Zero:
        """The action for a discarded page: write-protected if its contents were to be."""
        record = self.ledger.find(fault)
        return Zero(write_protect=record is not None and record.protects)

    def discarded(self, fault: Fault) -> bool:
        """Whether the page's owner discarded it, so that its contents are zeros."""
        region = fault.region
        return (
            region.pages.any_removed
            and region.after_remove == "zero"
            and fault.kind is FaultKind.MISSING
            and fault.page in region.pages.removed
        )
