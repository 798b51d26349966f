"""A region: a range of memory, who decides about its faults, and what happens when that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from uffdaemon.actions import Action, Hold, Poison
from uffdaemon.model.page_map import PageMap
from uffdaemon.ranges import PAGE_SIZE, check_page_size, check_range

if TYPE_CHECKING:
    from uffdaemon.uapi.events import FaultKind


class Fault(NamedTuple):
    """What a policy is told."""

    address: int
    """Bytes, aligned to the region's page size."""
    kind: FaultKind
    write: bool
    """Whether the thread wants to write; False may also mean that nobody knows."""
    thread: int
    """The thread's id, 0 where THREAD_ID was not negotiated."""
    exact_address: int
    """What the kernel reported: the byte itself where EXACT_ADDRESS was negotiated."""
    region: Region
    read_at: int
    """When the message was read, in nanoseconds of ``time.perf_counter_ns``."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the region."""
        return self.address - self.region.start

    @property
    def page(self) -> int:
        """The number of the page in the region."""
        return (self.address - self.region.start) // self.region.page_size


Policy: TypeAlias = Callable[[Fault], Action | None]


def policy_name(policy: Policy) -> str:
    """What a policy is called in logs: its function's name, or its repr."""
    name = getattr(policy, "__qualname__", None)
    return name if isinstance(name, str) else shorten(repr(policy), 300)


def shorten(text: str, length: int) -> str:
    """`text`, its middle left out where it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


FailureAction: TypeAlias = "Hold | Poison | Callable[[Fault, Exception], Action | None]"
"""What is done about a fault that could not be answered: leave the thread waiting, give it SIGBUS,
or ask the application, which returns an action (None: hold).  If that fails too, it is held."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a region is with its source.  Times are seconds."""

    attempts: int = 3
    """How often the source is asked for the same bytes, in all."""
    timeout: float = 30.0
    """How long one attempt may take."""
    first_delay: float = 0.01
    """The wait before the second attempt; it doubles from one to the next."""
    max_delay: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.timeout > 0:
            raise ValueError(f"{self!r}: at least one attempt, and a timeout above 0, are needed")

    def delay(self, failures: int) -> float:
        """Seconds to wait after `failures` (at least 1) failed attempts."""
        return min(self.first_delay * 2.0 ** min(failures - 1, 64), self.max_delay)


HOLD = Hold()
RETRY = Retry()
POLICY_TIMEOUT = 5.0
AfterRemove: TypeAlias = Literal["zero", "policy"]


@dataclass(eq=False, slots=True)
class Region:
    """`length` bytes from address `start` of the process that faults.

    Raises `InvalidRange` when the range is empty, unaligned or past the end of the address space.
    """

    start: int
    length: int
    policy: Policy
    page_size: int = PAGE_SIZE
    """Bytes: 4096, or the huge page size of hugetlb memory."""
    on_failure: FailureAction = HOLD
    retry: Retry = RETRY
    policy_timeout: float = POLICY_TIMEOUT
    """Seconds that the policy, or the work it asks for, may take for one fault."""
    after_remove: AfterRemove = "zero"
    """What pages hold after their owner discarded them: zeros, as the kernel promises, or what the
    policy says once more.  Without EVENT_REMOVE nobody hears of it, and it is always the latter."""
    name: str = ""
    """For people: shown in logs and dumps."""
    pages: PageMap = field(init=False, repr=False)
    """What is known of each page."""

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        check_range(self.start, self.length, self.page_size, "the region")
        _check_callables(self.policy, self.on_failure)
        if self.after_remove not in get_args(AfterRemove):
            raise ValueError(f"after_remove is 'zero' or 'policy', not {self.after_remove!r}")
        self.pages = PageMap(self.length // self.page_size)

    @property
    def end(self) -> int:
        """The first address after the region."""
        return self.start + self.length

    @property
    def label(self) -> str:
        """The name, or the range."""
        return self.name or f"{self.start:#x}-{self.end:#x}"

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end


def _check_callables(policy: object, on_failure: object) -> None:
    """Types promise it; what is not checked by them is found out here, and not at a fault."""
    if isinstance(policy, type) or not callable(policy):
        raise TypeError(f"a policy is a callable that takes a fault, not {policy!r:.100}")
    if not isinstance(on_failure, Hold | Poison) and not callable(on_failure):
        raise TypeError(f"on_failure is Hold(), Poison() or a callable, not {on_failure!r:.100}")


Missing: TypeAlias = Literal["hold", "poison", "release"]
"""What becomes of the missing pages of a region that is removed: their faults are held and listed;
they are poisoned; or the kernel fills them with zeros."""
