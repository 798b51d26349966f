"""Memory, sources and faults that are nowhere but in these tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from uffdaemon.errors import SourceTooShort
from uffdaemon.model.region import Fault, Policy, Region
from uffdaemon.policy import ZeroPage
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.events import FaultKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.native.ports import Port

PAGE, HUGE = PAGE_SIZE, HUGE_PAGE_SIZE
START = 0x7F00_0000_0000

MISSING, MINOR, WP, UNKNOWN = FaultKind.MISSING, FaultKind.MINOR, FaultKind.WP, FaultKind.UNKNOWN


class FakeSource:
    """`size` bytes that lie at address `base`, or that have to be fetched where `base` is None."""

    def __init__(self, size: int, base: int | None = 0x10_0000_0000) -> None:
        self.size = size
        self.base = base

    def __repr__(self) -> str:
        return f"FakeSource({self.size:#x})"

    def address(self, offset: int, length: int) -> int | None:
        if offset < 0 or offset + length > self.size:
            raise SourceTooShort(f"{length} bytes at {offset:#x}")
        return None if self.base is None else self.base + offset

    async def fetch(self, offset: int, length: int) -> bytes:
        raise NotImplementedError


def a_region(
    policy: Policy | None = None,
    pages: int = 16,
    *,
    page_size: int = PAGE,
    start: int = START,
    name: str = "",
) -> Region:
    decides = ZeroPage() if policy is None else policy
    return Region(start, pages * page_size, decides, page_size=page_size, name=name)


def a_fault(
    region: Region,
    page: int = 0,
    kind: FaultKind = MISSING,
    *,
    write: bool = False,
    thread: int = 1,
    read_at: int = 0,
) -> Fault:
    address = region.start + page * region.page_size
    return Fault(address, kind, write, thread, address, region, read_at)


class FakePort:
    """What C has counted."""

    def __init__(
        self,
        counts: Iterable[tuple[int, int, int]] = (),
        done: Iterable[tuple[int, int]] = (),
        latencies: Iterable[int] = (),
    ) -> None:
        self._counts = list(counts)
        self._done = list(done)
        self._latencies = list(latencies)

    def counts(self) -> list[tuple[int, int, int]]:
        return self._counts

    def bytes_by_code(self) -> list[tuple[int, int]]:
        return self._done

    def latencies(self) -> list[int]:
        return self._latencies

    def as_port(self) -> Port:
        return cast("Port", self)
