"""The daemon that applications call: it serves any number of userfaultfds in one trio program."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, get_args

import trio

from uffdaemon import errors, native
from uffdaemon.arguments import check_type
from uffdaemon.daemon.contents import Contents
from uffdaemon.daemon.removal import remove
from uffdaemon.daemon.safety import (
    check_memory,
    check_moves,
    placed_policy,
    warn_of_blocked,
    why_unsafe,
)
from uffdaemon.daemon.servers import Options, Servers, check_default
from uffdaemon.daemon.succession import Given, resume, resume_kept, take_over
from uffdaemon.engine.shutdown import is_alive
from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.guard.present_pages import settle_present
from uffdaemon.guard.requirements import resolver_for, userfaultfd_for
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.model.region import (
    HOLD,
    POLICY_TIMEOUT,
    RETRY,
    AfterRemove,
    FailureAction,
    Missing,
    Region,
    Retry,
)
from uffdaemon.placement import Placement, PlacementName, Resolver, ResolverName
from uffdaemon.uapi.features import Features, RegisterMode
from uffdaemon.uapi.outcomes import Code, Operation, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdaemon.external.owner import ExternalServer
    from uffdaemon.guard.present_pages import Present
    from uffdaemon.journal.journal import Journal
    from uffdaemon.kernel.memory import Memory
    from uffdaemon.model.region import Policy
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.placement import Shutdown

_whole = trio.lowlevel.enable_ki_protection
"""Ctrl-C interrupts none of these halfway: it is raised where the caller goes on."""

_ENDED = "the process that resolved its faults has ended"


class Daemon(Contents):
    """Serves any number of userfaultfds in one trio program; returned by `open_daemon`."""

    def __init__(
        self, nursery: trio.Nursery, options: Options, *, log_interval: float | None
    ) -> None:
        super().__init__(Servers(nursery, options))
        self._nursery = nursery
        self._log_interval = log_interval
        self._memories: dict[Userfaultfd, Memory] = {}
        self.orphans: list[Userfaultfd] = []
        """After the end: userfaultfds of forked children that are alive and lack pages.  They stay
        open for a successor; closing them makes the missing pages of those children zeros."""

    def __repr__(self) -> str:
        servers = self._servers
        regions = {s.region for server in servers.own.values() for s in server.served.regions}
        counts = (
            (len(servers.own) + len(servers.external), "userfaultfds"),
            (len(regions) + len(servers.external), "regions"),
            (len(self.open_faults()), "open faults"),
        )
        state = "closed, " if servers.closing else ""
        return f"<Daemon: {state}{', '.join(f'{count} {what}' for count, what in counts)}>"

    @property
    def external(self) -> dict[Region, ExternalServer]:
        """The worker process of each region with an external policy; see its ``ready`` and
        ``refresh``."""
        return self._servers.external

    # -- regions -------------------------------------------------------------------------------

    @_whole
    def add_region(
        self,
        uffd: Userfaultfd,
        region: Region,
        *,
        register: RegisterMode | None = RegisterMode.MISSING,
        resolver: Resolver | ResolverName = Resolver.LOOP,
        default: Policy | None = None,
    ) -> Region:
        """Serve a region of the process that `uffd` belongs to, from now on.

        The range is registered in mode `register`; None: its owner has registered it.  The caller
        keeps the userfaultfd, and closes it after the daemon has ended or the region was removed.
        With ``resolver="thread"``, a thread of its own carries out rules, even while trio is busy;
        the first region of a userfaultfd decides for all.  `default` takes the place of that of
        `open_daemon` for this userfaultfd, and for children that are forked later.

        Raises `InvalidRange` if the region overlaps another one, `PlacementRefused` if the policy
        moves pages of another process, `DaemonClosed`, and what `Userfaultfd.register` raises.
        """
        if self._servers.closing:
            raise errors.DaemonClosed("the daemon is shutting down")
        check_type("uffd", uffd, Userfaultfd, "see uffdaemon.lowlevel.Userfaultfd.adopt")
        check_type("region", region, Region)
        check_moves(uffd, region.policy)
        check_default(default)
        servers = self._servers
        server = servers.own.get(uffd) or servers.serve_new(uffd, Resolver(resolver), region.label)
        server.served.default = default or server.served.default
        server.catch_up()  # an UNMAP event that frees this range may be pending
        served = server.served
        if server.area is not None:
            region.pages = server.area.home(region.pages)
        served.regions.add(region)
        try:
            if server.endpoint.native:
                # Before it is registered: after that, a thread may fault with the GIL held.
                server.rules.publish()
            server.save()
            if register is not None:
                uffd.register(region.start, region.length, register)
        except BaseException:
            served.regions.remove(region)
            server.rules.remove()
            server.save()
            raise
        if not server.endpoint.native:
            server.rules.schedule_update()  # one update for many regions
        for other in servers.own.values():
            if other is not server:
                other.rules.region_added()
        # Wake threads that wait there already: they fault again.
        waiting = served.ledger.inside(region.start, region.end)
        server.handler.end(waiting, Outcome.WOKEN)
        if waiting or register is None:
            served.execute([Operation(Code.WAKE, region.start, region.length)])
        return region

    @_whole
    def served(self) -> dict[Userfaultfd, RegionTable]:
        """The current regions of each userfaultfd, which a successor has to know."""
        return {uffd: server.served.regions for uffd, server in self._servers.own.items()}

    @_whole
    def take_over(self, uffd: Userfaultfd, regions: RegionTable, *, owns_fd: bool) -> None:
        """Serve the regions that a predecessor served.  With `owns_fd` the daemon closes `uffd`.

        Threads that wait there are woken and fault again.  Raises `PlacementRefused`, like
        `add_region`.
        """
        take_over(self._servers, uffd, regions, owns_fd=owns_fd)

    @_whole
    def resume(
        self,
        uffd: Userfaultfd,
        journal: Journal,
        policy: Policy | Mapping[str, Policy],
        *,
        on_failure: FailureAction | None = None,
        resolver: Resolver | ResolverName = Resolver.LOOP,
    ) -> list[Region]:
        """Serve what a predecessor served by this userfaultfd, as its `journal` has it.

        `policy` is that of all regions, or a policy for each region's name.  `on_failure` takes the
        place of the predecessor's, which is lost if it was a callable.  The journal is best the one
        that this daemon has, which then goes on in it.  Threads that wait are woken, and fault
        again.  Returns the regions, one for each piece that mremap(2) and munmap(2) have left.

        Raises `JournalError` if the journal has nothing of `uffd`, LookupError if there is no
        policy or `on_failure` for a region, and what `add_region` raises.
        """
        given = Given(policy, on_failure, Resolver(resolver))
        return resume(self._servers, uffd, journal, given)

    @_whole
    def resume_kept(
        self,
        policy: Policy | Mapping[str, Policy],
        *,
        on_failure: FailureAction | None = None,
        resolver: Resolver | ResolverName = Resolver.LOOP,
    ) -> list[Userfaultfd]:
        """Resume all that the daemon's keeper holds, forked children among them.

        The arguments are those of `resume`.  The daemon owns the userfaultfds that it returns.
        Raises `KeeperError`, and what `resume` raises.
        """
        return resume_kept(self._servers, Given(policy, on_failure, Resolver(resolver)))

    @_whole
    def guard(
        self,
        memory: Memory,
        policy: Policy | str,
        *,
        placement: Placement | PlacementName = Placement.NATIVE,
        resolver: Resolver | ResolverName = Resolver.THREAD,
        features: Features = Features.THREAD_ID,
        user_mode_only: bool | None = None,
        register: RegisterMode = RegisterMode.MISSING,
        on_failure: FailureAction = HOLD,
        retry: Retry = RETRY,
        policy_timeout: float = POLICY_TIMEOUT,
        after_remove: AfterRemove = "zero",
        present: Present = "refuse",
        name: str = "",
    ) -> GuardedRegion:
        """Guard memory of this process: open a userfaultfd, register, serve.

        `placement` says what resolves faults; see docs/choose-placement.md.  With "native" (the
        default), rules are carried out without the interpreter, by a thread or, with
        ``resolver="in-thread"``, by the faulting thread.  This loop resolves what no rule covers;
        only threads that do not hold the GIL may touch such pages.  With "in_process" this applies
        to all pages.  With "external", `policy` is a name that another process imports.

        The userfaultfd is closed with the memory, never before.  Children get the memory guarded if
        EVENT_FORK is permitted, and otherwise not at all: SIGSEGV, never zeros (but zeros with
        "in_process").  In this very thread, `Memory.read` and the like raise `PlacementRefused` if
        pages are missing that this loop would have to fill.

        `features` that this kernel lacks are left out.  With `user_mode_only`, system calls that
        touch a missing page fail with EFAULT; by default only if this user may not do otherwise.
        `on_failure` to `after_remove` and `name` are those of `Region`.

        Pages that are present cause no faults.  If the memory has any, "refuse" raises
        `PagesPresent`, "keep" leaves them as they are, and "discard" clears them first.  Memory
        whose daemon has ended keeps its pages.  Without RegisterMode.MISSING, nothing is checked.

        Raises `PlacementRefused` if the placement cannot do it, and what `Userfaultfd.open` and
        `add_region` raise.
        """
        check_memory(memory)
        placement = Placement(placement)
        resolver = resolver_for(placement, Resolver(resolver))
        region = GuardedRegion(
            memory.start,
            memory.length,
            placed_policy(policy, placement),
            memory.page_size,
            on_failure=on_failure,
            retry=retry,
            policy_timeout=policy_timeout,
            after_remove=after_remove,
            name=name,
            memory=memory,
            placement=placement,
        )
        again = memory.userfaultfd is not None
        uffd = userfaultfd_for(memory, features, user_mode_only, register, resolver)
        settle_present(region, register, present)
        if placement is Placement.EXTERNAL:
            worker = self._servers.start_external(uffd, region, register)
            memory.resumable = True
            region.why_unsafe = lambda: _ENDED if worker.ended.is_set() else worker.refusal
            return region
        known = uffd in self._servers.own
        self.add_region(uffd, region, register=register, resolver=resolver)
        self._memories[uffd] = memory
        memory.resumable = True
        if not known:
            self._servers.own[uffd].on_end.append(lambda: self._forget(uffd))
        if again:
            # Threads may have waited there since another daemon ended: they fault again.
            uffd.execute([Operation(Code.WAKE, region.start, region.length)])
        server = self._servers.own[uffd]
        warn_of_blocked(server, region)
        region.why_unsafe = lambda: why_unsafe(server, region, register)
        if region.why_unsafe():
            # This is the loop's thread, which would wait for itself.
            memory.refuse_in_thread(threading.get_ident(), region.pages)
        return region

    @_whole
    def remove_region(self, region: Region, missing: Missing | None = None) -> None:
        """Stop serving a region.

        A complete region is unregistered.  An incomplete one would then read as zeros, so `missing`
        says what happens to its missing pages: "hold" leaves faults waiting, "poison" makes them
        SIGBUS, and "release" lets the kernel fill in zeros.  Without it, raises `RegionIncomplete`.
        Raises `NotServed`, and `OperationError` if pages could not be poisoned (EAGAIN: an event is
        pending); the region is still served then.
        """
        if missing is not None and missing not in get_args(Missing):
            raise ValueError(f"missing is 'hold', 'poison' or 'release', not {missing!r}")
        if region in self.external:
            self.external[region].remove(missing)
            return
        server = self._servers.of(region)
        server.catch_up()  # a thread that was woken finds its page in the page book
        try:
            remove(server, region, missing)
        except errors.KernelRefusal:
            if is_alive(server.served):
                raise
            server.handler.client_exited()
        finally:
            server.save()
            if missing != "hold" and not server.served.regions.segments(region):
                self._forget(server.uffd)  # held pages would stop the loop's thread for good

    def _forget(self, uffd: Userfaultfd) -> None:
        """Memory of this process is no longer served: its own accesses may be made."""
        memory = self._memories.pop(uffd, None)
        if memory is not None:
            memory.allow_in_thread()

    # -- clients -------------------------------------------------------------------------------

    @_whole
    def watch_client(self, uffd: Userfaultfd, pid: int) -> None:
        """Stop serving `uffd` when process `pid` exits, which a userfaultfd does not report.

        Raises `OpenRefused` (ESRCH: it has exited already) and `NotServed`.  See pidfd_open(2).
        """
        server = self._servers.serving(uffd)
        pidfd = native.pidfd_open(pid)
        if pidfd < 0:
            raise errors.OpenRefused(-pidfd, "pidfd_open", reason=f"process {pid}")
        server.served.process = f"process {pid}"
        self._servers.watch(uffd, pidfd)
        self._servers.handover.client(server.area, pidfd)

    async def wait_client_gone(self, uffd: Userfaultfd) -> None:
        """Wait until `uffd` is no longer served: its client has exited, or the daemon ends."""
        server = self._servers.own.get(uffd)
        if server is not None:
            await server.ended.wait()

    # -- for open_daemon -----------------------------------------------------------------------

    async def start(self, *, native_sleep: bool) -> None:
        """Start serving; called once, by `open_daemon`."""
        await self._servers.open(native_sleep=native_sleep)
        if self._log_interval is not None:
            self._nursery.start_soon(self.log_regularly, self._log_interval)

    async def shut_down(self, how: Shutdown, patience: float) -> None:
        """Stop serving; called by `open_daemon` at the end of its block."""
        self.orphans = await self._servers.shut_down(how, patience)
        if self._log_interval is not None:
            self.log_statistics()
