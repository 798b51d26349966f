"""The long run: ``make soak``, or ``python -m tests.soak --moves N --mover NAME --steps N``.

A table of what each mover lost, and the model of page states in every placement.  The exit status
is 1 if a mover that must not lose anything did, if one that must be seen to lose did not, or if a
page was not as the model says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from tests.soak.bouncing import DISTURBANCES, EXACT_CANNOT, MOVERS, Report, soak
from tests.soak.page_states import PLACINGS, play
from tests.soak.threads import build
from tests.support import clib as helpers
from tests.support import system

CLEAN = ("strict", "ladder", "exact")
LONG = 1_000_000
STEPS = 100_000
MOVER_SECONDS = 3600.0
"""What one mover gets before it counts as hung."""


def main() -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=LONG, help="in all (default: %(default)s)")
    parser.add_argument("--mover", choices=sorted(MOVERS), action="append")
    parser.add_argument("--threads", type=int, choices=[1, 2, 3, 4], action="append")
    parser.add_argument("--disturb", choices=[*DISTURBANCES, "none"], action="append")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="of the page model, a placement (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    movers = options.mover or list(MOVERS)
    threads = options.threads or [1, 3]
    chosen = tuple(options.disturb or DISTURBANCES)
    # Those that must lose nothing share all moves; the others have a few of their own.
    each = options.moves // (max(len([m for m in movers if m in CLEAN]), 1) * len(threads))
    reports: list[Report] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = build(directory)
        if "ksm" in chosen:
            stack.enter_context(system.ksm())
        if "pageout" in chosen:
            stack.enter_context(system.swap())
        for mover in movers:
            for writers in threads:
                disturbances = tuple(name for name in chosen if name != "none")
                if mover not in ("strict", "ladder"):
                    disturbances = tuple(
                        name for name in disturbances if name not in (*EXACT_CANNOT, "split")
                    )
                # What must be seen to lose does so soon, and alone.
                count, disturbances = (each, disturbances) if mover in CLEAN else (2000, ())
                reports.append(_in_child(library, mover, writers, count, disturbances))
                show(reports[-1])
    with tempfile.TemporaryDirectory() as name:
        # Other tests may have the machine's settings meanwhile.
        wrong = [each for each in PLACINGS if not play_in_child(Path(name), each, options.steps)]
    if options.json is not None:
        options.json.write_text(json.dumps([as_json(report) for report in reports], indent=1))
    bad = [r for r in reports if r.mover in CLEAN and not r.clean]
    blind = [r for r in reports if r.mover == "naive" and not r.lost]
    return 1 if bad or blind or wrong else 0


def _in_child(
    library: Path, mover: str, writers: int, moves: int, disturbances: tuple[str, ...]
) -> Report:
    """Run it where it can crash, or be killed, without taking the machine's settings along."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(soak, library, mover, writers, moves, disturbances).result(MOVER_SECONDS)


def play_in_child(directory: Path, name: str, steps: int) -> bool:
    """Run the model of page states in one placement; whether every page was as it says."""
    library = helpers.build(directory)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            taken = pool.submit(play, PLACINGS[name], library, steps, 100).result(MOVER_SECONDS)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what was found
            print(f"page states, {name}: {error!r}", flush=True)
            return False
    print(f"page states, {name}: {taken} steps, as the model says", flush=True)
    return True


def as_json(report: Report) -> dict[str, object]:
    """All of a report."""
    # asdict() would make something else of a Counter.
    return {**asdict(replace(report, outcomes=Counter())), "outcomes": dict(report.outcomes)}


def show(report: Report) -> None:
    """Print what came of a run."""
    rate = report.moves / report.seconds
    print(
        f"{report.mover}, {report.writers} writers, {', '.join(report.disturbances) or 'alone'}: "
        f"{report.moves} moves ({rate:.0f}/s), {report.writes} writes, {report.reads} reads; "
        f"lost {report.lost}, stale {report.stale}, wrong {report.wrong}, "
        f"source not empty {report.left}"
    )
    for name, count in report.outcomes.most_common():
        print(f"    {count:8} {name}")
    happened = (f"{name} {count}" for name, count in report.happened.items() if count)
    print(f"    happened: {', '.join(happened)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
