"""Whether a thread that holds the GIL may touch a region, and if not, why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.guard.requirements import KINDS
from uffdaemon.model.region import (
    Region,
    policy_name,
)
from uffdaemon.policy import moves
from uffdaemon.uapi.features import RegisterMode

if TYPE_CHECKING:
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.loop import Server
    from uffdaemon.model.region import Policy


_TRIO: Final = "answered by the trio loop of this very process"


def why_unsafe(server: Server, region: Region, register: RegisterMode) -> str:
    """Why a thread that holds the GIL must not touch the region; "" if it may."""
    if not server.post.native:
        return f"its faults are {_TRIO} (placement='in_process')"
    if server.ended.is_set():
        return "the daemon that guarded it has ended"
    if not server.handler.regions.segments(region):
        return "it is served no more"
    if server.handler.hooks.before:
        return f"a `before` hook wants to be asked about every fault, so that all are {_TRIO}"
    if register & RegisterMode.WP:
        return "writes to protected pages (RegisterMode.WP) are always the trio loop's"
    for mode, kind in KINDS.items():
        gap = server.rules.gap(region, kind) if register & mode else None
        if gap is not None:
            return (
                f"at offset {gap:#x} its policy is no rule that C can carry out, or takes its "
                f"bytes from memory that is guarded itself, so that {kind.value} faults are {_TRIO}"
            )
    return ""


def check_moves(uffd: Userfaultfd, policy: Policy) -> None:
    """Raise `PlacementRefused` for a policy that moves pages of another process."""
    if moves(policy) and not uffd.same_process:
        raise errors.PlacementRefused(
            f"policy {policy_name(policy)} moves pages, and this userfaultfd is another "
            "process's: the kernel moves pages only from inside of the process whose memory "
            "it is.  Serve it in that process, or copy."
        )
