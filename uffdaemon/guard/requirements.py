"""What a placement requires of guarded memory: its userfaultfd, and what it cannot do."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.kernel.descriptor import supported_features
from uffdaemon.kernel.memory import Advice
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.placement import Placement, Resolver
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.features import Features, RegisterMode

if TYPE_CHECKING:
    from uffdaemon.kernel.memory import Memory
    from uffdaemon.model.region import Region
    from uffdaemon.model.region_table import Segment

KINDS: Final = {RegisterMode.MISSING: FaultKind.MISSING, RegisterMode.MINOR: FaultKind.MINOR}

_EXTERNAL: Final = Placement.EXTERNAL


def resolver_for(placement: Placement, resolver: Resolver) -> Resolver:
    """The resolver that memory with this placement gets.

    Raises `PlacementRefused` if the two exclude each other.
    """
    if placement is Placement.IN_PROCESS:
        return Resolver.LOOP
    if placement is Placement.EXTERNAL and resolver is Resolver.IN_THREAD:
        raise errors.PlacementRefused(
            "placement='external' resolves faults in another process, and resolver='in-thread' in "
            "the faulting thread: choose one"
        )
    if placement is Placement.NATIVE and resolver is Resolver.LOOP:
        raise errors.PlacementRefused(
            "resolver='loop' is not native: use placement='in_process' to have the trio loop "
            "resolve faults"
        )
    return resolver


def userfaultfd_for(
    memory: Memory,
    features: Features,
    user_mode_only: bool | None,  # noqa: FBT001  # as it was given to `guard`
    register: RegisterMode,
    resolver: Resolver,
) -> Userfaultfd:
    """Open the userfaultfd that `memory` needs for this resolver, unless it has one.

    Raises `PlacementRefused`, and what `Userfaultfd.open` raises.
    """
    in_thread = resolver is Resolver.IN_THREAD
    if in_thread and register not in KINDS:
        raise errors.PlacementRefused(
            f"resolver='in-thread' cannot serve {register!r}: SIGBUS does not tell the kind of a "
            "fault.  Use resolver='thread'"
        )
    if in_thread and signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        raise errors.PlacementRefused(
            "resolver='in-thread' resolves faults in a handler of SIGBUS, and this thread has "
            "SIGBUS blocked: the kernel would end the process at its first missing page.  Unblock "
            "it, or use resolver='thread'"
        )
    if memory.userfaultfd is None:
        memory.userfaultfd = _open(features, user_mode_only, resolver)
        memory.userfaultfd.guards = memory
    opened = memory.userfaultfd.features
    if in_thread is not bool(opened & Features.SIGBUS):
        raise errors.PlacementRefused(
            "this memory was first guarded with"
            + ("out" if in_thread else "")
            + " resolver='in-thread', which cannot be changed: its userfaultfd was opened with"
            + ("out" if in_thread else "")
            + " UFFD_FEATURE_SIGBUS"
        )
    if resolver is not Resolver.LOOP and not opened & Features.EVENT_FORK:
        # In a child that is not guarded, missing pages would read as zeros.
        memory.advise(Advice.DONTFORK)
    elif memory.kept_from_children:
        memory.advise(Advice.DOFORK)
        memory.kept_from_children = False
    return memory.userfaultfd


def unblock_forks(uffd: Userfaultfd, segment: Segment) -> None:
    """Prepare a segment whose events are no longer read, so that fork(2) does not block on them.

    A complete region is unregistered; an incomplete one is advised DONTFORK.
    """
    region = segment.region
    if not isinstance(region, GuardedRegion) or not uffd.features & Features.EVENT_FORK:
        return
    with suppress(errors.KernelRefusal):
        if region.pages.complete and region.placement is not _EXTERNAL:
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
        # Without this event, mremap(2) unregisters the memory.
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


def refuse_if_exported(region: Region) -> None:
    """Raise `PlacementRefused` if the region has a buffer: a thread that touches a held page of it
    with the GIL held would wait forever."""
    if isinstance(region, GuardedRegion) and region.memory.exported:
        raise errors.PlacementRefused(
            f"buffers of {region.label} exist, and a thread that waits with the GIL held would "
            "wait forever: delete them first, or pass missing='poison' or 'release'"
        )


def unregistered(region: Region, uffd: Userfaultfd) -> None:
    """Its range was unregistered: what it has by the time it is guarded again may be anything."""
    if isinstance(region, GuardedRegion) and region.memory.userfaultfd is uffd:
        region.memory.resumable = False
