"""One turn: a handler and the client that faults, each a process; and turns that alternate."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NotRequired, Self, TypedDict, cast

from benchmarks.build import ROOT, program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = 4096
DEADLINE = 60.0
"""Seconds that the client of one turn may take before it is killed."""


GRACE = 2.0
"""Seconds in which a handler may say what was wrong."""


class TurnFailed(Exception):
    """A side died, took too long, or delivered wrong pages."""


class Seen(TypedDict):
    """What the client writes at its end; see benchmarks/native/toucher.c."""

    pages: int
    wrong: int
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    wall_us_per_page: float
    handler_cpu_us_per_page: float
    present_us: NotRequired[float]
    """What the same access takes where the page is there already, if it is not next to nothing."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the sides run."""

    client: int
    handler: int
    spread: bool = False
    """Whether the client's threads are on both of them, one here, one there."""
    free: bool = False
    """Whether the handler may run on either of them, where the kernel or itself sees fit."""

    def __str__(self) -> str:
        client = f"{self.client}+{self.handler}" if self.spread else f"{self.client}"
        return f"client {client}, handler {'free' if self.free else self.handler}"

    def client_words(self) -> list[str]:
        """For the toucher's command line."""
        return ["--cpu", f"{self.client},{self.handler}" if self.spread else str(self.client)]

    def handler_words(self, option: str = "--cpu") -> list[str]:
        """For the handler's command line."""
        return [] if self.free else [option, str(self.handler)]


def placements() -> dict[str, Cores]:
    """The placements that this machine has: on the same core and, with two, on different ones."""
    cores = sorted(os.sched_getaffinity(0))
    result = {"same core": Cores(cores[0], cores[0])}
    if len(cores) > 1:
        result["different cores"] = Cores(cores[0], cores[1])
    return result


@dataclass(frozen=True, slots=True)
class Client:
    """What the client maps and touches."""

    pages: int
    """How many pages are touched, each once."""
    warm: int
    """The first so many are not timed."""
    regions: int = 1
    length: int = 0
    """Bytes of one region; 0: as many as are touched."""
    windows: int = 1
    """In how many parts of each region the touched pages lie, evenly spread."""
    threads: int = 1
    gap_us: int = 0
    """Microseconds that the client sleeps before each touch."""
    sequential: bool = False

    @property
    def region_length(self) -> int:
        """Bytes of one region."""
        return self.length or self.pages // self.regions * PAGE

    def arguments(self) -> list[str]:
        """For the toucher's command line."""
        values = {
            "--pages": self.pages,
            "--warm": self.warm,
            "--regions": self.regions,
            "--length": self.region_length,
            "--windows": self.windows,
            "--threads": self.threads,
            "--gap-us": self.gap_us,
        }
        result = [word for name, value in values.items() for word in (name, str(value))]
        return [*result, "--sequential"] if self.sequential else result

    def touched(self) -> Iterator[int]:
        """The numbers of the image's pages that are touched, in no order."""
        per_window = self.pages // (self.regions * self.windows)
        spacing = self.region_length // self.windows // PAGE
        for region in range(self.regions):
            for window in range(self.windows):
                first = region * self.region_length // PAGE + window * spacing
                yield from range(first, first + per_window)


@dataclass(frozen=True, slots=True)
class Side:
    """A handler: the words that start it, to which socket, image and core are added."""

    name: str
    command: tuple[str, ...]

    def answer(self, client: Client, cores: Cores, image: int) -> Seen:
        """Answer `client` once, in a process of its own.  Raises `TurnFailed`."""
        return take_turn(self, client, cores, image)

    def with_words(self, name: str, *words: str) -> Self:
        """The same under another name, with more words."""
        return replace(self, name=name, command=(*self.command, *words))


def sleeping(*arguments: str) -> Side:
    """The yardstick that sleeps in poll after every answer."""
    return Side("C poll+read+COPY", (str(program("yardstick")), *arguments))


def rereading(rereads: int) -> Side:
    """The yardstick that reads again, `rereads` times, before it sleeps."""
    command = (str(program("yardstick")), "--rereads", str(rereads))
    return Side(f"C re-reading {rereads} times", command)


def ours(*arguments: str) -> Side:
    """The library in a process of its own."""
    return Side("uffdaemon", (sys.executable, "-m", "benchmarks.handler", *arguments))


@contextmanager
def image_for(client: Client) -> Iterator[int]:
    """A file in memory, as long as the client's regions together, whose touched pages begin with
    their number plus one.  Yields its descriptor."""
    descriptor = os.memfd_create("benchmark-image", 0)
    try:
        os.ftruncate(descriptor, client.regions * client.region_length)
        for page in client.touched():
            os.pwrite(descriptor, struct.pack("<Q", page + 1), page * PAGE)
        yield descriptor
    finally:
        os.close(descriptor)


def take_turn(side: Side, client: Client, cores: Cores, image: int) -> Seen:
    """Let `side` answer `client` once.  Raises `TurnFailed`."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        command = [*side.command, "--socket", str(far.fileno())]
        command += ["--image", f"/proc/self/fd/{image}", *cores.handler_words()]
        handler = subprocess.Popen(
            command,
            cwd=ROOT,
            pass_fds=[far.fileno(), image],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # Only the sides may hold the sockets, or neither would see the other's end.
        far.close()
        try:
            seen = _touch(client, cores, near)
        except (subprocess.SubprocessError, TurnFailed) as error:
            near.close()
            try:
                _, complaint = handler.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:
                handler.kill()
                _, complaint = handler.communicate()
            raise TurnFailed(f"{side.name}: {error}\n{complaint.decode()}") from error
        # One that looks after its socket sees the end of it; the yardstick waits for the signal.
        near.close()
        handler.terminate()
        _, complaint = handler.communicate(timeout=DEADLINE)
    if handler.returncode != 0 or seen["wrong"]:
        raise TurnFailed(
            f"{side.name}: status {handler.returncode}, {seen['wrong']} wrong pages\n"
            f"{complaint.decode()}"
        )
    return seen


def _touch(client: Client, cores: Cores, sock: socket.socket | None) -> Seen:
    command = [str(program("toucher")), *client.arguments(), *cores.client_words()]
    descriptors = []
    if sock is not None:
        descriptors.append(sock.fileno())
        command += ["--socket", str(sock.fileno())]
    done = subprocess.run(
        command, pass_fds=descriptors, stdout=subprocess.PIPE, timeout=DEADLINE, check=True
    )
    return parse_seen(done.stdout)


def parse_seen(text: bytes) -> Seen:
    """What a client has written: its last line, for some peers log on standard output, too.
    Raises `TurnFailed`."""
    try:
        return cast("Seen", json.loads(text.splitlines()[-1]))
    except (IndexError, ValueError) as error:
        raise TurnFailed(f"the client wrote {text[-100:]!r} where its figures belong") from error


def touch_unguarded(client: Client, cores: Cores) -> Seen:
    """Let the kernel serve the client's faults itself."""
    return _touch(client, cores, None)


def alternate(
    sides: Sequence[Side], client: Client, cores: Cores, rounds: int
) -> Mapping[str, list[Seen]]:
    """Let the sides take turns, `rounds` times; what the client saw, by side.

    Each round begins with another side, so that nobody always comes after the same one.
    """
    result: dict[str, list[Seen]] = {side.name: [] for side in sides}
    with image_for(client) as image:
        for number in range(rounds):
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                result[side.name].append(side.answer(client, cores, image))
    return result
