"""One userfaultfd being served: a port for what C answers by rules, a handler for all the rest.

`Server.run` is the loop: take what was read, let the handler answer it, look again, and sleep when
nothing came.  It is shielded from cancellation, and ends when it is told to.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon.engine.apply_events import events_of
from uffdaemon.engine.failures import refused_in_c
from uffdaemon.engine.observers import AsyncHooks
from uffdaemon.engine.shutdown import abandon, poison_open_faults, warn_of_closing, would_read_zeros
from uffdaemon.engine.state import Served
from uffdaemon.handlers import Handler
from uffdaemon.hooks import Resolved
from uffdaemon.model.region import Fault
from uffdaemon.native.ports import MESSAGE_BATCH
from uffdaemon.placement import Shutdown
from uffdaemon.ports.endpoint import Post
from uffdaemon.rules.publisher import Publisher
from uffdaemon.uapi.events import PageFault, parse
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from structlog.stdlib import BoundLogger

    from uffdaemon.engine.apply_events import Applied
    from uffdaemon.hooks import Hooks
    from uffdaemon.kernel.userfaultfd import CarryOut, Userfaultfd
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.model.statistics import Counters
    from uffdaemon.native.ports import Record
    from uffdaemon.placement import Resolver
    from uffdaemon.ports.endpoint import Staff
    from uffdaemon.uapi.events import Event, ForkEvent

_TURN: Final = 0.001
"""Seconds of uninterrupted work after which trio's other tasks get their turn."""

_COPY_PAUSE: Final = 0.001
"""Seconds between two looks whether the copies that are left have ended, or sent an event."""
_PATIENCE: Final = 1.0
"""Seconds that async hooks have to hear of the last faults, when the client is gone."""

_clock = time.perf_counter_ns


class Server:
    """Serves one userfaultfd; made and run by a `Daemon`."""

    def __init__(
        self,
        uffd: Userfaultfd,
        hooks: Sequence[Hooks],
        log: BoundLogger,
        regions: RegionTable | None,
        *,
        staff: Staff,
        resolver: Resolver,
        name: str,
        fetch_limit: int,
        owns_fd: bool,
        on_fork: Callable[[Server, ForkEvent, RegionTable], None],
        peers: Callable[[], Iterable[Served]],
    ) -> None:
        self.uffd = uffd
        self.served = Served(uffd, hooks, log, self, regions)
        self.handler = Handler(self.served, fetch_limit)
        self.owns_fd = owns_fd
        self.ended = trio.Event()
        self.on_end: list[Callable[[], None]] = []
        """Called once nothing is served any more."""
        self._fd = uffd.fileno()
        self.post = Post(uffd, resolver, staff, name)
        self._port = self.post.port
        self._port.record_all = self.served.hooks.see_endings
        self.rules = Publisher(self.served, self.post, wake=self.wake, catch_up=self.catch_up)
        self._on_fork = on_fork
        self._token = trio.lowlevel.current_trio_token()
        self._begun = trio.Event()
        self._left = False
        self._stopping = False
        self._poisoning = False
        self._patience = _PATIENCE
        self._awake = True
        self._takes = 0
        """How many calls of `take` are under way: hooks may make some."""
        self._taken: tuple[list[Event | Applied], int] | None = None
        """What is for Python, and when it was read, until it is answered."""
        self._scope: trio.CancelScope | None = None
        self._quiet: trio.Event | None = None
        self._peers = peers
        self._carry_out = self._port.execute if self.post.native else None
        self.uffd.on_close.append(self.let_go)
        try:
            self.post.take_up()
        except BaseException:
            self.rules.close()
            self.uffd.on_close.remove(self.let_go)
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
                        while self.uffd.copies.under_way and not self.uffd.closed:  # noqa: ASYNC110  # set by threads
                            await trio.sleep(_COPY_PAUSE)
                        reading.cancel_scope.cancel()
                    self._leave_post()
                    await hooks.finish(self._patience)
        finally:
            self.let_go()
            self.ended.set()

    async def _loop(self) -> None:
        begun = trio.current_time()
        while not self._over():
            if self.turn():
                if trio.current_time() - begun > _TURN:
                    await trio.lowlevel.checkpoint()
                    begun = trio.current_time()
            else:
                await self._sleep()
                begun = trio.current_time()

    async def _go_on_reading(self) -> None:
        """Answer nothing any more; but threads that copy may wait for their events to be read, and
        cannot be cancelled."""
        while not self.uffd.closed:
            self.handler.enter_only(self.uffd.read_events(), _clock())
            await trio.sleep(_COPY_PAUSE)

    def _over(self) -> bool:
        return self._stopping or self.served.client_gone

    def _last_turn(self) -> None:
        if self.uffd.closed:
            return
        self.catch_up()
        if self._poisoning and not self.served.client_gone:
            for fault, outcome in poison_open_faults(self.served):
                self.handler.end([fault], outcome)

    def turn(self) -> bool:
        """Read and answer once; whether anything came."""
        self._awake = False
        worked = False
        if not self.post.native:
            if self.rules.outdated:
                self.rules.update()
            self._port.serve()
            worked = self.take()
        else:
            worked = self.take()
            if self.rules.outdated:
                self.rules.update()
        if self.served.ledger.next_due() is not None:
            self.handler.retry_due()
        self._port.record_all = self.served.hooks.see_endings or self.served.ledger.held > 0
        if self._port.error:
            self._read_failed(self._port.error)
        return worked

    def take(self) -> bool:
        """Account for what C has read and answered, and answer what it left; whether that was
        anything."""
        self._answer_taken()  # a hook has come here, and what was taken before comes first
        records = [] if self.uffd.closed else self._port.take()
        if not records:
            return False
        self._takes += 1
        try:
            self._account_for(records)
        finally:
            self._takes -= 1
            if not self._takes:
                self._port.turn_over()
        if self._quiet is not None and self._is_quiet():
            self._quiet.set()
        return True

    def _account_for(self, records: list[Record]) -> None:
        now = _clock()
        forwarded = [record for record in records if not record.code]
        if forwarded:
            read_at = min(record.latency for record in forwarded)
            self._taken = events_of(forwarded), read_at
        for record in records:
            if record.code and (record.error or self.served.hooks.see_endings):
                self._tell(record, now)
        if self.served.ledger.held:
            # Threads whose faults were held have faulted again, and rules have resolved them.
            by_rule = b"".join(record.message for record in records if record.code)
            self.handler.rules_resolved(parse(by_rule))
        self._answer_taken()

    def _answer_taken(self) -> None:
        """Have Python answer what was taken last, unless that has been done."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._answer(*taken)

    def _answer(self, events: list[Event | Applied], read_at: int) -> None:
        """Have Python answer what C left."""
        if len(events) >= MESSAGE_BATCH and not self.post.native:
            # The buffer was full: an event that came before these faults may still be unread.
            events += self.uffd.read_events()
        self.handler.handle(events, read_at)
        if self.served.stale:
            self.rules.update()
        forks, self.served.forks = self.served.forks, []
        for event, regions in forks:
            self._on_fork(self, event, regions)

    def _tell(self, record: Record, now: int) -> None:
        """Tell the ``after`` hooks of a fault that a rule has answered."""
        [event] = parse(record.message)
        if not isinstance(event, PageFault):
            return
        region = self.served.regions.find(event.address)
        if region is None:
            return
        fault = Fault(
            event.address - (event.address - region.start) % region.page_size,
            event.kind,
            event.write,
            event.thread,
            event.address,
            region,
            now - record.latency,
        )
        code = Code(record.code)
        outcome = Outcome.ALREADY_PRESENT if record.present else OUTCOME_OF_CODE[code]
        if record.error:
            refused_in_c(self.served, fault, record.error)
        self.served.hooks.after(Resolved(fault, outcome, record.latency, record.done))

    def _read_failed(self, number: int) -> None:
        self.served.log.error("reading the userfaultfd failed", errno=number)
        self._stopping = True

    async def _sleep(self) -> None:
        """Until a message comes, a deferred fault is due, or `wake`."""
        due = self.served.ledger.next_due()
        wait = math.inf if due is None else max(due - _clock(), 0) / 1e9
        if self._awake:
            return
        with trio.CancelScope(deadline=trio.current_time() + wait) as self._scope:
            if self.post.slept_over:
                await trio.sleep_forever()
            else:
                with suppress(trio.ClosedResourceError):
                    await self.post.wait()
        self._scope = None

    # -- what the engine asks of its loop ------------------------------------------------------

    @property
    def carry_out(self) -> CarryOut | None:
        """How operations are carried out while C serves: events may be known to it first."""
        return self._carry_out

    def events_applied(self) -> None:
        """Everything that was taken until now has been applied."""
        self._port.events_applied()

    def peers(self) -> Iterable[Served]:
        """All userfaultfds of this process that the daemon serves."""
        return self._peers()

    def wake(self) -> None:
        """Look again: something has changed."""
        self._awake = True
        if self._scope is not None:
            self._scope.cancel()
        if self._quiet is not None and self._is_quiet():
            self._quiet.set()

    def wake_if_read(self) -> None:
        """Look again if C has left something for Python, or does not look itself any more."""
        if self._port.has_records or self._port.error or self.post.deaf:
            self.wake()

    def catch_up(self) -> None:
        """Take in everything that has been read by now."""
        if self.post.native:
            self._port.settle()
        self.take()

    # -- the end -------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        """Whether nothing is open but what nobody is going to answer."""
        return len(self.served.ledger) == self.served.ledger.held

    async def shut_down(self, how: Shutdown, patience: float) -> None:
        """Stop serving within `patience` seconds, doing about open faults what `how` says."""
        await self._begun.wait()
        if not self.ended.is_set():
            # Whoever waits by now is known, and what can be answered at once is.
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
        if self._fd >= 0:
            self._port.settle()  # whoever was woken by an answer finds it counted
        total.add(self.served.counters)
        total.add_port(self._port)

    def woken(self, start: int, end: int) -> None:
        """The kernel has woken everybody in a range that is watched no more."""
        self._port.release(start, end - start)
        self.handler.end(self.served.ledger.inside(start, end), Outcome.WOKEN)

    def stop(self) -> None:
        """Have the loop end at once."""
        self._stopping = True
        self.wake()

    def let_go(self) -> None:
        """Never touch the descriptor again; close it if it is ours.  From any thread."""
        if self._fd < 0:
            return
        if not trio.lowlevel.in_trio_run():
            # Memory may be closed wherever it is used.
            trio.from_thread.run_sync(self.let_go, trio_token=self._token)
            return
        self._leave_post()
        self._fd = -1
        self.post.close()
        self._stopping = True
        self.wake()
        for call in self.on_end:
            call()
        if self.let_go in self.uffd.on_close:
            self.uffd.on_close.remove(self.let_go)
            abandon(self.served, self.post, poisoning=self._poisoning)
        elif not self.uffd.same_process and not self.served.client_gone:
            warn_of_closing(self.served)
        if self.owns_fd and not self.is_orphan():
            self.uffd.close()

    def _leave_post(self) -> None:
        """Nobody serves it from here on, and nothing that was read is forgotten."""
        if self._left:
            return
        self._left = True
        self.rules.close()
        self.post.leave()
        if self.post.native and not self.uffd.closed:
            now, records = _clock(), self._port.take()
            for record in records:
                if record.code and (record.error or self.served.hooks.see_endings):
                    self._tell(record, now)
            # Who waits by now is listed, although nobody is going to answer.
            left = [record for record in records if not record.code]
            self.handler.enter_only(events_of(left), now)
        self._carry_out = None

    def is_orphan(self) -> bool:
        """Whether the descriptor is ours and must stay open nevertheless."""
        return self.owns_fd and would_read_zeros(self.served)
