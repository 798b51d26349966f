"""Where faults are resolved, chosen by name.

A thread that touches a missing page sleeps in the kernel until its fault is resolved.  If it is a
Python thread that holds the GIL meanwhile, the fault has to be resolved without this interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, TypeAlias, get_args


class _Choice(Enum):
    @classmethod
    def _missing_(cls, value: object) -> None:
        names = ", ".join(repr(each.value) for each in cls)
        raise ValueError(f"{cls.__name__.lower()} is one of {names}, not {value!r}")


class Placement(_Choice):
    """What resolves the faults of memory of this process; see docs/placement.md."""

    NATIVE = "native"
    """C in this process, from rules, without the interpreter.  trio resolves the other faults."""
    EXTERNAL = "external"
    """A daemon in a process of its own: any access is safe, but pages cannot be moved."""
    IN_PROCESS = "in_process"
    """The trio loop of this process.  Only threads without the GIL may touch missing pages."""


class Resolver(_Choice):
    """What carries out rules in the process that has the userfaultfd."""

    LOOP = "loop"
    """The event loop's thread, while trio sleeps."""
    THREAD = "thread"
    """A C thread that never needs the interpreter."""
    IN_THREAD = "in-thread"
    """The faulting thread, in a handler of SIGBUS (``UFFD_FEATURE_SIGBUS``): no other thread has to
    wake up.  System calls that touch a missing page fail with EFAULT, and children do not get the
    memory.  A thread that has SIGBUS blocked, as helper threads of C libraries may, must not touch
    missing pages: the kernel ends the process, and nothing can prevent it.  `Daemon.guard` and
    `GuardedRegion.buffer` refuse a thread that has it blocked.  SIGBUS that another process sends
    does what it would do without this library; a handler that is installed later must chain."""


PlacementName: TypeAlias = Literal["native", "external", "in_process"]
ResolverName: TypeAlias = Literal["loop", "thread", "in-thread"]
Then: TypeAlias = Literal["report", "poison", "exit"]


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Reports faults of this process that Python has not dequeued, or not finished, in time.

    It is a C thread.  After `after` seconds it writes the waiting thread, the address and that
    thread's Python stack to standard error.  Then it does what `then` says: "report" does nothing
    more, "poison" poisons the page, so that the thread gets SIGBUS, and "exit" ends the process
    with status `STATUS`.  Raises ValueError for other values.
    """

    after: float = 0.5
    then: Then = "report"

    STATUS: ClassVar[int] = 70
    """The exit status of ``then="exit"``: EX_SOFTWARE of sysexits.h."""

    def __post_init__(self) -> None:
        if not self.after > 0:
            raise ValueError(f"the watchdog waits {self.after} s: more than 0 is needed")
        if self.then not in get_args(Then):
            raise ValueError(f"then is 'report', 'poison' or 'exit', not {self.then!r}")


class Shutdown(Enum):
    """What a daemon does with open faults when it ends."""

    HOLD = "hold"
    """Leave their threads waiting, for a successor with the same descriptor."""
    RESOLVE = "resolve"
    """Resolve them first, as far as that is possible in time, and hold the others."""
    POISON = "poison"
    """Poison their pages: their threads get SIGBUS."""
