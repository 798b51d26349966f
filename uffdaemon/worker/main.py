"""The worker of an external policy: a process that resolves the faults of its owner's memory.

`uffdaemon.external.supervisor` starts it with five descriptors: the userfaultfd, a socket to the
owner, the plan (what to serve, and how), the page book, and a socket to the supervisor, which keeps
the state for the next worker.  The worker imports the policy, resolves faults, and reports to the
owner.  It never waits for the owner, since the access whose fault it resolves may have stopped the
owner's interpreter.  It exits when the owner closes its socket.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Final, cast

import structlog
import trio

from uffdaemon import errors
from uffdaemon.daemon.daemon import Daemon
from uffdaemon.daemon.servers import Options
from uffdaemon.external.plan import PolicyPath
from uffdaemon.external.protocol import LIMIT
from uffdaemon.journal.packed_region import unpack_region
from uffdaemon.journal.packet import Packet
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.model.page_map import PageMap
from uffdaemon.placement import Shutdown
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.outcomes import Code, Operation, Status
from uffdaemon.worker.reporter import Reporter
from uffdaemon.worker.saved_state import SavedState

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.model.region import Fault, Policy, Region
    from uffdaemon.model.region_table import RegionTable

_LOW_PAGE: Final = 0x10000


class _FailingPolicy:
    """Takes the place of a policy that cannot be loaded: every fault fails with `error`."""

    def __init__(self, path: str, error: errors.UffdaemonError) -> None:
        self._path = path
        self.error = error

    def __repr__(self) -> str:
        return self._path

    def __call__(self, fault: Fault) -> Action | None:
        del fault
        raise self.error


def load(path: str) -> Policy:
    """Import a policy, and call it if its name ends with "()".  Raises only `PolicyNotLoaded`."""
    try:
        where = PolicyPath.parse(path)
        found: object = importlib.import_module(where.module)
        for name in where.attribute.split("."):
            found = getattr(found, name)
        if where.called:
            if not callable(found):
                raise TypeError(f"the name ends with '()', but {found!r:.100} is not callable")
            found = found()
        if not callable(found) or isinstance(found, type):
            hint = "; add '()' to its name to have it called" if callable(found) else ""
            raise TypeError(f"a policy is a callable that takes a fault, not {found!r:.100}{hint}")
    except (Exception, SystemExit) as error:
        what = f"cannot be loaded: {type(error).__name__}: {error}"
        raise errors.PolicyNotLoaded(path, what) from error
    return cast("Policy", found)


class _Worker:
    def __init__(
        self, uffd: int, sock: socket.socket, plan: int, pages: int, state: socket.socket
    ) -> None:
        plan_bytes = os.pread(plan, os.fstat(plan).st_size, 0)
        self._plan = Packet.decode(plan_bytes)
        self._uffd = Userfaultfd.adopt(uffd)
        self._sock = sock
        self._path = self._plan.text("policy")
        self._pages = pages
        self._state = SavedState(state)
        self._reporter = Reporter(sock, self._path)
        self._how = Shutdown.HOLD
        self._shutdown_timeout = 0.0
        self._shutting_down = False
        self._failing: _FailingPolicy | None = None

    def main(self, given_up: str) -> None:
        """Load the policy, and serve until the owner closes its socket."""
        self._exit_with_owner()
        policy = self._policy(given_up)
        # After the import: the policy's module may have configured structlog for its own use.
        structlog.configure(
            processors=[structlog.processors.format_exc_info, self._reporter.log],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=False,
        )
        trio.run(self._serve, policy)

    def _policy(self, given_up: str) -> Policy:
        try:
            if given_up:
                raise errors.PolicyNotLoaded(self._path, f"was given up: {given_up}")
            return load(self._path)
        except errors.PolicyNotLoaded as error:
            return self._fail_all(error)

    def _fail_all(self, error: errors.UffdaemonError) -> Policy:
        """Serve without the policy: every fault fails, and `on_failure` applies."""
        self._failing = _FailingPolicy(self._path, error)
        return self._failing

    # -- serving -------------------------------------------------------------------------------

    async def _serve(self, policy: Policy) -> None:
        options = self._plan.packet("options")
        reports = self._plan.packet("reports").fields
        hooks = self._reporter.hooks(
            resolved=bool(reports.get("resolved")),
            failures=bool(reports.get("failures")),
            events=bool(reports.get("events")),
        )
        async with trio.open_nursery() as nursery:
            daemon = Daemon(
                nursery,
                Options(
                    [hooks, self._state.hooks],
                    on_fork="close" if options.text("on_fork") == "close" else "adopt",
                    watchdog=None,  # the memory belongs to another process
                    rereads=options.integer("rereads"),
                    fetch_limit=options.integer("fetch_limit"),
                ),
                log_interval=None,
            )
            self._state.daemon = daemon
            await daemon.start(native_sleep=True)
            self._add(daemon, policy)
            if self._failing is None:
                self._reporter.ready()
            else:
                self._reporter.refused(str(self._failing.error))
            nursery.start_soon(self._reporter.run, daemon)
            nursery.start_soon(self._check_served, daemon)
            await self._handle_requests()
            self._shutting_down = True
            await daemon.shut_down(self._how, self._shutdown_timeout)
            self._reporter.finish(daemon)
            await self._wait_for_close()
            nursery.cancel_scope.cancel()

    def _add(self, daemon: Daemon, policy: Policy) -> None:
        region = self._region(policy)
        served = self._state.load(self._uffd, region)
        try:
            self._resume(daemon, served)
        except errors.PlacementRefused as error:
            refused = errors.PolicyNotLoaded(self._path, f"cannot be external: {error}")
            failing = self._fail_all(refused)
            for table in served.values():
                for segment in table:
                    segment.region.policy = failing
            self._resume(daemon, served)

    def _resume(self, daemon: Daemon, served: dict[Userfaultfd, RegionTable]) -> None:
        for uffd, table in served.items():
            daemon.take_over(uffd, table, owns_fd=uffd is not self._uffd)

    def _region(self, policy: Policy) -> Region:
        region = unpack_region(self._plan.packet("region"), policy)
        region.pages = PageMap(region.pages.pages, file=self._pages)
        return region

    async def _check_served(self, daemon: Daemon) -> None:
        """Fail if the userfaultfd is no longer served while its process lives: the next worker may
        be able to read it.  If the process is gone, forked children may still need this one."""
        await daemon.wait_client_gone(self._uffd)
        # The page is not registered: the ioctl fails with ENOENT if the process lives.
        [result] = self._uffd.execute([Operation(Code.ZEROPAGE, _LOW_PAGE, PAGE_SIZE)])
        if not self._shutting_down and result.status is not Status.CLIENT_GONE:
            raise RuntimeError("the userfaultfd is no longer served")

    # -- the owner -----------------------------------------------------------------------------

    async def _handle_requests(self) -> None:
        """Handle the owner's requests until it sends "end" or closes the socket."""
        while data := await self._receive():
            packet = Packet.decode(data)
            if packet.text("kind") == "count":
                self._reporter.request(packet.integer("number"))
            else:
                self._how = Shutdown(packet.text("how"))
                self._shutdown_timeout = packet.real("timeout")
                return

    async def _wait_for_close(self) -> None:
        while await self._receive():
            pass

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:  # the owner closed the socket with unread packets
                self._reporter.owner_exited()
                return b""

    def _exit_with_owner(self) -> None:
        """Exit this process `exit_timeout` seconds after the owner closes the socket.

        The supervisor, which would kill it then, may be gone as well.
        """
        timeout = self._plan.real("exit_timeout")

        def wait() -> None:
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP)
            poll.poll()
            threading.Event().wait(timeout)
            os._exit(0)

        threading.Thread(target=wait, name="owner gone", daemon=True).start()


def main() -> None:
    """Run with the supervisor's arguments: five descriptors, and why the policy was given up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    *numbers, given_up = sys.argv[1:]
    fds = [int(number) for number in numbers]
    for fd in fds:
        os.set_inheritable(fd, False)  # noqa: FBT003  # the standard library's
    uffd, sock, plan, pages, state = fds
    sys.argv[1:] = []
    worker = _Worker(uffd, socket.socket(fileno=sock), plan, pages, socket.socket(fileno=state))
    worker.main(given_up)


if __name__ == "__main__":
    main()
