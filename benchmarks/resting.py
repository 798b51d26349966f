"""What the daemon costs where nothing faults: memory for each page, processor time while idle.

Memory: a region of 16 GiB is filled with zero pages, which take none themselves, and the growth of
the process is measured as its allocators see it (tracemalloc) and as the kernel does (resident
set).  Allowed are 2 bits for each page and 64 KiB.  Idle: a daemon whose region has just been
touched is left alone for three seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import cast

from benchmarks.build import ROOT
from benchmarks.rows import Row, limit, script

LENGTH = 16 << 30
PAGE = 4096
ALLOWED = LENGTH // PAGE * 2 / 8 + (64 << 10)
IDLE = 3.0
"""Seconds."""
IDLE_ALLOWED = 0.001
"""Seconds of processor time: nothing, as far as the clock and the measurement itself can tell."""


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
    del rounds  # both are steady: one process each
    weighed = _child("--weigh", str(LENGTH))
    idle = _child("--idle", str(IDLE))
    pages = LENGTH // PAGE
    rows = [
        limit(
            f"memory of a filled region of {pages:,} pages, {how}",
            [weighed[key] / 1024],
            unit="KiB",
            against="2 bits a page + 64 KiB",
            cores="any core",
            target=round(ALLOWED / 1024, 1),
            note=f"{weighed[key] * 8 / pages:.3f} bits a page",
        )
        for key, how in (("traced_peak", "peak of allocations"), ("resident", "resident set"))
    ]
    idle_row = limit(
        f"processor time in {IDLE:g} idle seconds",
        [idle["cpu_s"]],
        unit="s of CPU",
        against="nothing",
        cores="any core",
        target=IDLE_ALLOWED,
    )
    return [*rows, idle_row]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
