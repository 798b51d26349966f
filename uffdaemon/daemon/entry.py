"""`open_daemon`, and `serve` for a single userfaultfd."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict, Unpack

import trio

from uffdaemon.arguments import check_seconds
from uffdaemon.daemon.daemon import Daemon
from uffdaemon.daemon.servers import ForkDecision, Options, check_options
from uffdaemon.placement import Shutdown, Watchdog
from uffdaemon.uapi.features import RegisterMode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from types import TracebackType

    from uffdaemon.hooks import Hooks
    from uffdaemon.journal.journal import Journal
    from uffdaemon.keeper.keeper import Keeper
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.model.region import Policy, Region
    from uffdaemon.uapi.events import ForkEvent

REREADS: Final = 100
"""How often an empty userfaultfd is read before sleeping: about 30 µs, in which a thread on another
core can wake up and fault again (see docs/architecture.md)."""

WATCHDOG: Final = Watchdog()


class DaemonOptions(TypedDict, total=False):
    """The arguments of `open_daemon`."""

    hooks: Sequence[Hooks]
    on_shutdown: Shutdown
    shutdown_timeout: float
    on_fork: ForkDecision | Callable[[ForkEvent], ForkDecision]
    watchdog: Watchdog | None
    rereads: int
    fetch_limit: int
    native_sleep: bool
    log_interval: float | None
    journal: Journal | None
    keeper: Keeper | None
    default: Policy | None


def open_daemon(
    *,
    hooks: Sequence[Hooks] = (),
    on_shutdown: Shutdown = Shutdown.HOLD,
    shutdown_timeout: float = 5.0,
    on_fork: ForkDecision | Callable[[ForkEvent], ForkDecision] = "adopt",
    watchdog: Watchdog | None = WATCHDOG,
    rereads: int = REREADS,
    fetch_limit: int = 16,
    native_sleep: bool = True,
    log_interval: float | None = None,
    journal: Journal | None = None,
    keeper: Keeper | None = None,
    default: Policy | None = None,
) -> AbstractAsyncContextManager[Daemon]:
    """Serve page faults while the block runs.

    When the block ends, in whatever way, `on_shutdown` says what happens to open faults, for at
    most `shutdown_timeout` seconds, shielded from cancellation.  Tasks that shield themselves (a
    source, a `Perform`) are still waited for.  An exception of the block is raised unchanged.
    Ctrl-C interrupts the block, and a policy that is running, but not the daemon: however often it
    comes, and whenever, the daemon ends in order.

    `on_fork` says what to do with forked children whose memory is registered: "adopt" serves them,
    "close" lets their missing pages become zeros, and a callable returns one of the two.
    `watchdog` reports faults of this process that Python does not dequeue, and threads that touch
    missing pages after the daemon has ended; None turns it off.

    `rereads` limits how often an empty userfaultfd is read again before sleeping; 0: never.
    `fetch_limit` is the number of concurrent fetches per userfaultfd.  `native_sleep` resolves
    faults in C while trio sleeps; not in guest mode, where the host's loop sleeps.  The
    statistics are logged every `log_interval` seconds and at the end, if it is not None; failures
    are always logged.

    With a `journal`, a successor can go on if this process is killed: see `Daemon.resume`.  A
    `keeper` holds the descriptors meanwhile, and the journal, unless there is another one.  Both
    concern userfaultfds of other processes: memory of this one goes with it.

    `default` is the policy for faults outside every region, such as those in memory that has grown
    in place, which no event reports: its fault has a region of one page at offset 0, whose name has
    the userfaultfd and the process.  ``ZeroPage()`` gives such memory what it has without a
    userfaultfd, ``Poison()`` gives SIGBUS.  By default the fault fails with `NotServed` and waits
    until a region is added there.  External policies have no default.

    Raises TypeError and ValueError for options that make no sense.
    """
    options = Options(hooks, on_fork, watchdog, rereads, fetch_limit, journal, keeper, default)
    check_options(options)
    check_seconds("shutdown_timeout", shutdown_timeout)
    if log_interval is not None:
        check_seconds("log_interval", log_interval, positive=True)
    ending = _Ending(Shutdown(on_shutdown), shutdown_timeout)  # or the value of a Shutdown
    return _Protected(_opened(options, ending, native_sleep=native_sleep, interval=log_interval))


class _Ending(NamedTuple):
    """How a daemon ends."""

    how: Shutdown
    timeout: float


class _Protected(AbstractAsyncContextManager[Daemon]):
    """Enters and leaves a context manager without being interrupted halfway by Ctrl-C."""

    def __init__(self, inner: AbstractAsyncContextManager[Daemon]) -> None:
        self._inner = inner

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Daemon:
        return await self._inner.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._inner.__aexit__(kind, error, traceback)


@asynccontextmanager
async def _opened(
    options: Options, ending: _Ending, *, native_sleep: bool, interval: float | None
) -> AsyncGenerator[Daemon]:
    if options.keeper is not None and options.journal is None:
        with options.keeper.journal() as journal:
            kept = options._replace(journal=journal)
            inner = _opened(kept, ending, native_sleep=native_sleep, interval=interval)
            async with inner as daemon:
                yield daemon
        return
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            daemon = Daemon(nursery, options, log_interval=interval)
            await daemon.start(native_sleep=native_sleep)
            try:
                yield daemon
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
                failure = error  # raised again below, not in a group
            finally:
                failure = await _end(nursery, daemon, ending) or failure
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The main task is interrupted wherever it waits: also for the tasks of its nursery.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        failure = failure or KeyboardInterrupt()
    if failure is not None:
        raise failure


async def _end(nursery: trio.Nursery, daemon: Daemon, ending: _Ending) -> BaseException | None:
    """Shut the daemon down.  Returns what was raised meanwhile, if it is more than one more
    interrupt.

    trio delivers Ctrl-C to the main task, which this may be: so a task of its own does it.
    """
    ended = trio.Event()
    raised: list[BaseException] = []

    @trio.lowlevel.enable_ki_protection
    async def shut_down() -> None:
        try:
            with trio.CancelScope(shield=True):
                await daemon.shut_down(ending.how, ending.timeout)
        except BaseException as error:  # noqa: BLE001  # raised by the task that waits
            raised.append(error)
        ended.set()

    nursery.start_soon(shut_down)
    with trio.CancelScope(shield=True):
        while not ended.is_set():
            try:
                await ended.wait()
            except KeyboardInterrupt as error:
                raised.append(error)
    return raised[0] if raised else None


async def serve(
    uffd: Userfaultfd,
    regions: Sequence[Region],
    *,
    register: RegisterMode | None = RegisterMode.MISSING,
    client: int | None = None,
    task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[DaemonOptions],
) -> None:
    """Serve the regions of one userfaultfd until its client has exited, or until cancelled.

    `client` is the client's process id; with it, the exit of an idle client is noticed.
    ``nursery.start`` returns the `Daemon` once faults are being served.  `options` are the
    arguments of `open_daemon`.  Raises what `Daemon.add_region` raises.
    """
    async with open_daemon(**options) as daemon:
        for region in regions:
            daemon.add_region(uffd, region, register=register)
        if client is not None:
            daemon.watch_client(uffd, client)
        task_status.started(daemon)
        await daemon.wait_client_gone(uffd)
