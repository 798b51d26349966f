"""The state that one worker of an external policy leaves to the next.

A worker may be killed at any moment, so the state is kept outside it.  The page book is in a
memory file that the workers write in place.  The supervisor keeps where the segments of the region
are after mremap(2) and munmap(2), and the userfaultfds of forked children, which would read zeros
if their last descriptor were closed.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from copy import copy
from typing import TYPE_CHECKING

import structlog
import trio

from uffdaemon.external.protocol import LIMIT
from uffdaemon.hooks import Hooks
from uffdaemon.journal.packet import Packet
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.log import Log, LogThread
from uffdaemon.model.page_map import PageMap
from uffdaemon.model.region_table import RegionTable, Segment

if TYPE_CHECKING:
    from uffdaemon.daemon.daemon import Daemon
    from uffdaemon.model.region import Region
    from uffdaemon.native.page_book import PageBook
    from uffdaemon.uapi.events import Event


class SavedState:
    """Takes over the state of the last worker, and sends changes of it to the supervisor.

    Set `daemon` before anything is served.
    """

    daemon: Daemon
    _pages: PageMap
    """The pages of the owner's region."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._log = Log(structlog.stdlib.get_logger("uffdaemon"), LogThread())
        self._numbers: dict[Userfaultfd, int] = {}
        """The supervisor's number for each userfaultfd; 0 is the owner's."""
        self._last = 0
        self._known: dict[int, list[list[int]]] = {}
        self.hooks: Hooks = Hooks(fork=self._event, remap=self._event, unmap=self._event)

    def load(self, uffd: Userfaultfd, region: Region) -> dict[Userfaultfd, RegionTable]:
        """What to serve: the region of `uffd`, with its current segments, and forked children."""
        table = RegionTable()
        table.add(region)
        served = {uffd: table}
        self._numbers[uffd] = 0
        self._pages = region.pages
        while True:
            message, control, _, _ = self._sock.recvmsg(
                LIMIT, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC
            )
            if message in (b"all", b""):
                return served
            packet = Packet.decode(message)
            number = packet.integer("number")
            pages = region.pages
            fds = [fd for *_, data in control for (fd,) in struct.iter_unpack("=i", data)]
            whose = uffd
            if number:
                child, book = fds
                pages = PageMap(region.pages.pages, file=book)
                os.close(book)
                whose = Userfaultfd.adopt(child)
                self._numbers[whose] = number
                self._last = max(self._last, number)
            self._known[number] = [
                [number for number in part if isinstance(number, int)]
                for part in packet.items("segments")
                if isinstance(part, list)
            ]
            served[whose] = RegionTable.of(
                Segment(start, end, _moved(region, origin, pages))
                for start, end, origin in self._known[number]
            )

    def _event(self, event: Event) -> None:
        """Send the change once this turn of the loop has applied it."""
        del event
        trio.lowlevel.current_trio_token().run_sync_soon(self._send_changes, idempotent=True)

    def _send_changes(self) -> None:
        """Send the supervisor what has changed since the last call."""
        served = self.daemon.served()
        for uffd in [uffd for uffd in self._numbers if uffd not in served]:
            number = self._numbers.pop(uffd)
            if number:
                self._known.pop(number, None)
                self._send(number, None)
        for uffd, table in served.items():
            segments = [[s.start, s.end, s.region.start] for s in table]
            if uffd not in self._numbers:
                self._last += 1
                self._numbers[uffd] = self._last
                self._send(self._last, segments, uffd.fileno(), self._child_book(table).fileno())
            elif self._known.get(self._numbers[uffd]) != segments:
                self._send(self._numbers[uffd], segments)
            self._known[self._numbers[uffd]] = segments

    def _child_book(self, table: RegionTable) -> PageBook:
        """The page book of a child, which is in a memory file like its parent's."""
        for segment in table:
            return segment.region.pages.book
        return self._pages.book  # the child has no segments: it is never read

    def _send(self, number: int, segments: list[list[int]] | None, *fds: int) -> None:
        message = json.dumps({"number": number, "segments": segments}).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
        try:
            if len(message) > LIMIT:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._sock.sendmsg([message], [rights] if fds else [], socket.MSG_DONTWAIT)
        except OSError as error:
            # The supervisor was killed, or there are more segments than fit into a message.
            self._log.error("state for the next worker not saved", error=str(error))


def _moved(region: Region, start: int, pages: PageMap) -> Region:
    """The same region with another start."""
    moved = copy(region)
    moved.start, moved.pages = start, pages
    return moved
