"""What the daemon costs where nothing faults: memory for each page, processor time while idle.

Memory: all of a region of 16 GiB is touched, becomes zero pages, which take none themselves, and
is discarded again; the growth of the process's resident set is measured.  Allowed are 2 bits for
each page and 64 KiB.  Idle: a daemon whose region has just been touched is left alone for three
seconds.
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
    memory = limit(
        f"memory of a region of {pages:,} pages",
        [weighed["resident"] / 1024],
        unit="KiB",
        against="2 bits a page + 64 KiB",
        cores="any core",
        target=ALLOWED / 1024,
        note=f"{weighed['resident'] * 8 / pages:.3f} bits a page, page tables left out",
    )
    resting = limit(
        f"processor time in {IDLE:g} idle seconds",
        [idle["cpu_s"]],
        unit="s of CPU",
        against="nothing",
        cores="any core",
        target=IDLE_ALLOWED,
    )
    return [memory, resting]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
