"""Runs all benchmarks: tables for people, one JSON file for machines, and a plot.

A missed target is said, not failed: the exit status is 1 only when a benchmark could not run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import (
    compacting,
    contended,
    everybody,
    external,
    fault_around,
    filling,
    forwarding,
    importing,
    move_faults,
    moving,
    resting,
    rules,
    scaling,
    takeover,
    touched,
)
from benchmarks.rows import Measure, Row, parser, print_table, write_json
from benchmarks.turns import Client, TurnFailed, placements, touch_unguarded

BENCHMARKS: dict[str, Measure] = {
    "external": external.measure,
    "fault_around": fault_around.measure,
    "scaling": scaling.measure,
    "contended": contended.measure,
    "resting": resting.measure,
    "importing": importing.measure,
    "moving": moving.measure,
    "move_faults": move_faults.measure,
    "filling": filling.measure,
    "compacting": compacting.measure,
    "everybody": everybody.measure,
    "touched": touched.measure,
    "takeover": takeover.measure,
    "rules": rules.measure,
    "forwarding": forwarding.measure,
}
WARM_PAGES = 131_072
"""Half a GiB, more than any benchmark touches in one turn."""


def main() -> int:
    """Run them; the exit status."""
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the rows, and the comparison with everybody as FILE-everybody (default: beside "
        "the JSON file)",
    )
    options_parser.add_argument(
        "only", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(BENCHMARKS)} (default: all)"
    )
    options = options_parser.parse_args()
    if unknown := set(options.only) - set(BENCHMARKS):
        options_parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    print(f"load {os.getloadavg()[0]:.2f}, cores {sorted(os.sched_getaffinity(0))}")
    # A virtual machine's host finds memory when it is first touched, which takes longer than all
    # that is measured here.
    touch_unguarded(Client(pages=WARM_PAGES, warm=0), placements()["same core"])
    rows: list[Row] = []
    failed = False
    for name in options.only or BENCHMARKS:
        began = time.monotonic()
        try:
            measured = BENCHMARKS[name](options.rounds)
        except (TurnFailed, subprocess.SubprocessError, OSError) as error:
            print(f"\n{name} could not run: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"\n{name} ({time.monotonic() - began:.0f} s)")
        print_table(measured)
        rows += measured
    missed = [row for row in rows if row.met is False]
    print(f"\n{sum(row.met is True for row in rows)} targets met, {len(missed)} missed")
    if options.json is not None:
        write_json(rows, options.json)
    plot = options.plot or (options.json and options.json.with_suffix(".png"))
    if plot is not None:
        _draw(rows, plot)
    return int(failed)


def _draw(rows: list[Row], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: there is no matplotlib; pip install 'uffdaemon[bench]' brings it")
        return
    from benchmarks import plot  # noqa: PLC0415 - the one part that needs matplotlib

    plot.draw([row for row in rows if not row.group], path)
    if grouped := [row for row in rows if row.group]:
        plot.draw_groups(grouped, path.with_stem(f"{path.stem}-everybody"))


if __name__ == "__main__":
    sys.exit(main())
