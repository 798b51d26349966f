"""Guarding memory of this process: the userfaultfd that a placement needs, and its limits."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.events import FaultKind
from uffdaemon.features import Features, RegisterMode
from uffdaemon.guarded import GuardedRegion
from uffdaemon.memory import Advice
from uffdaemon.opening import supported_features
from uffdaemon.placement import Placement, Resolver
from uffdaemon.uffd import Userfaultfd

if TYPE_CHECKING:
    from uffdaemon.loop import Server
    from uffdaemon.memory import Memory
    from uffdaemon.region import Region
    from uffdaemon.regions import Segment

_KINDS = {RegisterMode.MISSING: FaultKind.MISSING, RegisterMode.MINOR: FaultKind.MINOR}

_EXTERNAL: Final = Placement.EXTERNAL
_TRIO: Final = "answered by the trio loop of this very process"


def prepare(
    memory: Memory,
    features: Features,
    user_mode_only: bool | None,  # noqa: FBT001  # as it was given to `guard`
    register: RegisterMode,
    resolver: Resolver,
) -> Userfaultfd:
    """Open the userfaultfd of `memory` as its placement needs it, unless it has one.

    Raises `PlacementRefused`, and what `Userfaultfd.open` raises.
    """
    in_thread = resolver is Resolver.IN_THREAD
    if in_thread and register not in _KINDS:
        raise errors.PlacementRefused(
            f"registered for {register!r}, the kind of a fault would not be known: the kernel "
            "sends nothing but SIGBUS to a thread that answers itself.  Use resolver='thread'"
        )
    if memory.userfaultfd is None:
        memory.userfaultfd = _open(features, user_mode_only, resolver)
    opened = memory.userfaultfd.features
    if in_thread is not bool(opened & Features.SIGBUS):
        raise errors.PlacementRefused(
            "whether faulting threads answer themselves (resolver='in-thread') is decided when "
            "memory is guarded for the first time: the userfaultfd that it has is "
            + ("not " if in_thread else "")
            + "made for that"
        )
    if resolver is not Resolver.LOOP and not opened & Features.EVENT_FORK:
        # A child that nobody guards would read zeros where data is due.
        memory.advise(Advice.DONTFORK)
    elif memory.kept_from_children:
        memory.advise(Advice.DOFORK)
        memory.kept_from_children = False
    return memory.userfaultfd


def leave_behind(uffd: Userfaultfd, segment: Segment) -> None:
    """Nobody reads the events of this part of a region any more: see that no fork waits for that.

    What is complete is watched no more; what is not, children do not get.
    """
    region = segment.region
    if not isinstance(region, GuardedRegion) or not uffd.features & Features.EVENT_FORK:
        return
    with suppress(errors.KernelRefusal):
        if region.pages.filled() == region.pages.pages and region.placement is not _EXTERNAL:
            uffd.unregister(segment.start, segment.end - segment.start)
        elif region.memory.start:
            region.memory.advise(Advice.DONTFORK)
            region.memory.kept_from_children = True


def _open(
    features: Features,
    user_mode_only: bool | None,  # noqa: FBT001
    resolver: Resolver,
) -> Userfaultfd:
    supported = supported_features()
    features &= supported
    if resolver is Resolver.IN_THREAD:
        if not supported & Features.SIGBUS:
            raise errors.FeatureMissing("UFFDIO_API", "SIGBUS", Features.SIGBUS)
        features = (features & ~Features.EVENT_FORK) | Features.SIGBUS
    if resolver is not Resolver.LOOP:
        # Where memory goes by mremap(2) without this event, the kernel stops guarding it.
        features |= Features.EVENT_REMAP & supported
    wanted = [features]
    if resolver is Resolver.THREAD and supported & Features.EVENT_FORK:
        wanted.insert(0, features | Features.EVENT_FORK)
    modes = [False, True] if user_mode_only is None else [user_mode_only]
    *others, last = [(each, mode) for mode in modes for each in wanted]
    for each, mode in others:
        try:
            return Userfaultfd.open(each, user_mode_only=mode)
        except errors.PermissionRefused:
            continue
    return Userfaultfd.open(last[0], user_mode_only=last[1])


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
    for mode, kind in _KINDS.items():
        gap = server.rules.gap(region, kind) if register & mode else None
        if gap is not None:
            return (
                f"at offset {gap:#x} its policy is no rule that C can carry out, or takes its "
                f"bytes from memory that is guarded itself, so that {kind.value} faults are {_TRIO}"
            )
    return ""
