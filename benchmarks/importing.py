"""What importing takes: the package, and the names of a daemon, against `import trio`.

Each import is the first of its kind in a fresh interpreter, and is timed inside it: the start of
the interpreter is not counted.  The compiled files are written before anything is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.build import ROOT
from benchmarks.rows import Row, compare, script

TARGET = 1.3
PACKAGE, DAEMON, TRIO, LIBRARIES = (
    "import uffdaemon",
    "from uffdaemon import Memory, ZeroPage, open_daemon",
    "import trio",
    "import trio, structlog",
)
TIMED = """\
import time
begun = time.perf_counter_ns()
{}
print(time.perf_counter_ns() - begun)
"""


def _taken(statement: str, environment: dict[str, str]) -> float:
    """Milliseconds of `statement` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(statement)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    return int(done.stdout) / 1e6


def measure(rounds: int) -> list[Row]:
    """A row for each of ours against trio, and one for the daemon against what it imports."""
    statements = (PACKAGE, DAEMON, TRIO, LIBRARIES)
    seen: dict[str, list[float]] = {statement: [] for statement in statements}
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for statement in statements:
            _taken(statement, environment)
        for _ in range(rounds):
            for statement in statements:
                seen[statement].append(_taken(statement, environment))
    return [
        compare(
            ours,
            seen[ours],
            seen[theirs],
            against=theirs,
            cores="any core",
            target=target,
            unit="ms",
        )
        for ours, theirs, target in (
            (PACKAGE, TRIO, TARGET),
            (DAEMON, TRIO, None),
            (DAEMON, LIBRARIES, None),
        )
    ]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
