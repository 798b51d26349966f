"""Our side of a turn: a daemon in a process of its own, that copies from a mapped image.

Gets a connected Unix socket as ``--socket``, over it the client's userfaultfd and where its
memory lies (see benchmarks/native/toucher.c), and answers until the socket ends.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import socket
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import trio

from uffdaemon import (
    ByRange,
    BytesSource,
    CopyFrom,
    FaultAround,
    Policy,
    Region,
    Source,
    open_daemon,
)
from uffdaemon.daemon.entry import REREADS
from uffdaemon.lowlevel import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Sequence

POPULATE_READ = 22
"""MADV_POPULATE_READ, which the mmap module does not name: madvise(2)."""


class Handed(TypedDict):
    """What the client says about its memory."""

    regions: list[tuple[int, int]]
    """(start, length) in bytes; in the image they lie one after the other."""
    windows: list[tuple[int, int]]
    """(offset, length) of the parts of the image that it will touch."""


def map_image(path: str, handed: Handed) -> mmap.mmap:
    """Map the image and bring in the parts that will be needed."""
    length = sum(length for _, length in handed["regions"])
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        image = mmap.mmap(descriptor, length, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    for offset, window in handed["windows"]:
        image.madvise(POPULATE_READ, offset, window)
    return image


class Options(argparse.Namespace):
    """The command line."""

    socket: int
    image: str
    cpu: int | None
    around: int
    rereads: int
    own_policy: bool
    resolver: Literal["loop", "thread"]
    rules: int


def divided(sources: Sequence[Source], length: int, rules: int) -> Policy:
    """A copy of `length` bytes in so many ranges, from sources that hold the same in turns."""
    piece = length // rules // mmap.PAGESIZE * mmap.PAGESIZE
    copies = [CopyFrom(source) for source in sources]
    ranges: list[tuple[int, int, Policy]] = [
        (n * piece, piece, copies[n % len(copies)]) for n in range(rules - 1)
    ]
    end = (rules - 1) * piece
    return ByRange([*ranges, (end, length - end, copies[(rules - 1) % len(copies)])])


def policy_of(copy: CopyFrom, second: Source, length: int, options: Options) -> Policy:
    """The policy that is measured."""
    if options.rules > 1:
        return divided((copy.source, second), length, options.rules)
    if options.own_policy:
        # It decides the same, but only Python can tell.
        return copy.__call__
    return FaultAround(copy, pages=options.around) if options.around > 1 else copy


async def serve(sock: socket.socket, options: Options) -> None:
    """Answer the client's faults until it closes the socket."""
    uffd, message = Userfaultfd.receive(sock)
    handed = cast("Handed", json.loads(message))
    source = BytesSource(map_image(options.image, handed))
    second = BytesSource(map_image(options.image, handed))
    async with open_daemon(rereads=options.rereads) as daemon:
        offset = 0
        for start, length in handed["regions"]:
            policy = policy_of(CopyFrom(source, offset), second, length, options)
            region = Region(start, length, policy)
            daemon.add_region(uffd, region, register=None, resolver=options.resolver)
            offset += length
        sock.send(b"go %d\n" % os.getpid())
        await trio.lowlevel.wait_readable(sock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=int, required=True, metavar="FD")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--cpu", type=int, metavar="CORE")
    parser.add_argument("--around", type=int, default=1, metavar="PAGES")
    parser.add_argument("--rereads", type=int, default=REREADS, metavar="TIMES")
    parser.add_argument("--own-policy", action="store_true", help="ask a Python function")
    parser.add_argument("--resolver", choices=("loop", "thread"), default="loop")
    parser.add_argument(
        "--rules", type=int, default=1, help="divide the memory into so many ranges"
    )
    options = parser.parse_args(namespace=Options())
    # The end of the socket is the end; the harness's SIGTERM, meant for the yardstick, may follow.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    with socket.socket(fileno=options.socket) as sock:
        trio.run(serve, sock, options)


if __name__ == "__main__":
    main()
