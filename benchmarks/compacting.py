"""A heap compacted under its mutators: by MOVE, and by copies whose source is released.

Runs examples/compaction.py, which says how, and in which the ways take turns.  Compared are how
long the compactor takes, its processor time, and the mutators' latency.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.build import ROOT
from benchmarks.rows import Row, compare, script

EXAMPLE = ROOT / "examples" / "compaction.py"
TARGETS = {"seconds": 0.6, "cpu_seconds": None, "p99": 1.0, "worst": None}
"""A compaction by MOVE takes at least 40 % less time, and the mutators wait no longer."""
UNITS = {"seconds": (1e3, "ms"), "cpu_seconds": (1e3, "ms"), "p99": (1, "µs"), "worst": (1, "µs")}
NAMES = {
    "seconds": "compaction by MOVE",
    "cpu_seconds": "its processor time",
    "p99": "mutators meanwhile, p99",
    "worst": "mutators meanwhile, worst",
}


def measure(rounds: int) -> list[Row]:
    """Rows against copying and releasing, against the exact copy, and against stopping."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "figures.json")
        command = [sys.executable, str(EXAMPLE), "--rounds", str(rounds), "--json", str(report)]
        subprocess.run(command, stdout=subprocess.PIPE, timeout=600, check=True)
        figures: list[dict[str, Any]] = json.loads(report.read_text())
    ways: dict[str, list[dict[str, Any]]] = {}
    for one in figures:
        ways.setdefault(one["way"], []).append(one)
    ours = ways.pop("move")
    return [
        compare(
            NAMES[figure],
            [one[figure] * UNITS[figure][0] for one in ours],
            [one[figure] * UNITS[figure][0] for one in theirs],
            against=f"{way} and release" if "copy" in way else way,
            cores="any",
            target=target if "copy" in way else None,
            unit=UNITS[figure][1],
        )
        for way, theirs in ways.items()
        for figure, target in TARGETS.items()
    ]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
