"""What the owner of guarded memory hears of the worker that answers for it, and makes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import errors
from uffdaemon.external.protocol import (
    LIMIT,
    Packet,
    encode,
    unpack_binary,
    unpack_counters,
    unpack_failure,
    unpack_fault,
    unpack_open_faults,
)
from uffdaemon.hooks import HookCalls, Resolved
from uffdaemon.model.statistics import Counters
from uffdaemon.uapi.events import Event, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from structlog.stdlib import BoundLogger

    from uffdaemon.hooks import Hooks
    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.model.region import Region

_TURN: Final = 50  # packets between two checkpoints
_EVENT_NAMES: Final[dict[type, str]] = {
    ForkEvent: "fork",
    RemapEvent: "remap",
    RemoveEvent: "remove",
    UnmapEvent: "unmap",
}


class Listener:
    """Hears a supervisor and its workers, one after the other, and keeps what they said.

    `send` gives a packet to the worker, if there is one, without waiting.
    """

    def __init__(
        self,
        region: Region,
        policy: str,
        hooks: Sequence[Hooks],
        log: BoundLogger,
        send: Callable[[bytes], None],
    ) -> None:
        self.worker: int | None = None
        """The process id of the worker that answers; None: there is none at the moment."""
        self.ended = False
        """Set by the owner when nobody will say anything any more."""
        self.said_end = False
        """Whether the worker has done what it was to do at its end."""
        self._region = region
        self._policy = policy
        self._log = log
        self._send = send
        self._counters = Counters()
        self.calls = HookCalls(hooks, self._counters, log)
        self._current = Counters()
        self._current_pid = 0
        self._open: Packet | None = None
        self._ready = False
        self._refusal: errors.PolicyNotLoaded | None = None
        self._asked = self._answered = 0
        self._end: bytes | None = None
        self._news = trio.Event()

    async def hear(self, sock: socket.socket) -> None:
        """Take what is said, until nobody is left who could say anything."""
        taken = 0
        while True:
            try:
                data = sock.recv(LIMIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            except ConnectionResetError:  # said once, when they left with something unread
                continue
            if not data:
                return
            try:
                self._take(data)
            except ValueError as error:
                self._log.warning("external policy reports nonsense", error=str(error))
            taken += 1
            if taken % _TURN == 0:
                await trio.lowlevel.checkpoint()

    def _take(self, data: bytes) -> None:
        told = unpack_binary(data, self._region)
        if told is not None:
            for each in told:
                self._call(each)
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
                self._repeat(packet)
            case "dropped":
                self._log.warning("reports of endings dropped", count=packet.integer("count"))
            case "ended":
                self.said_end = True
            case "died":
                self.worker, self._open = None, None
                status, again_in = packet.text("text"), packet.real("again_in")
                self._log.warning("external worker died", status=status, again_in=again_in)
            case "given up":
                self._refuse(f"was given up: {packet.text('text')}")
            case _:
                self._begin(kind, packet)
        self.tell()

    @property
    def refusal(self) -> str:
        """Why the policy answers nothing; "": it does, or is not known not to."""
        return "" if self._refusal is None else str(self._refusal)

    def _call(self, told: Resolved | Event) -> None:
        if isinstance(told, Resolved):
            self.calls.after(told)
        elif type(told) in _EVENT_NAMES:
            self.calls.event(_EVENT_NAMES[type(told)], told)

    def _begin(self, kind: str, packet: Packet) -> None:
        """A worker serves, with its policy or without."""
        self.worker = packet.integer("pid")
        if kind == "refused":
            self._refuse(packet.text("text").removeprefix(f"policy {self._policy} "))
        else:
            self._ready = True
        # What its predecessor was asked may have died with it.
        if self._answered < self._asked:
            self._send(encode("ask", {"number": self._asked}))
        if self._end is not None:
            self._send(self._end)

    def _refuse(self, text: str) -> None:
        known, self._refusal = self._refusal, errors.PolicyNotLoaded(self._policy, text)
        self._ready = False
        if known is None or str(known) != str(self._refusal):
            self._log.error("external policy refused", error=text)

    def _repeat(self, packet: Packet) -> None:
        """Log what the worker has logged."""
        log = getattr(self._log, packet.text("level"), self._log.warning)
        log(packet.text("event"), **{**packet.packet("fields").fields, "worker": self.worker})

    def _count(self, packet: Packet) -> None:
        if packet.integer("pid") != self._current_pid:
            self._counters.add(self._current)
        self._current_pid = packet.integer("pid")
        self._current = unpack_counters(packet)
        self._open = packet
        self._answered = max(self._answered, packet.integer("answers"))

    def tell(self) -> None:
        """Something has changed."""
        self._news.set()
        self._news = trio.Event()

    # -- asking --------------------------------------------------------------------------------

    async def ready(self) -> None:
        """See `ExternalServer.ready`."""
        while not self._ready:
            if self._refusal is not None:
                raise self._refusal
            await self._more()

    async def refresh(self) -> None:
        """See `ExternalServer.refresh`."""
        self._asked += 1
        number = self._asked
        self._send(encode("ask", {"number": number}))
        while self._answered < number:
            await self._more()

    async def end(self, how: str, patience: float) -> None:
        """Have the worker deal with its open faults, for `patience` seconds, and wait for that."""
        self._end = encode("end", {"how": how, "patience": patience})
        self._send(self._end)
        while not self.said_end and not self.ended:
            await self._news.wait()

    async def _more(self) -> None:
        if self.ended:
            raise errors.DaemonClosed(f"{self._region.label} is served no more")
        await self._news.wait()

    # -- looking -------------------------------------------------------------------------------

    def add_counters(self, total: Counters) -> None:
        """See `ExternalServer.add_counters`."""
        total.add(self._counters)
        total.add(self._current)

    def open_faults(self) -> list[OpenFault]:
        """See `ExternalServer.open_faults`."""
        if self._open is None:
            return []
        return unpack_open_faults(self._open, self._region, time.perf_counter_ns())
