"""A million faults, each forwarded to trio: none may be lost, and memory must stay flat.

Memory of this process is guarded in the native placement with a policy of its own, which only
Python can ask, so that the resolver answers nothing itself.  Eight threads of a loop in C touch
pages and discard them again.  As many outcomes as touches must have been counted in the end, and
after the first twentieth the process may not grow by more than a MiB.

As a script it ends with status 1 where either is not so.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypedDict, cast

import trio

from benchmarks.build import ROOT
from benchmarks.in_process import library
from benchmarks.one_region import resident
from benchmarks.rows import Row, limit, print_table
from benchmarks.turns import PAGE, TurnFailed
from uffdaemon import Fault, Memory, actions, open_daemon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffdaemon.actions import Action

THREADS = 8
PAGES = 250
"""Of each thread, which it touches again and again."""
TIMES = 25
"""How often between two looks at the process."""
LOOKS = 20
TOUCHES = THREADS * PAGES * TIMES * LOOKS
GROWTH_ALLOWED = 1 << 20
"""Bytes."""
PATIENCE = 600.0
"""Seconds."""


class Forwarded(TypedDict):
    """What was seen."""

    outcomes: int
    resident: list[int]
    """Bytes of the process in memory, at each look."""
    seconds: float


def decide(fault: Fault) -> Action:
    """A policy of one's own."""
    del fault
    return actions.Zero()


def _again(start: int) -> None:
    number = library().in_process_again(
        ctypes.c_uint64(start), ctypes.c_uint64(PAGES * PAGE), ctypes.c_uint64(TIMES)
    )
    if number < 0:
        raise OSError(-number, f"touching again: {os.strerror(-number)}")


async def forward() -> Forwarded:
    """Touch and discard; raises whatever the daemon raises."""
    seen: list[int] = []
    with Memory.map(THREADS * PAGES * PAGE) as memory:
        async with open_daemon() as daemon:
            daemon.guard(memory, decide, placement="native", resolver="thread")
            begun = time.monotonic()
            for _ in range(LOOKS):
                async with trio.open_nursery() as nursery:
                    for thread in range(THREADS):
                        start = memory.start + thread * PAGES * PAGE
                        nursery.start_soon(trio.to_thread.run_sync, _again, start)
                gc.collect()
                seen.append(resident())
            taken = time.monotonic() - begun
        # Whoever touches goes on before the fault has been counted; at the end all have been.
        return {"outcomes": daemon.statistics().resolved, "resident": seen, "seconds": taken}


def rows_of(seen: Forwarded) -> list[Row]:
    """Three rows: what was lost, what the process grew by, what a fault took."""
    grown = max(seen["resident"]) - seen["resident"][0]
    name = f"{TOUCHES:,} forwarded faults"
    return [
        limit(
            f"{name}, outcomes missing or too many",
            [float(abs(TOUCHES - seen["outcomes"]))],
            unit="faults",
            against="none",
            cores="any core",
            target=0,
        ),
        limit(
            f"{name}, growth after the first {TOUCHES // LOOKS:,}",
            [grown / 1024],
            unit="KiB",
            against="nothing, to a MiB",
            cores="any core",
            target=GROWTH_ALLOWED / 1024,
        ),
        limit(
            f"{name} from {THREADS} threads, wall a fault",
            [seen["seconds"] * 1e6 / TOUCHES],
            unit="µs",
            against="",
            cores="any core",
        ),
    ]


def measure(rounds: int) -> list[Row]:
    """The same, in a process of its own.  Raises `TurnFailed` with what it complained of."""
    del rounds  # a million is enough
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.forwarding", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if not done.stdout:
        raise TurnFailed(f"forwarding ended with status {done.returncode}\n{done.stderr}")
    return rows_of(cast("Forwarded", json.loads(done.stdout)))


def main(arguments: Sequence[str]) -> int:
    """Measure here; the exit status."""
    seen = trio.run(forward)
    rows = rows_of(seen)
    if "--json" in arguments:
        json.dump(seen, sys.stdout)
    else:
        print_table(rows)
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
