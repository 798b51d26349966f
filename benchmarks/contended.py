"""Faults back-to-back while another process computes without end on the handler's core.

Reading again yields the processor, and whoever else wants it has it for a time slice then, which
is milliseconds; a sleeper that a fault wakes gets it at once.  So the daemon must notice, and
sleep.  The row is for information: that it does not cost a hundred times as much.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.rows import Row, compare, script
from benchmarks.turns import Client, alternate, ours, placements, sleeping

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = Client(pages=1200, warm=200)


@contextmanager
def _busy(core: int) -> Iterator[None]:
    program = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        try:
            if other.stdout is not None:
                other.stdout.readline()
            yield
        finally:
            other.kill()


def measure(rounds: int) -> list[Row]:
    """One row for each placement."""
    sides = [ours(), sleeping()]
    rows = []
    for place, cores in placements().items():
        with _busy(cores.handler):
            measured = alternate(sides, CLIENT, cores, rounds)
        mine, theirs = (measured[side.name] for side in sides)
        rows.append(
            compare(
                f"back-to-back, the handler's core contended, {place}",
                [turn["p50_us"] for turn in mine],
                [turn["p50_us"] for turn in theirs],
                against=sides[1].name,
                cores=str(cores),
                p99=[turn["p99_us"] for turn in mine],
            )
        )
    return rows


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
