"""What the worker of an external policy tells the owner of the memory, without ever waiting for it.

The owner may read late, or never: its interpreter may be stopped by the very access that is to be
answered.  So counts are sent as they stand, and the next ones say it all once more; endings and
events are kept, up to a limit, and those beyond are counted; what must be known is printed.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
import trio

from uffdaemon.external.protocol import (
    LIMIT,
    MAX_ENDINGS,
    MAX_EVENTS,
    MAX_OPEN,
    Json,
    encode,
    pack_endings,
    pack_events,
    pack_failure,
    pack_statistics,
    short,
)
from uffdaemon.external.supervisor import Lines
from uffdaemon.hooks import Hooks

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from uffdaemon.daemon.daemon import Daemon
    from uffdaemon.hooks import Resolved
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import Event

T = TypeVar("T")

_BATCH: Final = 0.01
"""Seconds that endings are collected for."""
_FRESH: Final = 0.1
_SLOW: Final = 1.0
"""Seconds between two looks at the counts: at least, and when nothing happens."""
_KEPT: Final = 1 << 16
"""How many endings, and how many events, wait for an owner who does not read."""
_TOLD: Final = 1000
"""How many failures and lines of the log do."""


class Reporter:
    """Speaks for one worker; `name` is its policy's."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._name = name
        self._lines = Lines(sock)
        self._wanted = trio.Event()
        self._endings: deque[Resolved] = deque()
        self._events: deque[Event] = deque()
        self._packets: deque[bytes] = deque()
        self._dropped = 0
        self._asked = 0
        self._counts: dict[str, Json] = {}

    # -- what there is to tell -----------------------------------------------------------------

    def hooks(self, *, endings: bool, failures: bool, happened: bool) -> Hooks:
        """Hooks that have the owner told of what its own hooks want to know."""
        event = self._event if happened else None
        return Hooks(
            after=self._after if endings else None,
            failed=self._failed if failures else None,
            fork=event,
            remap=event,
            remove=event,
            unmap=event,
        )

    def _after(self, resolved: Resolved) -> None:
        self._keep(self._endings, resolved)

    def _event(self, event: Event) -> None:
        self._keep(self._events, event)

    def _failed(self, fault: Fault, error: Exception) -> None:
        self._keep_packet(encode("failed", pack_failure(fault, error)))
        self._wanted.set()

    def _keep(self, queue: deque[T], value: T) -> None:
        if len(queue) < _KEPT:
            queue.append(value)
        else:
            self._dropped += 1
        self._wanted.set()

    def log(
        self, logger: object, method: str, line: MutableMapping[str, object]
    ) -> MutableMapping[str, object]:
        """The processor of structlog that has the owner log a line of this process."""
        del logger
        fields = {str(name): _plain(value) for name, value in line.items()}
        event = str(fields.pop("event", ""))
        packet = encode("log", {"level": method, "event": event, "fields": fields})
        words = "".join(f" {name}={value}" for name, value in fields.items())
        self._say(packet, f"{event}{words}")
        if trio.lowlevel.in_trio_run():  # else it is a thread of the policy's
            self._wanted.set()
        raise structlog.DropEvent

    def ready(self) -> None:
        """Faults are being answered."""
        self._packets.append(encode("ready", {"pid": os.getpid()}))

    def refused(self, text: str) -> None:
        """The policy cannot be had."""
        self._say(encode("refused", {"pid": os.getpid(), "text": short(text)}), text)

    def _say(self, packet: bytes, text: str) -> None:
        line = f"uffdaemon: external policy {self._name}: {text}"
        if not self._lines.say(packet, line):
            self._keep_packet(packet)

    def _keep_packet(self, packet: bytes) -> None:
        if len(self._packets) < _TOLD:
            self._packets.append(packet)

    def ask(self, number: int) -> None:
        """The owner wants to know the counts; `number` is that of its question."""
        self._asked = number
        self._wanted.set()

    # -- telling it ----------------------------------------------------------------------------

    async def run(self, daemon: Daemon) -> None:
        """Tell it now and then, until cancelled."""
        pause = _FRESH
        counted = 0.0
        while True:
            with trio.move_on_after(pause):
                await self._wanted.wait()
            self._wanted = trio.Event()
            self._lines.check()
            self._flush()
            now = trio.current_time()
            if self._asked or now >= counted + _FRESH:
                counted = now
                pause = _FRESH if self._count(daemon) else min(2 * pause, _SLOW)
            await trio.sleep(_BATCH)

    def finish(self, daemon: Daemon) -> None:
        """Tell all that is left, and that this is all."""
        self._flush()
        self._counts = {}
        self._count(daemon)
        self._send(encode("ended"))

    def unheard(self) -> None:
        """The owner has ended, and has not taken all that it was told."""
        self._lines.show("has ended")

    def _flush(self) -> None:
        while self._packets and self._send(self._packets[0]):
            self._packets.popleft()
        _send_all(self._events, MAX_EVENTS, lambda some: self._send(pack_events(some)))
        _send_all(self._endings, MAX_ENDINGS, lambda some: self._send(pack_endings(some)))
        if self._dropped and self._send(encode("dropped", {"count": self._dropped})):
            self._dropped = 0

    def _count(self, daemon: Daemon) -> bool:
        """Send the counts if there are new ones, or if they are asked for; whether there were."""
        statistics, most = daemon.statistics(), MAX_OPEN
        counts = pack_statistics(statistics)
        new = counts != self._counts
        if not new and not self._asked:
            return False
        fields = {"pid": os.getpid(), "answers": self._asked}
        while len(packet := encode("statistics", {**fields, **counts})) > LIMIT:
            most //= 2
            counts = pack_statistics(statistics, most)
        if self._send(packet):
            self._counts = counts
            self._asked = 0
        return new

    def _send(self, packet: bytes) -> bool:
        try:
            self._sock.send(packet, socket.MSG_DONTWAIT)
        except OSError:  # it is full, or the owner is gone
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
