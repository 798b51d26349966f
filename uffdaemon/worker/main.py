"""The worker of an external policy: a process that answers the faults of its owner's memory.

Started by `uffdaemon.external.supervisor` with five descriptors: the userfaultfd, a socket to the
owner, the plan (what to serve, and how), the page book, and a socket to the
supervisor, which keeps what a successor has to know.  It imports the policy, serves, and reports;
it never waits for its owner, whose interpreter may be stopped by the very access that is to be
resolved.  It ends when the owner's socket does.
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
from uffdaemon.external.plan import PolicyPath, unpack_region
from uffdaemon.external.protocol import LIMIT, Packet
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.model.page_map import PageMap
from uffdaemon.placement import Shutdown
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.outcomes import Code, Operation, Status
from uffdaemon.worker.reporter import Reporter
from uffdaemon.worker.succession import Inheritance

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.model.region import Fault, Policy, Region
    from uffdaemon.model.region_table import RegionTable

_LOW_PAGE: Final = 0x10000


class _Refused:
    """The policy that is asked in the place of one that cannot be had: every fault fails."""

    def __init__(self, path: str, error: errors.UffdaemonError) -> None:
        self._path = path
        self.error = error

    def __repr__(self) -> str:
        return self._path

    def __call__(self, fault: Fault) -> Action | None:
        del fault
        raise self.error


def load(path: str) -> Policy:
    """Import a policy, or make it.  Raises `PolicyNotLoaded`, whatever goes wrong."""
    try:
        where = PolicyPath.parse(path)
        found: object = importlib.import_module(where.module)
        for word in where.attribute.split("."):
            found = getattr(found, word)
        if where.called:
            if not callable(found):
                raise TypeError(f"{found!r:.100} cannot be called, as '()' asks for")
            found = found()
        if not callable(found) or isinstance(found, type):
            hint = "; with '()' at its end, it is called to make one" if callable(found) else ""
            raise TypeError(f"a policy is a callable that takes a fault, not {found!r:.100}{hint}")
    except (Exception, SystemExit) as error:
        what = f"cannot be had: {type(error).__name__}: {error}"
        raise errors.PolicyNotLoaded(path, what) from error
    return cast("Policy", found)


class _Worker:
    def __init__(
        self, uffd: int, sock: socket.socket, plan: int, pages: int, estate: socket.socket
    ) -> None:
        plan_bytes = os.pread(plan, os.fstat(plan).st_size, 0)
        self._plan = Packet.decode(plan_bytes)
        self._uffd = Userfaultfd.adopt(uffd)
        self._sock = sock
        self._path = self._plan.text("policy")
        self._pages = pages
        self._inheritance = Inheritance(estate)
        self._reporter = Reporter(sock, self._path)
        self._how = Shutdown.HOLD
        self._patience = 0.0
        self._leaving = False
        self._refused: _Refused | None = None

    def main(self, given_up: str) -> None:
        """Load the policy, and serve until the owner is gone."""
        self._leave_with_owner()
        policy = self._policy(given_up)
        # Only now: the policy's module may have configured it for itself.
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
            return self._refuse(error)

    def _refuse(self, error: errors.UffdaemonError) -> Policy:
        """Serve nevertheless: faults fail, and what is declared for that is done."""
        self._refused = _Refused(self._path, error)
        return self._refused

    # -- serving -------------------------------------------------------------------------------

    async def _serve(self, policy: Policy) -> None:
        options = self._plan.packet("options")
        told = self._plan.packet("told")
        hooks = self._reporter.hooks(
            endings=bool(told.fields.get("endings")),
            failures=bool(told.fields.get("failures")),
            happened=bool(told.fields.get("events")),
        )
        async with trio.open_nursery() as nursery:
            daemon = Daemon(
                nursery,
                Options(
                    [hooks, self._inheritance.hooks],
                    on_fork="close" if options.text("on_fork") == "close" else "adopt",
                    watchdog=None,  # the memory is another process's
                    rereads=options.integer("rereads"),
                    fetch_limit=options.integer("fetch_limit"),
                ),
                log_interval=None,
            )
            self._inheritance.daemon = daemon
            await daemon.start(native_sleep=True)
            self._add(daemon, policy)
            if self._refused is None:
                self._reporter.ready()
            else:
                self._reporter.refused(str(self._refused.error))
            nursery.start_soon(self._reporter.run, daemon)
            nursery.start_soon(self._watch, daemon)
            await self._hear()
            self._leaving = True
            await daemon.shut_down(self._how, self._patience)
            self._reporter.finish(daemon)
            await self._hear_the_end()
            nursery.cancel_scope.cancel()

    def _add(self, daemon: Daemon, policy: Policy) -> None:
        region = self._region(policy)
        served = self._inheritance.take(self._uffd, region)
        try:
            self._resume(daemon, served)
        except errors.PlacementRefused as error:
            refused = errors.PolicyNotLoaded(self._path, f"cannot be external: {error}")
            refusing = self._refuse(refused)
            for table in served.values():
                for segment in table:
                    segment.region.policy = refusing
            self._resume(daemon, served)

    def _resume(self, daemon: Daemon, served: dict[Userfaultfd, RegionTable]) -> None:
        for uffd, table in served.items():
            daemon.resume(uffd, table, owns_fd=uffd is not self._uffd)

    def _region(self, policy: Policy) -> Region:
        region = unpack_region(self._plan.packet("region"), policy)
        region.pages = PageMap(region.pages.pages, file=self._pages)
        return region

    async def _watch(self, daemon: Daemon) -> None:
        """A userfaultfd that cannot be read any more is for a successor to try; not one whose
        process is gone, which may have left children."""
        await daemon.wait_client_gone(self._uffd)
        # Nothing is watched there, so that a living process answers ENOENT.
        [result] = self._uffd.execute([Operation(Code.ZEROPAGE, _LOW_PAGE, PAGE_SIZE)])
        if not self._leaving and result.status is not Status.CLIENT_GONE:
            raise RuntimeError("the userfaultfd is served no more")

    # -- the owner -----------------------------------------------------------------------------

    async def _hear(self) -> None:
        """What the owner asks for, until it asks to end, or is gone."""
        while data := await self._receive():
            packet = Packet.decode(data)
            if packet.text("kind") == "ask":
                self._reporter.ask(packet.integer("number"))
            else:
                self._how = Shutdown(packet.text("how"))
                self._patience = packet.real("patience")
                return

    async def _hear_the_end(self) -> None:
        while await self._receive():
            pass

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:  # the owner closed with something unread
                self._reporter.unheard()
                return b""

    def _leave_with_owner(self) -> None:
        """End this process some time after the owner's end, whatever it is doing then: the
        supervisor that would kill it may be gone as well."""
        patience = self._plan.real("patience")

        def wait() -> None:
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP)
            poll.poll()
            threading.Event().wait(patience)
            os._exit(0)

        threading.Thread(target=wait, name="owner gone", daemon=True).start()


def main() -> None:
    """Run with what the supervisor has passed: five descriptors, and why not to load the policy."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    *numbers, given_up = sys.argv[1:]
    fds = [int(number) for number in numbers]
    for fd in fds:
        os.set_inheritable(fd, False)  # noqa: FBT003  # the standard library's
    uffd, sock, plan, pages, estate = fds
    sys.argv[1:] = []
    worker = _Worker(uffd, socket.socket(fileno=sock), plan, pages, socket.socket(fileno=estate))
    worker.main(given_up)


if __name__ == "__main__":
    main()
