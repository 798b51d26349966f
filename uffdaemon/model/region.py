"""A region: a range of memory, the policy that decides about its faults, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from uffdaemon.actions import Action, Hold, Poison
from uffdaemon.arguments import (
    check_callable,
    check_choice,
    check_count,
    check_policy,
    check_seconds,
    check_type,
)
from uffdaemon.model.page_map import PageMap
from uffdaemon.names import name_of
from uffdaemon.ranges import PAGE_SIZE, check_page_size, check_range

if TYPE_CHECKING:
    from uffdaemon.uapi.events import FaultKind


class Fault(NamedTuple):
    """A fault, as policies and hooks see it."""

    address: int
    """Bytes, aligned to the region's page size."""
    kind: FaultKind
    write: bool
    """Whether the access is a write; False may also mean unknown."""
    thread: int
    """The thread's id; 0 without THREAD_ID."""
    exact_address: int
    """Bytes, as the kernel reported it: not aligned with EXACT_ADDRESS."""
    region: Region
    read_at: int
    """When the message was read, in nanoseconds of ``time.perf_counter_ns``."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the region."""
        return self.address - self.region.start

    @property
    def page(self) -> int:
        """The number of the page in the region, from 0."""
        return (self.address - self.region.start) // self.region.page_size


Policy: TypeAlias = Callable[[Fault], Action | None]


def policy_name(policy: Policy) -> str:
    """The name of a policy in logs: that of its function, or its repr."""
    return name_of(policy)


FailureAction: TypeAlias = "Hold | Poison | Callable[[Fault, Exception], Action | None]"
"""What is done about a fault that failed: leave the thread waiting, give it SIGBUS, or call the
application with the fault and the error, which returns an action (None: hold).  If that fails as
well, the fault is held."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long a region tries its source.  Times are in seconds.

    Raises TypeError, and ValueError for less than one attempt, or a timeout of 0 or less.
    """

    attempts: int = 3
    """How often the source is asked for the same bytes in total."""
    timeout: float = 30.0
    """The limit of one attempt; and for how long a fault is tried again where there is no memory
    (ENOMEM) or no descriptor (EMFILE, ENFILE), however often that is."""
    first_delay: float = 0.01
    """The pause before the second attempt; it doubles with each further one, up to `max_delay`."""
    max_delay: float = 1.0

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts, least=1)
        check_seconds("timeout", self.timeout, positive=True)
        check_seconds("first_delay", self.first_delay)
        check_seconds("max_delay", self.max_delay)

    def delay(self, failures: int) -> float:
        """Seconds to wait after `failures` (at least 1) failed attempts."""
        return min(self.first_delay * 2.0 ** min(failures - 1, 64), self.max_delay)


HOLD = Hold()
RETRY = Retry()
POLICY_TIMEOUT = 5.0
AfterRemove: TypeAlias = Literal["zero", "policy"]


@dataclass(eq=False, slots=True, repr=False)
class Region:
    """`length` bytes from address `start` of the faulting process, with a policy.

    Raises `InvalidRange` if the range is empty, unaligned or past the end of the address space, and
    TypeError or ValueError for other arguments.
    """

    start: int
    length: int
    policy: Policy
    page_size: int = PAGE_SIZE
    """Bytes: the kernel's (`mmap.PAGESIZE`), or the huge page size of hugetlb memory."""
    on_failure: FailureAction = HOLD
    retry: Retry = RETRY
    policy_timeout: float = POLICY_TIMEOUT
    """Seconds that the policy, or a `Perform`, may take for one fault."""
    after_remove: AfterRemove = "zero"
    """What discarded pages contain: zeros, as the kernel promises, or the policy's contents again.
    Without EVENT_REMOVE, discards are not reported, and it is always "policy"."""
    name: str = ""
    """Shown in logs and dumps."""
    pages: PageMap = field(init=False)
    """Which pages are present, absent or discarded, as far as known."""

    def __post_init__(self) -> None:
        for name in ("start", "length", "page_size"):
            check_type(name, getattr(self, name), int)
        check_page_size(self.page_size)
        check_range(self.start, self.length, self.page_size, "the region")
        check_policy("policy", self.policy)
        if not isinstance(self.on_failure, Hold | Poison):
            check_callable("on_failure", self.on_failure, "a fault and an error")
        check_type("retry", self.retry, Retry)
        check_seconds("policy_timeout", self.policy_timeout, positive=True)
        check_choice("after_remove", self.after_remove, get_args(AfterRemove))
        check_type("name", self.name, str)
        shared = getattr(self.policy, "keeps_pages_in_file", False)
        self.pages = PageMap(self.length // self.page_size, shared=shared)

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        text = f"{type(self).__name__}{name}: {self.length} bytes at {self.start:#x}"
        if self.page_size != PAGE_SIZE:
            text += f" in pages of {self.page_size} bytes"
        text += f", policy {policy_name(self.policy)}"
        if self.on_failure != HOLD:
            text += f", on_failure {name_of(self.on_failure)}"
        if self.after_remove != "zero":
            text += f", after_remove {self.after_remove!r}"
        return f"<{text}>"

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


Missing: TypeAlias = Literal["hold", "poison", "release"]
"""What happens to the missing pages of a region that is removed: their faults are held and listed,
the pages are poisoned, or the kernel fills them with zeros."""
