"""Receives the reports of a worker in the owner's process: logs, hooks, statistics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import errors
from uffdaemon.external.protocol import (
    LIMIT,
    encode,
    unpack_binary,
    unpack_counters,
    unpack_failure,
    unpack_fault,
    unpack_open_faults,
)
from uffdaemon.hooks import HookCalls, Resolved
from uffdaemon.journal.packet import Packet
from uffdaemon.model.statistics import Counters
from uffdaemon.uapi.events import Event, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from uffdaemon.hooks import Hooks
    from uffdaemon.log import Log
    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.model.region import Region

_PACKETS_PER_CHECKPOINT: Final = 50
_EVENT_NAMES: Final[dict[type, str]] = {
    ForkEvent: "fork",
    RemapEvent: "remap",
    RemoveEvent: "remove",
    UnmapEvent: "unmap",
}


class Listener:
    """Receives the reports of a supervisor and its workers, and keeps the latest state.

    `send` sends a packet to the worker, if there is one, without waiting.
    """

    def __init__(
        self,
        region: Region,
        policy: str,
        hooks: Sequence[Hooks],
        log: Log,
        send: Callable[[bytes], None],
    ) -> None:
        self.worker: int | None = None
        """The process id of the worker; None while there is none."""
        self._closed = False
        self.worker_ended: bool = False
        """Whether the worker has dealt with its open faults, as `end` asked."""
        self._region = region
        self._policy = policy
        self._log = log
        self._send = send
        self._counters = Counters()
        self.calls: HookCalls = HookCalls(hooks, self._counters, log)
        self._current = Counters()
        self._current_pid = 0
        self._open: Packet | None = None
        self._ready = False
        self._refusal: errors.PolicyNotLoaded | None = None
        self._requested = self._counted = 0
        """Numbers of the last request for statistics, and of the last one with a reply."""
        self._end: bytes | None = None
        self._changed = trio.Event()

    async def receive(self, sock: socket.socket) -> None:
        """Receive reports until the supervisor and its worker have closed the socket."""
        received = 0
        while True:
            try:
                data = sock.recv(LIMIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            except ConnectionResetError:  # returned once if they exited with unread packets
                continue
            if not data:
                return
            try:
                self._handle(data)
            except ValueError as error:
                self._log.warning("malformed report of an external policy", error=str(error))
            received += 1
            if received % _PACKETS_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()

    def _handle(self, data: bytes) -> None:
        reports = unpack_binary(data, self._region)
        if reports is not None:
            for report in reports:
                self._call_hooks(report)
            return
        packet = Packet.decode(data)
        kind = packet.text("kind")
        match kind:
            case "statistics":
                self._count(packet)
            case "failed":
                fault = unpack_fault(packet, self._region)
                self.calls.failed(fault, unpack_failure(packet))
            case "log":
                self._log_line(packet)
            case "dropped":
                self._log.warning("reports dropped", count=packet.integer("count"))
            case "ended":
                self.worker_ended = True
            case "died":
                self.worker, self._open = None, None
                status, again_in = packet.text("text"), packet.real("again_in")
                self._log.warning("external worker died", status=status, again_in=again_in)
            case "given up":
                self._refuse(f"was given up: {packet.text('text')}")
            case _:
                self._worker_started(kind, packet)
        self.notify()

    @property
    def refusal(self) -> str:
        """Why the policy was not loaded; "" if it was, or if that is not known yet."""
        return "" if self._refusal is None else str(self._refusal)

    def _call_hooks(self, report: Resolved | Event) -> None:
        if isinstance(report, Resolved):
            self.calls.after(report)
        elif type(report) in _EVENT_NAMES:
            self.calls.event(_EVENT_NAMES[type(report)], report)

    def _worker_started(self, kind: str, packet: Packet) -> None:
        """A worker serves faults, with its policy ("ready") or without ("refused")."""
        self.worker = packet.integer("pid")
        if kind == "refused":
            self._refuse(packet.text("text").removeprefix(f"policy {self._policy} "))
        else:
            self._ready = True
        # Requests to its predecessor may be lost.
        if self._counted < self._requested:
            self._send(encode("count", {"number": self._requested}))
        if self._end is not None:
            self._send(self._end)

    def _refuse(self, text: str) -> None:
        known, self._refusal = self._refusal, errors.PolicyNotLoaded(self._policy, text)
        self._ready = False
        if known is None or str(known) != str(self._refusal):
            self._log.error("external policy not loaded", error=text)

    def _log_line(self, packet: Packet) -> None:
        """Log a line of the worker."""
        fields = {**packet.packet("fields").fields, "worker": self.worker}
        self._log.write(packet.text("level"), packet.text("event"), **fields)

    def _count(self, packet: Packet) -> None:
        if packet.integer("pid") != self._current_pid:
            self._counters.add(self._current)
        self._current_pid = packet.integer("pid")
        self._current = unpack_counters(packet)
        self._open = packet
        self._counted = max(self._counted, packet.integer("number"))

    def notify(self) -> None:
        """Wake the tasks that wait for a change of state."""
        self._changed.set()
        self._changed = trio.Event()

    def worker_gone(self) -> None:
        """The supervisor has exited, and its worker with it."""
        self.worker = None

    def close(self) -> None:
        """No more reports will come."""
        self._closed = True
        self.worker = None
        self.notify()

    # -- requests ------------------------------------------------------------------------------

    async def ready(self) -> None:
        """See `ExternalServer.ready`."""
        while not self._ready:
            if self._refusal is not None:
                raise self._refusal
            await self._wait_for_change()

    async def refresh(self) -> None:
        """See `ExternalServer.refresh`."""
        self._requested += 1
        number = self._requested
        self._send(encode("count", {"number": number}))
        while self._counted < number:
            await self._wait_for_change()

    async def end(self, how: str, seconds: float) -> None:
        """Tell the worker to end its open faults within `seconds`, and wait until it has."""
        self._end = encode("end", {"how": how, "timeout": seconds})
        self._send(self._end)
        while not self.worker_ended and not self._closed:
            await self._changed.wait()

    async def _wait_for_change(self) -> None:
        if self._closed:
            raise errors.DaemonClosed(f"{self._region.label} is no longer served")
        await self._changed.wait()

    # -- state ---------------------------------------------------------------------------------

    def add_counters(self, total: Counters) -> None:
        """See `ExternalServer.add_counters`."""
        total.add(self._counters)
        total.add(self._current)

    def open_faults(self) -> list[OpenFault]:
        """See `ExternalServer.open_faults`."""
        if self._open is None:
            return []
        return unpack_open_faults(self._open, self._region, time.perf_counter_ns())
