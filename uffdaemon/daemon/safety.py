"""Decides whether a thread that holds the GIL may touch a region, and gives the reason if not."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.arguments import check_type
from uffdaemon.external.plan import ExternalPolicy
from uffdaemon.guard.requirements import KINDS
from uffdaemon.kernel.memory import Memory
from uffdaemon.kernel.thread_signals import threads_that_block
from uffdaemon.model.region import (
    Region,
    policy_name,
)
from uffdaemon.placement import Placement, Resolver
from uffdaemon.policy import moves
from uffdaemon.uapi.features import Features, RegisterMode

if TYPE_CHECKING:
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.loop import Server
    from uffdaemon.model.region import Policy


_TRIO: Final = "resolved by the trio loop of this process"


def warn_of_blocked(server: Server, region: Region) -> None:
    """Log which threads must not touch a region whose faults are resolved in a handler of SIGBUS:
    those that have it blocked would be ended with the process."""
    if server.endpoint.resolver is not Resolver.IN_THREAD:
        return
    blocked = threads_that_block(signal.SIGBUS)
    if blocked:
        server.served.log.warning(
            "threads that have SIGBUS blocked must not touch this memory",
            region=region.label,
            threads=blocked,
        )


def why_unsafe(server: Server, region: Region, register: RegisterMode) -> str:
    """Why a thread that holds the GIL must not touch the region; "" if it may."""
    if not server.endpoint.native:
        return f"its faults are {_TRIO} (placement='in_process')"
    # With WP_ASYNC, the kernel resolves faults of write-protected pages.
    protects = register & RegisterMode.WP and not server.uffd.features & Features.WP_ASYNC
    if server.ended.is_set():
        ended = "the daemon that guarded it has ended"
        return "" if not protects and all_present(region) else ended
    if not server.served.regions.segments(region):
        return "it is no longer served"
    if server.endpoint.resolver is Resolver.IN_THREAD and signal.SIGBUS in signal.pthread_sigmask(
        signal.SIG_BLOCK, ()
    ):
        return "this thread has SIGBUS blocked, and would be ended with the process"
    if server.served.hooks.before:
        return f"a `before` hook is called for every fault, so all faults are {_TRIO}"
    if protects:
        return f"faults of write-protected pages (RegisterMode.WP) are {_TRIO}"
    for mode, kind in KINDS.items():
        gap = server.rules.gap(region, kind) if register & mode else None
        if gap is not None:
            return (
                f"at offset {gap:#x} its policy cannot be lowered to a rule, or copies from memory "
                f"that is guarded itself, so {kind.value} faults are {_TRIO}"
            )
    return ""


def all_present(region: Region) -> bool:
    """Whether no access to the region can fault for want of a page."""
    return region.pages.present.next_absent(0, region.pages.pages) is None


def check_memory(memory: object) -> None:
    """Raise unless memory can be guarded: TypeError, or `InvalidRange` if it has been closed."""
    check_type("memory", memory, Memory, "Memory.map makes one, which can be viewed as an array")
    if isinstance(memory, Memory) and memory.start == 0:
        raise errors.InvalidRange("this memory has been unmapped")


def check_moves(uffd: Userfaultfd, policy: Policy) -> None:
    """Raise `PlacementRefused` for a policy that moves pages of another process."""
    if moves(policy) and not uffd.same_process:
        raise errors.PlacementRefused(
            f"policy {policy_name(policy)} moves pages, and this userfaultfd belongs to another "
            "process: the kernel moves pages only within the process that owns them.  "
            "Serve it in that process, or copy."
        )


def placed_policy(policy: Policy | str, placement: Placement) -> Policy:
    """The policy, or what takes its place here if another process runs it.

    Raises `PlacementRefused`.
    """
    if placement is Placement.EXTERNAL:
        return ExternalPolicy(policy)
    if isinstance(policy, str):
        raise errors.PlacementRefused(
            f"{policy!r:.100} is the name of a policy, for placement='external'; pass the policy "
            "itself to use it in this process"
        )
    return policy
