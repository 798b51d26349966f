"""The loop of one userfaultfd: C resolves faults by rules, the handler resolves the rest.

`Server.run` is the loop: dequeue what C has read, hand it to the handler, repeat, and sleep when
nothing is pending.  It is shielded from cancellation; `Server.stop` ends it.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from uffdaemon.engine.apply_events import events_of
from uffdaemon.engine.observers import AsyncHooks
from uffdaemon.engine.rule_records import tell_resolved
from uffdaemon.engine.shutdown import abandon, poison_open_faults, warn_of_closing, would_read_zeros
from uffdaemon.engine.state import Served
from uffdaemon.handlers import Handler
from uffdaemon.placement import Resolver, Shutdown
from uffdaemon.ports.endpoint import Backends, Endpoint
from uffdaemon.rules.publisher import Publisher
from uffdaemon.uapi.events import parse
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from uffdaemon.engine.apply_events import Applied
    from uffdaemon.engine.state import Forked
    from uffdaemon.hooks import Hooks
    from uffdaemon.journal.area import Area
    from uffdaemon.kernel.userfaultfd import CarryOut, Userfaultfd
    from uffdaemon.log import Log
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.model.statistics import Counters
    from uffdaemon.native import OperationArray
    from uffdaemon.native.ports import Record
    from uffdaemon.uapi.events import Event

_TURN: Final = 0.001
"""Seconds of uninterrupted work after which trio's other tasks get their turn."""
_COPY_PAUSE: Final = 0.001
"""Seconds between two checks whether the last exact copies have ended, or sent an event."""
_MANY: Final = 128
"""Records after which other tasks get their turn; without memory for more, there are as many."""
_PATIENCE: Final = 1.0
"""Seconds that async hooks have for the last faults, when the client is gone."""

_clock = time.perf_counter_ns


class Setup(NamedTuple):
    """How a userfaultfd is to be served."""

    backends: Backends
    resolver: Resolver
    name: str
    """For people: shown by the watchdog."""
    fetch_limit: int
    """How many fetches run at a time."""
    owns_fd: bool
    """Whether the server closes the descriptor."""
    area: Area | None
    """Its area of the journal."""


class Server:
    """Serves one userfaultfd; made and run by a `Daemon`."""

    def __init__(
        self,
        uffd: Userfaultfd,
        hooks: Sequence[Hooks],
        log: Log,
        regions: RegionTable | None,
        setup: Setup,
        *,
        on_fork: Callable[[Server, Forked], None],
        peers: Callable[[], Iterable[Served]],
    ) -> None:
        self.uffd = uffd
        self.served: Served = Served(uffd, hooks, log, self, regions)
        self.handler: Handler = Handler(self.served, setup.fetch_limit)
        self.owns_fd: bool = setup.owns_fd
        self.area: Area | None = setup.area
        self.ended: trio.Event = trio.Event()
        self.on_end: list[Callable[[], None]] = []
        """Called when the userfaultfd is no longer served."""
        self.endpoint: Endpoint = Endpoint(uffd, setup.resolver, setup.backends, setup.name)
        self._port = self.endpoint.port
        self._port.record_all = self.served.hooks.see_endings
        self.rules: Publisher = Publisher(
            self.served, self.endpoint, wake=self.wake, catch_up=self.catch_up
        )
        self._on_fork = on_fork
        self._token = trio.lowlevel.current_trio_token()
        self._begun = trio.Event()
        self._left = False
        self._released = False
        """Set in trio's thread before the descriptor is closed, which may be in another thread."""
        self._stopping = False
        self._poisoning = False
        self._patience = _PATIENCE
        self._awake = True
        self._told_shortage = False
        self._drains = 0  # nested calls: a hook may call it
        self._dequeued: tuple[list[Event | Applied], int] | None = None
        """Events that were dequeued and not yet handled, and when they were read."""
        self._scope: trio.CancelScope | None = None
        self._quiet: trio.Event | None = None
        self._peers = peers
        self._carry_out: CarryOut | None = self._execute
        self.uffd.on_close.append(self.release)
        try:
            self.endpoint.start(None if self.area is None else self.area.messages)
        except BaseException:
            self.rules.close()
            self.uffd.on_close.remove(self.release)
            raise

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`, until the client is gone, or until the descriptor is closed."""
        try:
            with trio.CancelScope(shield=True):
                async with AsyncHooks.open(self.served.hooks) as hooks:
                    async with trio.open_nursery() as reading:
                        async with self.handler.tasks.open():
                            self._begun.set()
                            await self._loop()
                            self._last_turn()
                            reading.start_soon(self._go_on_reading)
                        while self.uffd.copies.under_way and not self._released:  # noqa: ASYNC110  # set by threads
                            await trio.sleep(_COPY_PAUSE)
                        reading.cancel_scope.cancel()
                    self._stop_serving()
                    await hooks.finish(self._patience)
        finally:
            self.release()
            self.ended.set()

    async def _loop(self) -> None:
        begun = trio.current_time()
        while not self._over():
            if self.turn() or self._awake:
                if trio.current_time() - begun > _TURN:
                    await trio.lowlevel.checkpoint()
                    begun = trio.current_time()
            else:
                await self._sleep()
                begun = trio.current_time()

    @trio.lowlevel.enable_ki_protection
    async def _go_on_reading(self) -> None:
        """Read events without resolving faults: threads that copy wait until theirs are read, and
        cannot be cancelled."""
        while not self._released:
            self.handler.enter_only(self.uffd.read_events(), _clock())
            await trio.sleep(_COPY_PAUSE)

    def _over(self) -> bool:
        return self._stopping or self.served.client_gone

    def _last_turn(self) -> None:
        if self._released:
            return
        self.catch_up()
        if self._poisoning and not self.served.client_gone:
            for fault, outcome in poison_open_faults(self.served):
                self.handler.end([fault], outcome)

    def turn(self) -> bool:
        """Read and resolve once.  Returns whether anything was pending."""
        self._awake = False
        worked = False
        if not self.endpoint.native:
            if self.rules.outdated:
                self.rules.update()
            more = self._port.serve()
            worked = self.drain(_MANY) or more
        else:
            worked = self.drain(_MANY)
            if self.rules.outdated:
                self.rules.update()
        if self.served.ledger.next_retry() is not None:
            self.handler.retry_deferred()
        self._port.record_all = self.served.hooks.see_endings or self.served.ledger.held > 0
        if self._port.error:
            self._read_failed(self._port.error)
        return worked

    def drain(self, at_most: int = sys.maxsize) -> bool:
        """Dequeue what C has read, and handle what it has not resolved.  Returns whether there was
        anything."""
        self._handle_dequeued()  # if a hook calls this, what was dequeued before it comes first
        records = [] if self._released else self._port.dequeue(at_most=at_most)
        if not records:
            return False
        if len(records) >= _MANY and self._port.shortages and not self._told_shortage:
            self._told_shortage = True
            self.served.log.warning("no memory for more records: reading waits")
        self._drains += 1
        try:
            self._handle_records(records)
        finally:
            self._drains -= 1
            if not self._drains:
                self._port.end_batch()
        if self._quiet is not None and self._is_quiet():
            self._quiet.set()
        return True

    def _handle_records(self, records: list[Record]) -> None:
        """Tell what rules have resolved, then handle what they have not."""
        now = _clock()
        forwarded = [record for record in records if not record.code]
        if forwarded:
            read_at = min(record.latency for record in forwarded)
            self._dequeued = events_of(forwarded), read_at
        for record in records:
            if record.code and (record.error or self.served.hooks.see_endings):
                tell_resolved(self.served, record, now)
        if self.served.ledger.held:
            # Threads whose faults were held have faulted again, and rules have resolved them.
            by_rule = b"".join(record.message for record in records if record.code)
            self.handler.rules_resolved(parse(by_rule))
        self._handle_dequeued()

    def _handle_dequeued(self) -> None:
        """Handle what was dequeued last, unless that has been done."""
        dequeued, self._dequeued = self._dequeued, None
        if dequeued is not None:
            self._handle_forwarded(*dequeued)

    def _handle_forwarded(self, events: list[Event | Applied], read_at: int) -> None:
        """Have the handler resolve what C did not."""
        self.handler.handle(events, read_at)
        if self.served.stale:
            self.rules.update()
        forks, self.served.forks = self.served.forks, []
        for fork in forks:
            self._on_fork(self, fork)
        if forks or (self.area is not None and self.area.is_due(self._port.place)):
            self.save()  # after the areas of the children: they may be removed at any time

    def save(self) -> None:
        """Have the journal include everything that has been applied until now."""
        if self.area is None:
            return
        try:
            self.area.save(self.served.regions, self._port.place)
        except OSError as error:  # the last checkpoint is in force, and the events since are kept
            self.served.log.warning("journal not written", error=str(error))
        else:
            self._port.saved(self._port.place)

    def _read_failed(self, number: int) -> None:
        self.served.log.error("reading the userfaultfd failed", errno=number)
        self._stopping = True

    async def _sleep(self) -> None:
        """Wait for a message, the next retry, or `wake`."""
        due = self.served.ledger.next_retry()
        wait = math.inf if due is None else max(due - _clock(), 0) / 1e9
        with trio.CancelScope(deadline=trio.current_time() + wait) as self._scope:
            if self.endpoint.served_in_sleep:
                await trio.sleep_forever()
            else:
                with suppress(trio.ClosedResourceError):
                    await self.endpoint.wait()
        self._scope = None

    # -- what the engine asks of its loop ------------------------------------------------------

    @property
    def carry_out(self) -> CarryOut | None:
        """How operations are carried out while C serves: it may have read events first."""
        return self._carry_out

    def _execute(self, operations: OperationArray, count: int) -> None:
        self._port.execute(operations, count)
        self.wake_if_read()  # it reads on while an event is in flight

    def events_applied(self) -> None:
        """All events that were dequeued until now have been applied."""
        self._port.events_applied()

    def peers(self) -> Iterable[Served]:
        """All userfaultfds of this process that the daemon serves."""
        return self._peers()

    def wake(self) -> None:
        """Run another turn: something has changed."""
        self._awake = True
        if self._scope is not None:
            self._scope.cancel()
        if self._quiet is not None and self._is_quiet():
            self._quiet.set()

    def wake_if_read(self) -> None:
        """Run another turn if C has queued something, or can no longer go on by itself."""
        if self._port.wants_attention or self.endpoint.sleep_failed:
            self.wake()

    def catch_up(self) -> None:
        """Handle everything that has been read by now."""
        self._port.settle()
        self.drain()

    # -- the end -------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        """Whether all open faults are held."""
        return len(self.served.ledger) == self.served.ledger.held

    async def shut_down(self, how: Shutdown, patience: float) -> None:
        """Stop serving within `patience` seconds; `how` says what happens to open faults."""
        await self._begun.wait()
        if not self.ended.is_set():
            # Record every fault that is pending now, and resolve what can be resolved at once.
            if not self._over():
                self.turn()
            if how is Shutdown.RESOLVE:
                self._quiet = trio.Event()
                self.wake()
                with trio.move_on_after(patience):
                    await self._quiet.wait()
            self._patience = patience
            self._poisoning = how is Shutdown.POISON
            self.stop()
            await self.ended.wait()
        for entry in self.served.ledger.open_faults(_clock()):
            self.served.log.warning("thread left waiting", fault=str(entry))

    def add_counters(self, total: Counters) -> None:
        """Add what this server has counted, in Python and in C."""
        if not self._released:
            self._port.settle()  # a thread that was woken finds its fault counted
        total.add(self.served.counters)
        total.add_port(self._port)

    def woken(self, start: int, end: int) -> None:
        """The kernel has woken every thread that waited in a range that was deregistered."""
        self._port.release(start, end - start)
        self.handler.end(self.served.ledger.inside(start, end), Outcome.WOKEN)

    def stop(self) -> None:
        """Have the loop end at once."""
        self._stopping = True
        self.wake()

    @trio.lowlevel.enable_ki_protection
    def release(self) -> None:
        """Stop using the descriptor, and close it if it is ours.  May be called from any thread."""
        if self._released:
            return
        if not trio.lowlevel.in_trio_run():
            # Memory may be closed in any thread.
            trio.from_thread.run_sync(self.release, trio_token=self._token)
            return
        self._stop_serving()
        self._released = True
        self.endpoint.close()
        self._stopping = True
        self.wake()
        for call in self.on_end:
            call()
        if self.release in self.uffd.on_close:
            self.uffd.on_close.remove(self.release)
            abandon(self.served, self.endpoint, poisoning=self._poisoning)
        elif not self.uffd.same_process and not self.served.client_gone:
            warn_of_closing(self.served)
        if self.owns_fd and not self.is_orphan():
            self.uffd.close()

    def _stop_serving(self) -> None:
        """Stop serving; faults that were read and not resolved are listed as open."""
        if self._left:
            return
        self._left = True
        self.endpoint.stop()
        self.rules.close()
        if not self._released:
            now, records = _clock(), self._port.dequeue()
            for record in records:
                if record.code and (record.error or self.served.hooks.see_endings):
                    tell_resolved(self.served, record, now)
            self.handler.enter_only(events_of([r for r in records if not r.code]), now)
        self._carry_out = None

    def is_orphan(self) -> bool:
        """Whether the descriptor is ours, but closing it would show zeros to a living process."""
        return self.owns_fd and would_read_zeros(self.served)
