"""Tells the hooks of faults that C has resolved by rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.engine.failures import refused_in_c
from uffdaemon.hooks import Resolved
from uffdaemon.model.region import Fault
from uffdaemon.uapi.events import PageFault, parse
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code, Outcome

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.native.ports import Record


def tell_resolved(served: Served, record: Record, now: int) -> None:
    """Tell the ``after`` hooks of a fault that a rule has resolved; `now` is in nanoseconds."""
    [event] = parse(record.message)
    if not isinstance(event, PageFault):
        return
    region = served.regions.find(event.address)
    if region is None:
        return
    fault = Fault(
        event.address - (event.address - region.start) % region.page_size,
        event.kind,
        event.write,
        event.thread,
        event.address,
        region,
        now - record.latency,
    )
    outcome = Outcome.ALREADY_PRESENT if record.present else OUTCOME_OF_CODE[Code(record.code)]
    if record.error:
        refused_in_c(served, fault, record.error)
    served.hooks.after(Resolved(fault, outcome, record.latency, record.done))
