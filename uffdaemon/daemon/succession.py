"""Going on where a predecessor was: its regions, what it had read, and forked children."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uffdaemon.daemon.safety import check_moves
from uffdaemon.engine.shutdown import is_alive
from uffdaemon.journal.fork_books import copier
from uffdaemon.journal.journal import number_of
from uffdaemon.journal.replay import replay
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.placement import Resolver
from uffdaemon.uapi.outcomes import Code, Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from uffdaemon.daemon.handover import Kept
    from uffdaemon.daemon.servers import Servers
    from uffdaemon.journal.area import Area
    from uffdaemon.journal.journal import Journal
    from uffdaemon.journal.replay import Child
    from uffdaemon.model.page_map import PageMap
    from uffdaemon.model.region import FailureAction, Policy, Region
    from uffdaemon.model.region_table import RegionTable


class Given(NamedTuple):
    """What a successor brings along, since a journal has no code."""

    policy: Policy | Mapping[str, Policy]
    on_failure: FailureAction | None
    resolver: Resolver

    def policy_of(self, name: str) -> Policy:
        """The policy of a region.  Raises LookupError."""
        if callable(self.policy):
            return self.policy
        found = self.policy.get(name)
        if found is None:
            raise LookupError(f"the journal has a region named {name!r}: there is no policy for it")
        return found


class _Loaded(NamedTuple):
    """The state of a userfaultfd when its predecessor ended."""

    area: Area
    regions: RegionTable
    children: list[Child]
    """All that were forked since the last checkpoint."""


def take_over(
    servers: Servers,
    uffd: Userfaultfd,
    regions: RegionTable,
    *,
    owns_fd: bool,
    resolver: Resolver = Resolver.LOOP,
    area: Area | None = None,
) -> None:
    """Serve regions of a predecessor, and wake the threads that wait there."""
    for segment in regions:
        check_moves(uffd, segment.region.policy)
    name = "a successor's"
    server = servers.start(uffd, resolver, name, regions, owns_fd=owns_fd, area=area)
    server.rules.schedule_update()
    server.save()
    if is_alive(server.served):
        uffd.execute([Operation(Code.WAKE, s.start, s.end - s.start) for s in regions])
    else:
        server.handler.client_exited()


def resume(servers: Servers, uffd: Userfaultfd, journal: Journal, given: Given) -> list[Region]:
    """See `Daemon.resume`."""
    loaded = _load(journal, number_of(uffd.fileno()), given, {})
    for child in loaded.children:
        if not journal.has_child(loaded.area.number, child.place):
            servers.handover.lost(loaded.area.number, child)
    _serve(servers, uffd, journal, loaded, given)
    return [segment.region for segment in loaded.regions]


def resume_kept(servers: Servers, given: Given) -> list[Userfaultfd]:
    """See `Daemon.resume_kept`."""
    handover = servers.handover
    journal = handover.journal
    if journal is None:
        return []
    kept = handover.kept()
    try:
        found = [_load(journal, number, given, kept.books) for number in journal.userfaultfds]
        for parent in found:  # grows by children of which there is no checkpoint yet
            found += _new_children(servers, journal, parent, kept)
        resumed: list[Userfaultfd] = []
        for loaded in found:
            number = loaded.area.number
            fd = kept.userfaultfd(loaded.area)
            if fd is None:
                handover.end(
                    loaded.area
                )  # nobody has it any more: its process ended, or reads zeros
                servers.log.error("userfaultfd not kept", number=number)
                continue
            uffd = Userfaultfd.adopt(fd)
            _serve(servers, uffd, journal, loaded, given, owns_fd=True)
            resumed.append(uffd)
            pidfd = kept.clients.pop(number, None)
            if pidfd is not None:
                servers.watch(uffd, pidfd)
        handover.forget_unused(kept)
    finally:
        kept.close()
    return resumed


def _load(
    journal: Journal, number: int, given: Given, books: Mapping[tuple[int, int], int]
) -> _Loaded:
    area = journal.area(number)
    regions = area.load(given.policy_of, given.on_failure)

    def copy_at(place: int) -> Callable[[PageMap], PageMap]:
        return copier(books.get((number, place)))

    return _Loaded(area, regions, replay(regions, area.events(), copy_at))


def _new_children(servers: Servers, journal: Journal, parent: _Loaded, kept: Kept) -> list[_Loaded]:
    """The children of whose birth only the parent's journal tells."""
    found: list[_Loaded] = []
    for child in parent.children:
        number = parent.area.number
        if journal.has_child(number, child.place):
            continue
        fd = kept.children.get((number, child.place))
        if fd is None:
            servers.handover.lost(number, child)
            continue
        area = servers.handover.begin_child(parent.area, fd, child.place, child.regions)
        if area is not None:
            found.append(_Loaded(area, child.regions, []))
    return found


def _serve(
    servers: Servers,
    uffd: Userfaultfd,
    journal: Journal,
    loaded: _Loaded,
    given: Given,
    *,
    owns_fd: bool = False,
) -> None:
    area: Area | None = loaded.area
    if journal is not servers.handover.journal:
        area = servers.handover.begin(uffd)
        for segment in loaded.regions:
            pages = segment.region.pages
            segment.region.pages = pages.copy() if area is None else area.home(pages)
    take_over(servers, uffd, loaded.regions, owns_fd=owns_fd, resolver=given.resolver, area=area)
