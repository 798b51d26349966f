"""What the daemon costs where nothing faults: memory for each page, processor time while idle.

Memory: all of a region of 16 GiB is touched, becomes zero pages, which take none themselves, and
is discarded again; the growth of the process's resident set is measured.  Allowed are 2 bits for
each page and 64 KiB.  Idle: a daemon whose region has just been touched is left alone for three
seconds.  Sleeping itself is charged on some machines, so a trio program that does nothing else
takes turns with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import cast

from benchmarks.build import ROOT
from benchmarks.rows import Row, compare, limit, script

LENGTH = 16 << 30
PAGE = 4096
ALLOWED = LENGTH // PAGE * 2 / 8 + (64 << 10)
IDLE = 3.0
"""Seconds."""
IDLE_TARGET = 1.2
"""Times what the program that only sleeps is charged."""


def _child(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_region", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    return cast("dict[str, float]", json.loads(done.stdout))


def measure(rounds: int) -> list[Row]:
    """Rows for memory and for idling."""
    weighed = _child("--weigh", str(LENGTH))  # the same each time
    idle, asleep = list[float](), list[float]()
    for number in range(rounds):
        turns = [("--idle", idle), ("--sleep", asleep)]
        for option, charged in turns if number % 2 else reversed(turns):
            charged.append(_child(option, str(IDLE))["cpu_s"] * 1e3)
    pages = LENGTH // PAGE
    memory = limit(
        f"memory of a region of {pages:,} pages",
        [weighed["resident"] / 1024],
        unit="KiB",
        against="2 bits a page + 64 KiB",
        cores="any core",
        target=ALLOWED / 1024,
        note=f"{weighed['resident'] * 8 / pages:.3f} bits a page, page tables left out",
    )
    resting = compare(
        f"processor time in {IDLE:g} idle seconds",
        idle,
        asleep,
        against="a trio program that sleeps",
        cores="any core",
        target=IDLE_TARGET,
        unit="ms",
    )
    return [memory, resting]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
