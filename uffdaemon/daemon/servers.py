"""The servers of a daemon: one for each userfaultfd, and one for each external region."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakSet

import structlog
import trio

from uffdaemon import errors
from uffdaemon.arguments import check_choice, check_count, check_policy, check_type
from uffdaemon.daemon.handover import Handover
from uffdaemon.engine.shutdown import is_alive
from uffdaemon.external.plan import ExternalOptions
from uffdaemon.hooks import Hooks
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.log import Log, LogThread
from uffdaemon.loop import Server, Setup
from uffdaemon.model.statistics import Counters
from uffdaemon.placement import Watchdog
from uffdaemon.ports.endpoint import Backends
from uffdaemon.ports.resolver import SharedResolver
from uffdaemon.ports.trio_sleep import Sleeper, in_guest_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uffdaemon.engine.state import Forked, Served
    from uffdaemon.external.owner import ExternalServer
    from uffdaemon.journal.area import Area
    from uffdaemon.journal.journal import Journal
    from uffdaemon.keeper.keeper import Keeper
    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.model.region import Policy, Region
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.placement import Resolver, Shutdown
    from uffdaemon.uapi.events import ForkEvent
    from uffdaemon.uapi.features import RegisterMode

_ADOPT_DELAY: Final = 0.02
"""Seconds between attempts to serve a child, while there are no descriptors."""

ForkDecision: TypeAlias = Literal["adopt", "close"]
"""What to do with the userfaultfd of a forked child: "adopt" serves it with the parent's regions,
"close" closes it, after which missing pages of the child read as zeros."""


_served: Final[WeakSet[Userfaultfd]] = WeakSet()
"""By all daemons of this process."""


class Options(NamedTuple):
    """The options of `open_daemon` that concern servers."""

    hooks: Sequence[Hooks]
    on_fork: ForkDecision | Callable[[ForkEvent], ForkDecision]
    watchdog: Watchdog | None
    rereads: int
    fetch_limit: int
    journal: Journal | None = None
    keeper: Keeper | None = None
    default: Policy | None = None


def check_options(options: Options) -> None:
    """Raise TypeError or ValueError for an option that makes no sense."""
    if isinstance(options.hooks, Hooks):
        raise TypeError("hooks is a sequence of Hooks: write hooks=[...]")
    for each in options.hooks:
        check_type("each of hooks", each, Hooks)
    if not callable(options.on_fork):
        check_choice("on_fork", options.on_fork, get_args(ForkDecision))
    if options.watchdog is not None:
        check_type("watchdog", options.watchdog, Watchdog)
    check_count("rereads", options.rereads)
    check_count("fetch_limit", options.fetch_limit, least=1)
    check_default(options.default)


def check_default(default: Policy | None) -> None:
    """Raise TypeError for a default that can be no policy."""
    if default is not None:
        check_policy("default", default)


class Servers:
    """Starts servers and keeps them until the daemon ends."""

    def __init__(self, nursery: trio.Nursery, options: Options) -> None:
        self._nursery = nursery
        self._options = options
        self._sleeper: Sleeper | None = None
        self._shared_resolver = SharedResolver()
        self._past = Counters()
        self._log_thread = LogThread()
        self.log: Log = Log(structlog.stdlib.get_logger("uffdaemon"), self._log_thread)
        self.handover: Handover = Handover(options.journal, options.keeper, self.log)
        self.own: dict[Userfaultfd, Server] = {}
        """The userfaultfds that this process serves."""
        self.external: dict[Region, ExternalServer] = {}
        """The regions that worker processes serve."""
        self.closing: bool = False

    # -- lookup --------------------------------------------------------------------------------

    def of(self, region: Region) -> Server:
        """The server of a region.  Raises `NotServed`."""
        for server in self.own.values():
            if server.served.regions.segments(region):
                return server
        if region in self.external:
            raise errors.NotServed(
                f"region {region.label} is served by a worker process, and only the worker knows "
                "its pages and their source; use region.prefault() to fill it"
            )
        raise errors.NotServed(f"region {region.label} is not served here")

    def serving(self, uffd: Userfaultfd) -> Server:
        """The server of a userfaultfd.  Raises `NotServed`."""
        server = self.own.get(uffd)
        if server is None:
            raise errors.NotServed(f"{uffd!r} is not served here")
        return server

    def open_faults(self, now: int) -> list[OpenFault]:
        """The faults that are open at the time `now`, in no particular order."""
        found = [entry for s in self.own.values() for entry in s.served.ledger.open_faults(now)]
        return found + [entry for s in self.external.values() for entry in s.open_faults()]

    def count(self) -> Counters:
        """The counters of all servers, including those that have ended."""
        total = Counters()
        total.add(self._past)
        for server in list(self.own.values()):
            server.catch_up()  # events that C has applied are counted here
            server.add_counters(total)
        for external in self.external.values():
            external.add_counters(total)
        if self._log_thread.lost:
            total.failures["LogLineLost"] += self._log_thread.lost
        return total

    # -- start and end of a server -------------------------------------------------------------

    def start(
        self,
        uffd: Userfaultfd,
        resolver: Resolver,
        name: str,
        regions: RegionTable | None = None,
        *,
        owns_fd: bool = False,
        area: Area | None = None,
    ) -> Server:
        """Start serving a userfaultfd, with its area of the journal.

        Raises `AlreadyServed` and OSError.
        """
        if uffd in _served:
            raise errors.AlreadyServed(f"another daemon serves {uffd!r}")
        options = self._options
        self.handover.prepare(area)
        log = self.log.bind(userfaultfd=uffd.fileno())
        backends = Backends(self._sleeper, self._shared_resolver, options.watchdog, options.rereads)
        server = Server(
            uffd,
            options.hooks,
            log,
            regions,
            Setup(backends, resolver, name, options.fetch_limit, owns_fd, area),
            on_fork=self._forked,
            peers=self._served_of_this_process,
        )
        if options.default is not None:
            server.served.default = options.default
        _served.add(uffd)
        server.on_end.append(lambda: _served.discard(uffd))
        self.own[uffd] = server
        self._nursery.start_soon(self._run, server)
        return server

    def serve_new(self, uffd: Userfaultfd, resolver: Resolver, name: str) -> Server:
        """Start serving a userfaultfd that no predecessor has served, and keep it.

        Raises `AlreadyServed`, `JournalError`, `KeeperError` and OSError.
        """
        area = self.handover.begin(uffd)
        try:
            return self.start(uffd, resolver, name, area=area)
        except BaseException:
            self.handover.end(area)
            raise

    def start_external(
        self, uffd: Userfaultfd, region: Region, register: RegisterMode
    ) -> ExternalServer:
        """Start serving a region by a worker.  Raises what `ExternalServer.start` raises."""
        from uffdaemon.external.owner import ExternalServer  # noqa: PLC0415  # few need it

        given = self._options
        options = ExternalOptions(given.rereads, given.fetch_limit, given.on_fork)
        server = ExternalServer(
            uffd,
            region,
            hooks=given.hooks,
            log=self.log,
            options=options,
            watchdog=given.watchdog,
        )
        server.start(register)
        self.external[region] = server
        self._nursery.start_soon(self._run_external, server)
        return server

    def _served_of_this_process(self) -> list[Served]:
        return [s.served for s in self.own.values() if s.uffd.same_process]

    @trio.lowlevel.enable_ki_protection
    async def _run(self, server: Server) -> None:
        await server.run()
        if not self.closing and not server.served.ledger:
            self.forget(server)

    @trio.lowlevel.enable_ki_protection
    async def _run_external(self, server: ExternalServer) -> None:
        await server.run()
        if not self.closing and self.external.pop(server.region, None) is not None:
            server.add_counters(self._past)

    def forget(self, server: Server) -> None:
        """Remove a server that has ended, and keep its counters."""
        if self.own.pop(server.uffd, None) is not None:
            server.add_counters(self._past)
            self.handover.end(server.area)

    def _forked(self, parent: Server, fork: Forked) -> None:
        """Adopt or close the userfaultfd of a forked child, which this process owns."""
        decide, (event, regions, place) = self._options.on_fork, fork
        try:
            decision = decide if isinstance(decide, str) else decide(event)
        except Exception as error:  # noqa: BLE001  # serve the child all the same
            parent.served.hooks.raised(decide, error)
            decision = "adopt"
        if decision == "close":
            self.handover.refuse_child(parent.area, place)
        if decision == "close" or self.closing:
            os.close(event.fd)
            return
        self._reap()
        # Its features are the parent's; to look them up would take a descriptor.
        child = Userfaultfd(event.fd, parent.uffd.features, same_process=False)
        try:
            area = self.handover.begin_child(parent.area, event.fd, place, regions)
        except (OSError, errors.UffdaemonError) as error:
            self.log.warning("child not in the journal", userfaultfd=event.fd, error=str(error))
            area = None
        adopt = partial(
            self.start, child, parent.endpoint.resolver, "a child", regions, owns_fd=True, area=area
        )
        try:
            _inherit(parent, adopt())
        except OSError as error:
            self.log.warning("child waits to be served", userfaultfd=event.fd, error=str(error))
            self._nursery.start_soon(self._adopt_later, child, lambda: _inherit(parent, adopt()))

    async def _adopt_later(self, child: Userfaultfd, adopt: Callable[[], None]) -> None:
        """Serve a child once there are descriptors and memory for that; its threads wait."""
        while not self.closing:
            await trio.sleep(_ADOPT_DELAY)
            with suppress(OSError):
                adopt()
                return
        self.log.warning("child left with missing pages", userfaultfd=child.fileno())

    def _reap(self) -> None:
        """Close the userfaultfds of children that have exited: the kernel does not report it."""
        for server in list(self.own.values()):
            if server.owns_fd and not is_alive(server.served):
                server.handler.client_exited()

    # -- start and end of the daemon -----------------------------------------------------------

    async def open(self, *, native_sleep: bool) -> None:
        """Get ready to serve; called once."""
        if native_sleep and not in_guest_mode():
            self._sleeper = await Sleeper.join(self._wake)

    def _wake(self) -> None:
        for server in self.own.values():
            server.wake_if_read()

    async def shut_down(self, how: Shutdown, patience: float) -> list[Userfaultfd]:
        """End all servers within `patience` seconds.

        Returns the descriptors of forked children that live and lack pages, which stay open.
        """
        self.closing = True

        @trio.lowlevel.enable_ki_protection
        async def end(server: Server | ExternalServer) -> None:
            await server.shut_down(how, patience)

        try:
            async with trio.open_nursery() as nursery:
                for server in list(self.own.values()):
                    nursery.start_soon(end, server)
                for external in self.external.values():
                    nursery.start_soon(end, external)
        finally:
            if self._sleeper is not None:
                self._sleeper.leave(self._wake)
            self._shared_resolver.close()
        orphans = [server.uffd for server in self.own.values() if server.is_orphan()]
        for orphan in orphans:
            self.log.warning("child left with missing pages", userfaultfd=orphan.fileno())
        return orphans

    def watch(self, uffd: Userfaultfd, pidfd: int) -> None:
        """End the server of `uffd` when the process of `pidfd` exits.  Owns the descriptor."""
        self._nursery.start_soon(_end_with_process, self.serving(uffd), pidfd)


def _inherit(parent: Server, child: Server) -> None:
    """A forked child has been adopted: it gets what is not in its regions."""
    child.served.default = parent.served.default
    if parent.served.process:
        child.served.process = f"a child of {parent.served.process}"
    child.rules.schedule_update()


@trio.lowlevel.enable_ki_protection
async def _end_with_process(server: Server, pidfd: int) -> None:
    """End `server` when the process of `pidfd` exits; closes the descriptor."""
    try:
        async with trio.open_nursery() as nursery:

            @trio.lowlevel.enable_ki_protection
            async def end_at_exit() -> None:
                await trio.lowlevel.wait_readable(pidfd)
                server.handler.client_exited()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_at_exit)
            await server.ended.wait()
            nursery.cancel_scope.cancel()
    finally:
        os.close(pidfd)
