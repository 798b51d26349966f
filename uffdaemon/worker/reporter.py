"""The worker's reports to the owner of the memory, sent without ever waiting for it.

The owner may read late, or never: the access whose fault is to be resolved may have stopped its
interpreter.  So statistics are sent as totals, and the next packet makes up for a lost one.
Resolved faults and events are queued up to a limit; those beyond it are counted as dropped.  Log
lines that the owner does not read in time are printed to standard error.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
import trio

from uffdaemon.external.protocol import (
    LIMIT,
    MAX_EVENTS,
    MAX_OPEN,
    MAX_RESOLVED,
    encode,
    pack_events,
    pack_failure,
    pack_resolved,
    pack_statistics,
    short,
)
from uffdaemon.external.supervisor import OwnerLog
from uffdaemon.hooks import Hooks

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from uffdaemon.daemon.daemon import Daemon
    from uffdaemon.hooks import Resolved
    from uffdaemon.journal.packet import Json
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import Event

T = TypeVar("T")

_BATCH: Final = 0.01
"""Seconds for which resolved faults are collected into one packet."""
_MIN_INTERVAL: Final = 0.1
_MAX_INTERVAL: Final = 1.0
"""Seconds between two packets of statistics: under load, and when nothing happens."""
_MAX_QUEUED: Final = 1 << 16
"""How many resolved faults, and how many events, are queued while the owner does not read."""
_MAX_PACKETS: Final = 1000
"""How many failures and log lines are queued then."""


class Reporter:
    """Sends the reports of one worker; `name` is that of its policy."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._name = name
        self._owner_log = OwnerLog(sock)
        self._wake = trio.Event()
        self._resolved: deque[Resolved] = deque()
        self._events: deque[Event] = deque()
        self._packets: deque[bytes] = deque()
        self._dropped = 0
        self._requested = 0
        """The number of the owner's last request for statistics; 0 if it has its reply."""
        self._counts: dict[str, Json] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    # -- collecting ----------------------------------------------------------------------------

    def hooks(self, *, resolved: bool, failures: bool, events: bool) -> Hooks:
        """Hooks that report to the owner what its own hooks ask for."""
        event = self._event if events else None
        return Hooks(
            after=self._after if resolved else None,
            failed=self._failed if failures else None,
            fork=event,
            remap=event,
            remove=event,
            unmap=event,
        )

    def _after(self, resolved: Resolved) -> None:
        self._queue(self._resolved, resolved)

    def _event(self, event: Event) -> None:
        self._queue(self._events, event)

    def _failed(self, fault: Fault, error: Exception) -> None:
        self._queue_packet(encode("failed", pack_failure(fault, error)))
        self._wake.set()

    def _queue(self, queue: deque[T], value: T) -> None:
        if len(queue) < _MAX_QUEUED:
            queue.append(value)
        else:
            self._dropped += 1
        self._wake.set()

    def log(
        self, logger: object, method: str, line: MutableMapping[str, object]
    ) -> MutableMapping[str, object]:
        """Send a log line to the owner: a processor of structlog."""
        del logger
        fields = {str(name): _plain(value) for name, value in line.items()}
        event = str(fields.pop("event", ""))
        packet = encode("log", {"level": method, "event": event, "fields": fields})
        words = "".join(f" {name}={value}" for name, value in fields.items())
        self._write_log(packet, f"{event}{words}")
        if self._token is not None:  # this is the thread of the log, or one of the policy
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._send_soon)
        raise structlog.DropEvent

    def ready(self) -> None:
        """Report that faults are being resolved."""
        self._packets.append(encode("ready", {"pid": os.getpid()}))

    def refused(self, text: str) -> None:
        """Report that the policy cannot be loaded."""
        self._write_log(encode("refused", {"pid": os.getpid(), "text": short(text)}), text)

    def _write_log(self, packet: bytes, text: str) -> None:
        line = f"uffdaemon: external policy {self._name}: {text}"
        if not self._owner_log.write(packet, line):
            self._queue_packet(packet)

    def _queue_packet(self, packet: bytes) -> None:
        if len(self._packets) < _MAX_PACKETS:
            self._packets.append(packet)

    def _send_soon(self) -> None:
        self._wake.set()

    def request(self, number: int) -> None:
        """Send statistics soon: the owner has requested them, with this number."""
        self._requested = number
        self._wake.set()

    # -- sending -------------------------------------------------------------------------------

    async def run(self, daemon: Daemon) -> None:
        """Send reports until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        pause = _MIN_INTERVAL
        counted = 0.0
        while True:
            with trio.move_on_after(pause):
                await self._wake.wait()
            self._wake = trio.Event()
            self._owner_log.check()
            self._flush()
            now = trio.current_time()
            if self._requested or now >= counted + _MIN_INTERVAL:
                counted = now
                new = self._send_statistics(daemon)
                pause = _MIN_INTERVAL if new else min(2 * pause, _MAX_INTERVAL)
            await trio.sleep(_BATCH)

    def finish(self, daemon: Daemon) -> None:
        """Send everything that is left, and "ended"."""
        self._flush()
        self._counts = {}
        self._send_statistics(daemon)
        self._send(encode("ended"))

    def owner_exited(self) -> None:
        """Print the log lines that the owner did not read before it exited."""
        self._owner_log.print_unread("has exited without reading its reports")

    def _flush(self) -> None:
        while self._packets and self._send(self._packets[0]):
            self._packets.popleft()
        _send_all(self._events, MAX_EVENTS, lambda some: self._send(pack_events(some)))
        _send_all(self._resolved, MAX_RESOLVED, lambda some: self._send(pack_resolved(some)))
        if self._dropped and self._send(encode("dropped", {"count": self._dropped})):
            self._dropped = 0

    def _send_statistics(self, daemon: Daemon) -> bool:
        """Send the statistics if they have changed or are requested.  Returns whether they have."""
        statistics, most = daemon.statistics(), MAX_OPEN
        counts = pack_statistics(statistics)
        new = counts != self._counts
        if not new and not self._requested:
            return False
        fields = {"pid": os.getpid(), "number": self._requested}
        while len(packet := encode("statistics", {**fields, **counts})) > LIMIT:
            most //= 2
            counts = pack_statistics(statistics, most)
        if self._send(packet):
            self._counts = counts
            self._requested = 0
        return new

    def _send(self, packet: bytes) -> bool:
        try:
            self._sock.send(packet, socket.MSG_DONTWAIT)
        except OSError:  # the socket is full, or the owner is gone
            return False
        return True


def _send_all(queue: deque[T], most: int, send: Callable[[list[T]], bool]) -> None:
    while queue:
        some = list(islice(queue, most))
        if not send(some):
            return
        for _ in some:
            queue.popleft()


def _plain(value: object) -> Json:
    return value if isinstance(value, int | float | None) else short(value)
