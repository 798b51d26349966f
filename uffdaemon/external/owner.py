"""Serves a region by an external policy, in the process that owns the memory.

The owner keeps the userfaultfd open and starts a supervisor (`uffdaemon.external.supervisor`).  The
supervisor starts the worker (`uffdaemon.worker.main`), which imports the policy and resolves
faults.  Neither needs the owner's interpreter, which a thread that waits for a page with the GIL
held may have stopped.  Here the owner receives the worker's reports, and restarts a supervisor that
died.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

import uffdaemon.external.supervisor
from uffdaemon import errors
from uffdaemon.engine.observers import AsyncHooks
from uffdaemon.external.listener import Listener
from uffdaemon.external.plan import DEFAULTS, EXIT_TIMEOUT, ExternalOptions, ExternalPolicy, plan_of
from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.guard.requirements import refuse_if_exported, unblock_forks, unregistered
from uffdaemon.kernel.page_scan import PageCategory, scan_pages
from uffdaemon.model.page_map import PageMap
from uffdaemon.model.region_table import Segment
from uffdaemon.placement import Shutdown
from uffdaemon.ports.watchdog import abandon, resume

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uffdaemon.hooks import Hooks
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.log import Log
    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.model.region import Missing, Region
    from uffdaemon.model.statistics import Counters
    from uffdaemon.placement import Watchdog
    from uffdaemon.uapi.features import RegisterMode

_FIRST_DELAY: Final = 0.1
_MAX_DELAY: Final = 5.0
_STABLE: Final = 10.0


class _Supervisor(NamedTuple):
    """A supervisor process, and the socket to it and its worker."""

    process: subprocess.Popen[bytes]
    pidfd: int
    sock: socket.socket


class ExternalServer:
    """One region of this process, served by a worker process; an entry of `Daemon.external`.

    `region` is the owner's view of the region, with an `ExternalPolicy`; only the worker knows its
    page contents.  Create it and call `start` in trio's thread, and run `run` in a task.

    Raises `PlacementRefused` for what another process cannot call: a callable for `on_failure` or
    `on_fork`, or a ``before`` hook.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        region: Region,
        *,
        hooks: Sequence[Hooks] = (),
        log: Log,
        options: ExternalOptions = DEFAULTS,
        watchdog: Watchdog | None = None,
    ) -> None:
        if not isinstance(region.policy, ExternalPolicy):
            raise TypeError(f"the region's policy is not external: {region.policy!r:.100}")
        self.uffd = uffd
        self.region = region
        self.policy: str = region.policy.name
        self.ended: trio.Event = trio.Event()
        log = log.bind(region=region.label, policy=self.policy)
        self._log = log
        self._listener = Listener(region, self.policy, hooks, log, self._send)
        self._watchdog = watchdog
        """Takes over when the region is no longer served."""
        self._poisoning = False
        self._removed_region = False
        self._plan = _memory_file("uffdaemon plan", plan_of(region, self.policy, hooks, options))
        self._leaving = trio.Event()
        self._begun = trio.Event()
        self._supervisor: _Supervisor | None = None
        self._token = trio.lowlevel.current_trio_token()

    # -- the processes -------------------------------------------------------------------------

    def start(self, register: RegisterMode | None) -> None:
        """Start the processes, then register the range (None: it is registered already).

        In this order, because a thread that touches the memory may stop this interpreter.  Raises
        OSError if no process can be started, and what `Userfaultfd.register` raises; the processes
        have ended then.
        """
        try:
            self._supervisor = self._spawn()
            if register is not None:
                self.uffd.register(self.region.start, self.region.length, register)
            resume(self.uffd)
        except BaseException:
            if self._supervisor is not None:
                self._kill(self._supervisor)
                self._supervisor.process.wait()
            self._close()
            raise
        self.uffd.on_close.append(self.stop)

    def _spawn(self) -> _Supervisor:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                fds = (
                    self.uffd.fileno(),
                    theirs.fileno(),
                    self._plan,
                    self.region.pages.book.fileno(),
                )
                process = subprocess.Popen(
                    # -I and -S: no environment variables, no site-packages.
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        uffdaemon.external.supervisor.__file__,
                        *map(str, fds),
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=fds,
                    process_group=0,  # Ctrl-C is for the owner only
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)  # noqa: FBT003  # the standard library's
        return _Supervisor(process, os.pidfd_open(process.pid), ours)

    def _send(self, packet: bytes) -> None:
        if self._supervisor is not None:
            with suppress(OSError):  # sent again when the next worker starts
                self._supervisor.sock.send(packet, socket.MSG_DONTWAIT)

    def _kill(self, supervisor: _Supervisor) -> None:
        """Kill the supervisor and its worker, which is in its process group.

        The supervisor has not been reaped, so the number cannot belong to another process.
        """
        with suppress(ProcessLookupError):
            os.killpg(supervisor.process.pid, signal.SIGKILL)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive reports and restart the supervisor, until `stop` or `shut_down`.

        Shielded from cancellation.
        """
        try:
            with trio.CancelScope(shield=True):
                async with AsyncHooks.open(self._listener.calls) as hooks:
                    self._begun.set()
                    task_status.started()
                    await self._run_supervisors()
                    await hooks.finish(EXIT_TIMEOUT)
        finally:
            self._close()
            self._abandon()
            self.ended.set()
            self._listener.close()

    def _abandon(self) -> None:
        """Prepare for faults of threads that touch the memory when it is no longer served."""
        region = self.region
        if self._removed_region or self.uffd.closed:
            return
        unblock_forks(self.uffd, Segment(region.start, region.end, region))
        if self._watchdog is None:
            return
        # A thread with a buffer may hold the GIL while it waits, so no other daemon could start.
        exported = isinstance(region, GuardedRegion) and region.memory.exported
        then = "poison" if self._poisoning or exported else self._watchdog.then
        abandon(self.uffd, region.label, [(region.start, region.end)], self._watchdog, then)

    @property
    def refusal(self) -> str:
        """Why faults are not resolved, or "" if they are, or if that is not known yet."""
        return "it is no longer served" if self._removed_region else self._listener.refusal

    async def _run_supervisors(self) -> None:
        deaths = 0
        while True:
            begun = trio.current_time()
            status = await self._run_supervisor()
            self._listener.worker_gone()
            if self._leaving.is_set():
                return
            deaths = 1 if trio.current_time() - begun > _STABLE else deaths + 1
            delay = 0.0 if deaths == 1 else min(_FIRST_DELAY * 2.0 ** (deaths - 2), _MAX_DELAY)
            self._log.error("external supervisor died", status=status, again_in=delay)
            with trio.move_on_after(delay):
                await self._leaving.wait()
            if self._leaving.is_set():
                return

    async def _run_supervisor(self) -> str:
        """Receive the reports of a supervisor and its worker until both have exited.

        Returns how the supervisor ended.
        """
        if self._supervisor is None:
            try:
                self._supervisor = self._spawn()
            except OSError as error:
                return f"cannot be started: {error}"
        supervisor = self._supervisor
        closed = trio.Event()

        @trio.lowlevel.enable_ki_protection
        async def receive() -> None:
            await self._listener.receive(supervisor.sock)
            closed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.lowlevel.wait_readable(supervisor.pidfd)
            # Its worker may still be running.  It must exit before the next one starts.
            _shut_down(supervisor.sock)
            with trio.move_on_after(EXIT_TIMEOUT):
                await closed.wait()
            if not closed.is_set():
                self._kill(supervisor)
            nursery.cancel_scope.cancel()
        status = supervisor.process.wait()
        self._close_supervisor(supervisor)
        return f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"

    def _close_supervisor(self, supervisor: _Supervisor) -> None:
        self._supervisor = None
        for each in (supervisor.pidfd, supervisor.sock):
            if trio.lowlevel.in_trio_run():
                trio.lowlevel.notify_closing(each)
        os.close(supervisor.pidfd)
        supervisor.sock.close()

    def _close(self) -> None:
        if self._supervisor is not None:
            self._close_supervisor(self._supervisor)
        if self._plan >= 0:
            os.close(self._plan)
            self._plan = -1
        self.region.pages.book.close_file()
        if self.stop in self.uffd.on_close:
            self.uffd.on_close.remove(self.stop)

    # -- shutdown ------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the processes at once; open faults stay open.  Can be called from any thread."""
        if not trio.lowlevel.in_trio_run():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.stop)
            return
        self._leaving.set()
        if self._supervisor is not None:
            _shut_down(self._supervisor.sock)

    def remove(self, missing: Missing | None) -> None:
        """Stop serving the region: see `Daemon.remove_region`."""
        if missing == "hold":
            refuse_if_exported(self.region)
        start, page_size = self.region.start, self.region.page_size
        absent = list(self._absent())
        if absent and missing is None:
            count = sum(length for _, length in absent) // page_size
            raise errors.RegionIncomplete(
                f"{self.region.label} lacks {count} of {self.region.pages.pages} pages: pass "
                "missing='hold', 'poison' or 'release'"
            )
        if missing == "poison":
            for first, length in absent:
                self.uffd.poison(first, length, page_size=page_size)
        if not absent or missing != "hold":
            self.uffd.unregister(start, self.region.length)
            unregistered(self.region, self.uffd)
        self._removed_region = True
        self.stop()

    def _absent(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, length) of pages that are neither present nor discarded."""
        region = self.region
        size = region.page_size
        known = PageMap(region.pages.pages)
        for first, end in region.pages.removed.runs():
            known.present.add_range(first, end)
        there = PageCategory.PRESENT | PageCategory.SWAPPED
        for found in scan_pages(region.start, region.length, any_of=there):
            first = (found.start - region.start) // size
            known.present.add_range(first, first + -(-found.length // size))
        end = 0
        while (at := known.next_fillable(end, known.pages)) is not None:
            _, end = known.fillable(at, at, known.pages)
            yield region.start + at * size, (end - at) * size

    async def shut_down(self, how: Shutdown, seconds: float) -> None:
        """Deal with open faults as `how` says for up to `seconds`, then end the processes.

        Takes a few seconds more if a process does not exit by itself.
        """
        await self._begun.wait()
        self._poisoning = how is Shutdown.POISON
        if self.worker is not None or how is not Shutdown.HOLD:
            with trio.move_on_after(seconds + EXIT_TIMEOUT):
                await self._listener.end(how.value, seconds)
        self.stop()
        with trio.move_on_after(2 * EXIT_TIMEOUT):
            await self.ended.wait()
        if self._supervisor is not None:
            self._kill(self._supervisor)
        await self.ended.wait()
        for entry in self.open_faults():
            self._log.warning("thread left waiting", fault=str(entry))

    # -- state ---------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the worker resolves faults.

        Raises `PolicyNotLoaded` with the reason, and `DaemonClosed`.
        """
        await self._listener.ready()

    async def refresh(self) -> None:
        """Wait until the worker has sent its current counters.  Raises `DaemonClosed`."""
        await self._listener.refresh()

    def add_counters(self, total: Counters) -> None:
        """Add the counts that the workers have sent.

        A worker sends its counts at least once a second, ten times a second under load.  What it
        counts between the last of them and its death is lost.
        """
        self._listener.add_counters(total)

    def open_faults(self) -> list[OpenFault]:
        """The oldest open faults, as last sent by the worker."""
        return self._listener.open_faults()

    @property
    def worker(self) -> int | None:
        """The process id of the worker; None while there is none."""
        return self._listener.worker

    @property
    def supervisor(self) -> int | None:
        """The process id of the supervisor; None while there is none."""
        return None if self._supervisor is None else self._supervisor.process.pid


def _memory_file(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.pwrite(fd, content, 0)
    return fd


def _shut_down(sock: socket.socket) -> None:
    """Tell the processes at the other end to exit.  Their last reports can still be received."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
