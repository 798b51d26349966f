"""The daemon: any number of userfaultfds and their regions, in one trio program."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import structlog
import trio

from uffdaemon import errors, native
from uffdaemon.actions import Copy, Source
from uffdaemon.features import Features, RegisterMode
from uffdaemon.filling import Fill, copy_of
from uffdaemon.guarded import GuardedRegion
from uffdaemon.guarding import prepare, why_unsafe
from uffdaemon.handlers import Handler
from uffdaemon.loop import Server, Shutdown
from uffdaemon.mover import PIECE, climb_in_trio, finish, ladder_for
from uffdaemon.moving import book_moves
from uffdaemon.outcomes import Code, Operation, Outcome
from uffdaemon.placement import Placement, PlacementName, Resolver, ResolverName, Watchdog
from uffdaemon.policy import moves, policy_name
from uffdaemon.post import Staff
from uffdaemon.region import (
    HOLD,
    PAGE_SIZE,
    POLICY_TIMEOUT,
    RETRY,
    AfterRemove,
    FailureAction,
    Region,
    Retry,
)
from uffdaemon.removing import Missing, remove
from uffdaemon.resolving import Resolving
from uffdaemon.sleeping import Sleeper
from uffdaemon.statistics import Counters, Statistics
from uffdaemon.uffd import Userfaultfd

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from uffdaemon.actions import Fallback
    from uffdaemon.causes import Moved
    from uffdaemon.events import ForkEvent
    from uffdaemon.hooks import Hooks
    from uffdaemon.ledger import OpenFault
    from uffdaemon.memory import Memory
    from uffdaemon.policy import Policy
    from uffdaemon.regions import RegionTable

ForkDecision: TypeAlias = Literal["adopt", "close"]
"""What is done with a child's userfaultfd: serve it with the parent's regions, or close it, after
which pages missing in the child read as zeros."""


class Daemon:
    """Serves any number of userfaultfds in one trio program; made by `open_daemon`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        hooks: Sequence[Hooks],
        *,
        on_fork: ForkDecision | Callable[[ForkEvent], ForkDecision],
        watchdog: Watchdog | None,
        rereads: int,
        fetch_limit: int,
        log_interval: float | None,
    ) -> None:
        self._nursery = nursery
        self._hooks = tuple(hooks)
        self._on_fork = on_fork
        self._watchdog = watchdog
        self._rereads = rereads
        self._fetch_limit = fetch_limit
        self._log_interval = log_interval
        self._servers: dict[Userfaultfd, Server] = {}
        self._past = Counters()
        self._memories: dict[Region, Memory] = {}
        self._sleeper: Sleeper | None = None
        self._resolving = Resolving()
        self._closing = False
        self.orphans: list[Userfaultfd] = []
        """After the end: descriptors of forked children that live and lack pages.  They are left
        open, for whoever goes on serving them; closing them shows zeros to those children."""
        self._log = structlog.stdlib.get_logger("uffdaemon")

    # -- regions -------------------------------------------------------------------------------

    def add_region(
        self,
        uffd: Userfaultfd,
        region: Region,
        *,
        register: RegisterMode | None = RegisterMode.MISSING,
        resolver: Resolver | ResolverName = Resolver.LOOP,
    ) -> Region:
        """Serve a region of the process that `uffd` belongs to, from now on.

        The range is registered in the mode given; None: its owner has done that.  The userfaultfd
        stays the caller's, to be closed after the daemon has ended or the region was removed.  With
        ``resolver="thread"``, rules are carried out by a thread of their own, also while trio is
        busy; the first region of a userfaultfd decides for all.

        Raises `InvalidRange` when it overlaps another region, `PlacementRefused` when the policy
        moves pages of another process, `DaemonClosed`, and what `Userfaultfd.register` raises.
        """
        if self._closing:
            raise errors.DaemonClosed("the daemon is shutting down")
        if moves(region.policy) and not uffd.same_process:
            raise errors.PlacementRefused(
                f"policy {policy_name(region.policy)} moves pages, and this userfaultfd is another "
                "process's: the kernel moves pages only from inside of the process whose memory "
                "it is.  Serve it in that process, or copy."
            )
        server = self._servers.get(uffd) or self._start(uffd, Resolver(resolver), region.label)
        server.catch_up()  # where the region lies, another one may have been unmapped
        handler = server.handler
        handler.regions.add(region)
        try:
            if register is not None:
                uffd.register(region.start, region.length, register)
        except BaseException:
            handler.regions.remove(region)
            raise
        if not server.post.native:
            server.rules_outdated()  # many at a time
        else:
            server.publish_rules()
        for other in self._servers.values():
            if other is not server:
                other.region_added()
        # Whoever waits there already, for nobody, may ask again.
        waiting = handler.ledger.inside(region.start, region.end)
        for fault in waiting:
            handler.resolve(fault, Outcome.WOKEN)
        if waiting or register is None:
            handler.execute([Operation(Code.WAKE, region.start, region.length)])
        return region

    def guard(
        self,
        memory: Memory,
        policy: Policy,
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
        name: str = "",
    ) -> GuardedRegion:
        """Guard memory of this process: open a userfaultfd, register, serve.

        `placement` says who answers.  With "native" (the default), rules are carried out without
        the interpreter, by a thread or, with ``resolver="in-thread"``, by the thread that faults;
        what no rule covers is this loop's, and must then be touched by threads that do not hold the
        GIL only.  With "in_process", that holds for all faults.  docs/placement.md helps to choose.

        The userfaultfd is closed with the memory, never before.  Children get the memory guarded
        where EVENT_FORK may be used, and otherwise (but with "in_process") not at all: SIGSEGV,
        never zeros.  In this very thread, `Memory.read` and its like raise `PlacementRefused` where
        pages are missing that this loop would have to answer.

        `features` that this kernel lacks are left out.  With `user_mode_only`, system calls that
        touch a missing page fail with EFAULT; None is as this user may.  The last five are those
        of `Region`.  Raises `PlacementRefused` for what the placement cannot do, and what
        `Userfaultfd.open` and `add_region` raise.
        """
        if memory.start == 0:
            raise errors.InvalidRange("this memory has been unmapped")
        placement, resolver = Placement(placement), Resolver(resolver)
        if placement is Placement.IN_PROCESS:
            resolver = Resolver.LOOP
        region = GuardedRegion(
            memory.start,
            memory.length,
            policy,
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
        uffd = prepare(memory, features, user_mode_only, register, resolver)
        self.add_region(uffd, region, register=register, resolver=resolver)
        if again:
            # Whoever waits there since another daemon has ended asks again.
            uffd.execute([Operation(Code.WAKE, region.start, region.length)])
        server = self._servers[uffd]
        region.why_unsafe = lambda: why_unsafe(server, region, register)
        if region.why_unsafe():
            # This runs in the loop's thread, which must not wait for itself.
            memory.refuse_in_thread(threading.get_ident(), region.pages)
            server.on_end.append(memory.allow_in_thread)
        self._memories[region] = memory
        return region

    def remove_region(self, region: Region, missing: Missing | None = None) -> None:
        """Stop serving a region.

        A region whose pages are all there is unregistered.  One that is incomplete would then show
        zeros, so `missing` has to say what shall happen; without it, raises `RegionIncomplete`.
        Raises `NotServed`, and `OperationError` when pages could not be poisoned (EAGAIN: an event
        is in flight); the region is still served then.
        """
        if missing is not None and missing not in get_args(Missing):
            raise ValueError(f"missing is 'hold', 'poison' or 'release', not {missing!r}")
        server = self._server_of(region)
        server.take()
        try:
            remove(server, region, missing)
        except errors.KernelRefusal:
            if server.is_alive():
                raise
            server.handler.lose_client()
        finally:
            if not server.handler.regions.segments(region) and region in self._memories:
                self._memories.pop(region).allow_in_thread()

    async def fill(
        self,
        region: Region,
        *,
        source: Source | None = None,
        piece: int = 256 * 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Fill what is missing of a region, `piece` bytes at a time; demand faults go first.

        `source` has the region's bytes from offset 0 on; by default it is that of the region's
        `CopyFrom`.  `progress` is called with (bytes that need nothing any more, bytes in all).
        Returns the bytes that were brought.  Raises `SourceError`, `OperationError`,
        `DaemonClosed` when the client goes away; what was filled stays.
        """
        server = self._server_of(region)
        copy = copy_of(region.policy) if source is None else Copy(source)
        return await Fill(server, region, copy, piece, progress).run()

    async def move(
        self,
        uffd: Userfaultfd,
        dst: int,
        src: int,
        length: int,
        *,
        fallback: Fallback | None = None,
        allow_source_holes: bool = False,
        foreign: bool = False,
        source_uffd: Userfaultfd | None = None,
        verify: bool = False,
        piece: int = PIECE,
    ) -> Moved:
        """`uffdaemon.move` on a userfaultfd that is served here, with this daemon's books kept.

        Raises what `uffdaemon.move` raises, and `NotServed`.
        """
        server = self._servers.get(uffd)
        if server is None:
            raise errors.NotServed(f"{uffd!r} is not served here")
        region = server.handler.regions.find(dst)
        ladder = ladder_for(
            uffd,
            dst,
            src,
            length,
            fallback=fallback,
            allow_source_holes=allow_source_holes,
            foreign=foreign,
            page_size=PAGE_SIZE if region is None else region.page_size,
            piece=piece,
        )
        try:
            await climb_in_trio(uffd, source_uffd, ladder)
        finally:
            book_moves(server.handler, ladder.moved)
        return finish(ladder.moved, verify=verify)

    def book(self, uffd: Userfaultfd, moved: Moved) -> None:
        """Keep the books of moves that were made without this daemon, by `Staging.fill` or `move`
        say: what has arrived is there, and faults held there have ended.

        Raises `NotServed`.
        """
        server = self._servers.get(uffd)
        if server is None:
            raise errors.NotServed(f"{uffd!r} is not served here")
        book_moves(server.handler, moved)

    # -- clients -------------------------------------------------------------------------------

    def watch_client(self, uffd: Userfaultfd, pid: int) -> None:
        """End serving `uffd` when process `pid` ends, which the userfaultfd itself never tells.

        Raises `OpenRefused` (ESRCH: it is gone already) and `NotServed`.
        """
        if uffd not in self._servers:
            raise errors.NotServed(f"{uffd!r} is not served here")
        pidfd = native.pidfd_open(pid)
        if pidfd < 0:
            raise errors.OpenRefused(-pidfd, "pidfd_open", reason=f"process {pid}")
        self._nursery.start_soon(self._watch, self._servers[uffd], pidfd)

    async def _watch(self, server: Server, pidfd: int) -> None:
        try:
            async with trio.open_nursery() as nursery:

                async def died() -> None:
                    await trio.lowlevel.wait_readable(pidfd)
                    server.handler.lose_client()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(died)
                await server.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            os.close(pidfd)

    async def wait_client_gone(self, uffd: Userfaultfd) -> None:
        """Until `uffd` is served no more: its client died, or the daemon ends."""
        server = self._servers.get(uffd)
        if server is not None:
            await server.ended.wait()

    # -- looking -------------------------------------------------------------------------------

    def open_faults(self) -> list[OpenFault]:
        """Who waits now, since when and for what; the oldest first."""
        now = time.perf_counter_ns()
        found = [
            entry
            for server in self._servers.values()
            for entry in server.handler.ledger.open_faults(now)
        ]
        return sorted(found, key=lambda entry: -entry.age)

    def statistics(self) -> Statistics:
        """A snapshot of what has been served, by all userfaultfds together."""
        total = Counters()
        total.add(self._past)
        for server in self._servers.values():
            server.add_counters(total)
        return Statistics(
            dict(total.outcomes),
            dict(total.failures),
            dict(total.events),
            dict(total.bytes_done),
            self.open_faults(),
            total.joined,
            list(total.latencies),
        )

    def dump(self) -> str:
        """Who is stuck, since when and why, as text: a line for each open fault."""
        stuck = self.open_faults()
        head = f"uffdaemon: {len(stuck)} open faults on {len(self._servers)} userfaultfds"
        return "\n".join([head, *(f"  {entry}" for entry in stuck)])

    async def dump_on_signal(self, *signals: signal.Signals) -> None:
        """Print `dump` to standard error whenever one of the signals arrives; runs until it is
        cancelled."""
        with trio.open_signal_receiver(*signals) as received:
            async for _ in received:
                print(self.dump(), file=sys.stderr, flush=True)  # noqa: T201  # asked for

    # -- inside --------------------------------------------------------------------------------

    def _server_of(self, region: Region) -> Server:
        for server in self._servers.values():
            if server.handler.regions.segments(region):
                return server
        raise errors.NotServed(f"region {region.label} is not served here")

    def _start(
        self,
        uffd: Userfaultfd,
        resolver: Resolver,
        name: str,
        regions: RegionTable | None = None,
        *,
        owns_fd: bool = False,
    ) -> Server:
        log = self._log.bind(userfaultfd=uffd.fileno())
        handler = Handler(uffd, self._hooks, log, regions)
        handler.of_this_process = self._handlers_of_this_process
        server = Server(
            handler,
            staff=Staff(self._sleeper, self._resolving, self._watchdog, self._rereads),
            resolver=resolver,
            name=name,
            fetch_limit=self._fetch_limit,
            owns_fd=owns_fd,
            on_fork=self._forked,
        )
        self._servers[uffd] = server
        self._nursery.start_soon(self._run, server)
        return server

    def _handlers_of_this_process(self) -> list[Handler]:
        return [s.handler for s in self._servers.values() if s.uffd.same_process]

    async def _run(self, server: Server) -> None:
        await server.run()
        if not self._closing and not server.handler.ledger:
            self._forget(server)

    def _forget(self, server: Server) -> None:
        if self._servers.pop(server.uffd, None) is not None:
            server.add_counters(self._past)

    def _forked(self, parent: Server, event: ForkEvent, regions: RegionTable) -> None:
        """A child has come into being; its descriptor is ours."""
        try:
            decision = self._on_fork if isinstance(self._on_fork, str) else self._on_fork(event)
        except Exception as error:  # noqa: BLE001  # a child must not be lost over it
            parent.handler.hooks.raised(self._on_fork, error)
            decision = "adopt"
        if decision == "close" or self._closing:
            os.close(event.fd)
            return
        self._reap()
        child = Userfaultfd.adopt(event.fd)
        server = self._start(child, parent.post.resolver, "a child", regions, owns_fd=True)
        server.rules_outdated()

    def _reap(self) -> None:
        """Let go of children that have ended, of which nothing tells."""
        for server in list(self._servers.values()):
            if server.owns_fd and not server.is_alive():
                server.handler.lose_client()

    def _wake(self) -> None:
        for server in self._servers.values():
            server.wake_if_read()

    async def start(self, *, native_sleep: bool) -> None:
        """Called by `open_daemon`, once."""
        if native_sleep:
            self._sleeper = await Sleeper.join(self._wake)
        if self._log_interval is not None:
            self._nursery.start_soon(self._log_now_and_then, self._log_interval)

    async def shut_down(self, how: Shutdown, patience: float) -> None:
        """Called by `open_daemon` when its block ends."""
        self._closing = True
        try:
            async with trio.open_nursery() as nursery:
                for server in list(self._servers.values()):
                    nursery.start_soon(server.shut_down, how, patience)
        finally:
            if self._sleeper is not None:
                self._sleeper.leave(self._wake)
            self._resolving.close()
        self.orphans = [s.uffd for s in self._servers.values() if s.is_orphan()]
        for orphan in self.orphans:
            self._log.warning("child left with missing pages", userfaultfd=orphan.fileno())
        if self._log_interval is not None:
            self._log_aggregates()

    def _log_aggregates(self) -> None:
        figures = self.statistics().as_dict()
        self._log.info("served", **{name: figure for name, figure in figures.items() if figure})

    async def _log_now_and_then(self, interval: float) -> None:
        while True:
            await trio.sleep(interval)
            self._log_aggregates()
