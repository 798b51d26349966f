"""Processes that touch memory which their own trio loop guards, and that may hang for good."""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import signal
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import trio

from tests.hangs.pattern import Guarded, Pattern, map_memory
from tests.hangs.patterns import PATTERNS
from uffdaemon import BytesSource, Fault, Watchdog, actions, open_daemon

if TYPE_CHECKING:
    from uffdaemon.actions import Action

A_FEW = ["memoryview_index", "ctypes_string_at", "numpy_scalar_index", "background_thread"]
"""Patterns of different kinds, for what takes a process each."""


@dataclass(frozen=True)
class InPython:
    """A policy of one's own, which nothing but Python can answer for."""

    data: bytes

    def __call__(self, fault: Fault) -> Action | None:
        return actions.Copy(BytesSource(self.data))


@dataclass(frozen=True)
class StopsTheWorld(InPython):
    """The same, but it first waits until every other thread stands still."""

    def __call__(self, fault: Fault) -> Action | None:
        gc.collect()
        return super().__call__(fault)


@dataclass(frozen=True)
class WaitsForEver(InPython):
    """The same, but it waits for something that does not come, with the GIL released."""

    def __call__(self, fault: Fault) -> Action | None:
        threading.Event().wait()
        return super().__call__(fault)


class Toucher:
    """A fork of this process, in which a worker thread touches memory of one region.

    To be made before this process has started any thread.
    """

    def __init__(
        self, name: str, watchdog: Watchdog | None, policy: type[InPython] = InPython
    ) -> None:
        self.pattern = PATTERNS[name]
        self._hand, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe()
        self._text = ""
        self.pid = os.fork()
        if self.pid == 0:
            self._hand.close()
            os.dup2(stderr, 2)
            _touch(self.pattern, policy, watchdog, theirs)
        theirs.close()
        os.close(stderr)
        self._told = struct.Struct("=qQ")
        self.thread, self.address = self._told.unpack(self._hand.recv(self._told.size))
        """Which thread is about to touch, and where the memory begins."""

    def touch(self) -> None:
        """Let it go ahead."""
        self._hand.sendall(b"!")

    def read_until(self, pattern: str) -> str:
        """Wait until standard error has a match for `pattern`; all that there is by then.

        Fails at its end.
        """
        while not re.search(pattern, self._text):
            more = os.read(self._stderr, 4096)
            assert more, f"no {pattern!r} in {self._text!r}"
            self._text += more.decode()
        return self._text

    def read_all(self) -> str:
        """Standard error to its end."""
        while more := os.read(self._stderr, 4096):
            self._text += more.decode()
        return self._text

    def told_by_the_watchdog(self) -> None:
        """The watchdog says which thread waits, where, and what Python was doing."""
        self.read_until(r"uffdaemon.*\n")
        self.read_until(rf"in {self.pattern.name}\n")
        assert self.names_the_place(), self.read_until("")

    def running(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def status(self) -> int:
        """Wait for its end: its exit status, or the negative number of the signal."""
        self._hand.close()
        os.close(self._stderr)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """For one that hangs."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.status() == -signal.SIGKILL

    def names_the_place(self) -> bool:
        """Whether standard error has an address of the memory, and the thread."""
        addresses = [int(found, 16) for found in re.findall(r"0x[0-9a-f]+", self._text)]
        end = self.address + len(self.pattern.make_data())
        # A pattern with a thread of its own has another one touch.
        told = re.search(rf"\b{self.thread}\b", self._text) or "thread" in self.pattern.name
        return bool(told) and any(self.address <= found < end for found in addresses)


def _touch(
    pattern: Pattern, policy: type[InPython], watchdog: Watchdog | None, hand: socket.socket
) -> NoReturn:
    faulthandler.disable()  # the watchdog has to say it
    data = pattern.make_data()
    mapping, memory = map_memory(len(data))

    def touch() -> None:
        hand.sendall(struct.pack("=qQ", threading.get_native_id(), memory.start))
        hand.recv(1)
        pattern.run(Guarded(memoryview(mapping), data, memory.start, mapping))

    async def main() -> None:
        async with open_daemon(watchdog=watchdog) as daemon:
            daemon.guard(memory, policy(data), placement="in_process")
            await trio.to_thread.run_sync(touch)

    status = 1
    try:
        trio.run(main)
        status = 0
    finally:
        os._exit(status)
