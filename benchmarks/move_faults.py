"""Sixteen neighbouring pages asked for by faults, and moved together for the first of them.

A thread of this process reads one page after the other; the daemon runs `FaultAround` of 16 pages
over `StrictMove`, and takes turns with a handler in C that does nothing but read, and answer each
fault with one MOVE of 64 KiB.  The figure is wall time for sixteen pages.  Handler and toucher are
on one core; on the other one a thread of the same process runs, which every MOVE has to interrupt.
"""

from __future__ import annotations

import os
from array import array
from contextlib import ExitStack
from threading import Thread

import trio

from benchmarks.moving import SIXTEEN, surroundings
from benchmarks.rows import Row, compare, script
from benchmarks.turns import PAGE, TurnFailed, placements
from benchmarks.yardsticks import call, library, move_each
from uffdaemon import FaultAround, Memory, StrictMove, open_daemon
from uffdaemon.lowlevel import Features, Userfaultfd

GROUPS = 512
LENGTH = GROUPS * SIXTEEN
TARGET = 1.2
WIDE = 64
"""Pages of a wider window: a fault costs about as much as a MOVE, and so is shared by more."""


def _prepared(stack: ExitStack) -> tuple[Memory, Memory]:
    source = stack.enter_context(Memory.map(LENGTH, dont_fork=True))
    target = stack.enter_context(Memory.map(LENGTH, dont_fork=True))
    source.write(0, b"\1" * LENGTH)
    return source, target


def by_daemon(pages: int) -> float:
    """µs for sixteen pages, when each fault brings `pages` of them."""

    async def serve() -> int:
        async with open_daemon() as daemon:
            policy = FaultAround(StrictMove(source), pages)
            daemon.guard(target, policy, features=Features.MOVE)
            await trio.lowlevel.checkpoint()
            taken = await trio.to_thread.run_sync(call, "touch", target.start, LENGTH, core)
        # Whoever touches goes on before the fault has been counted; at the end all have been.
        faults = sum(daemon.statistics().faults.values())
        if faults != LENGTH // PAGE // pages:
            raise TurnFailed(f"{faults} faults where {LENGTH // PAGE // pages} were due")
        return taken

    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        source, target = _prepared(stack)
        return trio.run(serve) / GROUPS / 1000


def by_c() -> float:
    """The same by the handler in C."""
    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        source, target = _prepared(stack)
        uffd = stack.enter_context(Userfaultfd.open(Features.MOVE))
        uffd.register(target.start, LENGTH)
        stop = os.eventfd(0)
        stack.callback(os.close, stop)
        addresses = (target.start, source.start, SIXTEEN)
        handler = Thread(target=call, args=("answer", uffd.fileno(), stop, *addresses, core))
        handler.start()
        taken = call("touch", target.start, LENGTH, core)
        os.eventfd_write(stop, 1)
        handler.join()
        return taken / GROUPS / 1000


def bare() -> float:
    """The same moves without anybody faulting."""
    with ExitStack() as stack:
        source, target = _prepared(stack)
        uffd = stack.enter_context(Userfaultfd.open(Features.MOVE))
        uffd.register(target.start, LENGTH)
        moves = array(
            "Q",
            [
                number
                for at in range(0, LENGTH, SIXTEEN)
                for number in (target.start + at, source.start + at, SIXTEEN)
            ],
        )
        return move_each(uffd.fileno(), moves) / GROUPS / 1000


def measure(rounds: int) -> list[Row]:
    """Against a handler in C; against a bare MOVE; and with wider windows against that."""
    if "different cores" not in placements():
        return []
    library()  # compiled before anything is timed
    ours, wide, theirs, moves = list[float](), list[float](), list[float](), list[float]()
    with surroundings(running=True) as cores:
        for _ in range(rounds):
            ours.append(by_daemon(16))
            wide.append(by_daemon(WIDE))
            theirs.append(by_c())
            moves.append(bare())
    name = "16 neighbours by faults, another thread running"
    return [
        compare(
            name, ours, theirs, against="C: MOVE of 64 KiB a fault", cores=cores, target=TARGET
        ),
        compare(name, ours, moves, against="one MOVE of 64 KiB in C, no fault", cores=cores),
        compare(
            f"{name}, {WIDE} pages a fault",
            wide,
            moves,
            against="one MOVE of 64 KiB in C, no fault",
            cores=cores,
            target=TARGET,
        ),
    ]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
