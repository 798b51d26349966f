"""Measures an access pattern from outside: whether it holds the GIL while it waits for a page, and
whether a system call does the waiting.

The observer is another process, so that it can answer whatever is held here.  For the first and the
last page that a pattern touches it asks for a sign of life before it answers, which takes the GIL;
and it reads what the thread is in: ``/proc/pid/task/tid/syscall`` begins with the number of the
system call, or with -1 for a thread that faulted by itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.hangs.pattern import HAS_GIL, PAGE, Guarded, Pattern, map_memory
from tests.hangs.patterns import PATTERNS
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.uapi.events import PageFault

_PATIENCE = 0.05
"""Seconds without a sign of life after which the GIL counts as held, where the table says so.
Where it says otherwise, the sign is waited for as long as it takes."""


class Measured(NamedTuple):
    """What was found out about a pattern."""

    held: bool
    system_call: bool
    wrote: bool

    @classmethod
    def expected(cls, pattern: Pattern) -> Measured:
        """What the table says."""
        return cls(HAS_GIL and pattern.gil == "held", pattern.system_call, pattern.writes)


def measure(names: list[str], *, patient: bool = True) -> dict[str, Measured]:
    """Run patterns in this process, with an observer forked off: before any thread is started.

    `patient`: the table is believed where it says that the GIL is released.
    """
    uffd = Userfaultfd.open(Features.THREAD_ID)
    ours, theirs = socket.socketpair()
    life, sign = socket.socketpair()
    observer = os.fork()
    if observer == 0:
        status = 1
        try:
            ours.close()
            sign.close()
            _Observer(uffd, theirs, life, patient=patient).run()
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    life.close()
    signs = threading.Thread(target=_give_signs, args=[sign], daemon=True)
    signs.start()
    found = {name: _measure(PATTERNS[name], uffd, ours) for name in names}
    ours.close()
    assert os.waitpid(observer, 0)[1] == 0
    signs.join()
    return found


def _give_signs(sock: socket.socket) -> None:
    with sock, suppress(ConnectionError):  # the observer has ended
        while byte := sock.recv(1):
            sock.sendall(byte)


def _measure(pattern: Pattern, uffd: Userfaultfd, sock: socket.socket) -> Measured:
    data = pattern.make_data()
    mapping, memory = map_memory(len(data))
    uffd.register(memory.start, len(data))
    _say(sock, [pattern.name, memory.start])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pattern.run(Guarded(memoryview(mapping), data, memory.start, mapping))
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    _say(sock, "done")
    found = _hear(sock)
    assert isinstance(found, dict), f"{pattern.name} touched nothing"
    return Measured(**found, wrote=memory.read(0, len(data)) != data)


def _say(sock: socket.socket, what: object) -> None:
    sock.sendall(json.dumps(what).encode())


def _hear(sock: socket.socket) -> object:
    """The next thing that was said; None at the end.  Each waits for its answer, or is short."""
    said = sock.recv(4096)
    return json.loads(said) if said else None


class _Observer:
    """The other process, which answers the faults."""

    def __init__(
        self, uffd: Userfaultfd, sock: socket.socket, life: socket.socket, *, patient: bool
    ) -> None:
        self._uffd = uffd
        self._sock = sock
        self._life = life
        self._patient = patient
        self._pid = os.getppid()
        self._asked = 0

    def run(self) -> None:
        while isinstance(said := _hear(self._sock), list):
            name, start = said
            _say(self._sock, self._observe(PATTERNS[name], start))

    def _observe(self, pattern: Pattern, start: int) -> dict[str, bool] | None:
        """Answer until the pattern is done, and then whatever it has not touched."""
        data = pattern.make_data()
        last = len(data) - PAGE
        held: list[bool] = []
        system_call: list[bool] = []
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._sock.fileno() in ready:
                assert _hear(self._sock) == "done"
                break
            for event in self._uffd.read_events():
                assert isinstance(event, PageFault), event
                system_call.append(self._in_a_system_call(event.thread))
                held.append(not self._lives(pattern))
                offset = (event.address - start) // PAGE * PAGE
                # The last page stays, to be asked for once more.
                end = len(data) if offset == last else last
                self._uffd.copy(start + offset, data[offset:end])
                if offset != last:
                    self._uffd.copy(start, data[:last])
        self._uffd.copy(start, data)
        if not held:
            return None
        return {"held": any(held), "system_call": any(system_call)}

    def _lives(self, pattern: Pattern) -> bool:
        """Whether a sign comes of what is asked now; signs of what was asked before may still."""
        certain = pattern.gil == "released" and self._patient
        self._asked = (self._asked + 1) % 256
        self._life.sendall(bytes([self._asked]))
        while certain or select.select([self._life], [], [], _PATIENCE)[0]:
            if self._life.recv(1)[0] == self._asked:
                return True
        return False

    def _in_a_system_call(self, thread: int) -> bool:
        text = Path(f"/proc/{self._pid}/task/{thread}/syscall").read_text("ascii")
        return not text.startswith("-1")
