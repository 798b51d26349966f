"""Where faults are answered: a choice that is made by name, since each excludes something.

A thread that touches a missing page sleeps in the kernel until somebody answers.  If it is a Python
thread that holds the GIL meanwhile, whoever answers must do so without this interpreter.
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
    """Who answers for memory of this process."""

    NATIVE = "native"
    """C code in this process, by rules, without the interpreter; what no rule covers is trio's."""
    EXTERNAL = "external"
    """A daemon in a process of its own: any policy, any access; but pages cannot be moved."""
    IN_PROCESS = "in_process"
    """The trio loop of this process, for threads that do not hold the GIL while they wait."""


class Resolver(_Choice):
    """How rules are carried out in the process that has the userfaultfd."""

    LOOP = "loop"
    """In the event loop's thread, while trio sleeps."""
    THREAD = "thread"
    """By a thread that never needs the interpreter."""
    IN_THREAD = "in-thread"
    """By the thread that faults, in a signal handler: nobody is woken.  The kernel sends SIGBUS for
    it; so a system call that touches a missing page fails with EFAULT, and children do not get the
    memory."""


PlacementName: TypeAlias = Literal["native", "external", "in_process"]
ResolverName: TypeAlias = Literal["loop", "thread", "in-thread"]
Then: TypeAlias = Literal["report", "poison", "exit"]


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Looks after faults of this process that Python does not take in, from a thread of its own.

    After `after` seconds it writes to standard error who waits, where, and its Python stack; and
    then does what `then` says: nothing else; poison the page, so that its thread gets SIGBUS; or
    end the process with status `STATUS`.
    """

    after: float = 0.5
    then: Then = "report"

    STATUS: ClassVar[int] = 70
    """EX_SOFTWARE of sysexits.h."""

    def __post_init__(self) -> None:
        if not self.after > 0:
            raise ValueError(f"the watchdog waits {self.after} s: more than 0 is needed")
        if self.then not in get_args(Then):
            raise ValueError(f"then is 'report', 'poison' or 'exit', not {self.then!r}")


class Shutdown(Enum):
    """What a daemon that ends does about the faults that are open then."""

    HOLD = "hold"
    """Nothing: their threads wait on, for a successor with the same descriptor that wakes them."""
    RESOLVE = "resolve"
    """Answer them first, as far as that is done in time; hold the others."""
    POISON = "poison"
    """Their threads get SIGBUS."""
