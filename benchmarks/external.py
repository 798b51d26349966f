"""Faults of another process, one page each: the daemon against two handlers in C.

The yardsticks do nothing but answer: one polls, reads and copies; the other reads again, as often
as the daemon does, before it polls.  Three ways to fault: back-to-back, 500 µs apart (the client
sleeps in between, as real ones do, so that cores and caches go cold), and from eight threads at
once.  Each on one core and on two.  The time of the first two is that of a touch, in the client;
with eight threads it is wall time over pages.

A policy of your own is asked in Python for each fault; a row says what that costs, for information.

The processor time that the handler used comes from its clock, which the client reads before its
first and after its last timed touch.  What re-reading costs is the difference it makes there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.rows import Row, compare, limit, script
from benchmarks.turns import (
    Client,
    Cores,
    Seen,
    Side,
    alternate,
    ours,
    placements,
    rereading,
    sleeping,
    touch_unguarded,
)
from uffdaemon.daemon.entry import REREADS

BACK_TO_BACK = Client(pages=4608, warm=512)
APART = Client(pages=600, warm=100, gap_us=500)
THREADS = Client(pages=16384, warm=512, threads=8)
UNGUARDED = Client(pages=4608, warm=512)

Measured = Mapping[str, Sequence[Seen]]
Figure = Literal["p50_us", "p99_us", "wall_us_per_page", "handler_cpu_us_per_page"]


@dataclass(frozen=True, slots=True)
class Targets:
    """The largest ratios that are good enough; None: shown without a target."""

    sleeping: float | None
    rereading: float | None


@dataclass(frozen=True, slots=True)
class Case:
    """One way to fault."""

    name: str
    client: Client
    figure: Figure
    targets: Mapping[str, Targets]
    """By placement."""


CASES = (
    Case(
        "back-to-back",
        BACK_TO_BACK,
        "p50_us",
        {"same core": Targets(1.15, 1.3), "different cores": Targets(0.6, 1.3)},
    ),
    Case(
        "500 µs apart",
        APART,
        "p50_us",
        {"same core": Targets(1.4, None), "different cores": Targets(1.4, None)},
    ),
    Case(
        "8 threads, wall per page",
        THREADS,
        "wall_us_per_page",
        {"same core": Targets(1.15, None), "different cores": Targets(1.15, None)},
    ),
)


def figures(seen: Sequence[Seen], figure: Figure) -> list[float]:
    """One figure of each round."""
    return [turn[figure] for turn in seen]


def _latency_rows(
    case: Case, place: str, cores: str, measured: Measured, sides: Sides
) -> list[Row]:
    mine = measured[sides.ours.name]
    targets = case.targets[place]
    return [
        compare(
            f"{case.name}, {place}",
            figures(mine, case.figure),
            figures(measured[other.name], case.figure),
            against=other.name,
            cores=cores,
            target=target,
            p99=figures(mine, "p99_us") if case.figure == "p50_us" else (),
        )
        for other, target in (
            (sides.sleeping, targets.sleeping),
            (sides.rereading, targets.rereading),
        )
    ]


def _processor_rows(
    case: Case, place: str, cores: str, measured: Measured, sides: Sides
) -> list[Row]:
    def used(side: Side) -> list[float]:
        return figures(measured[side.name], "handler_cpu_us_per_page")

    name = f"processor time per fault, {case.name.split(',')[0]}, {place}"
    return [
        compare(
            name, used(sides.ours), used(other), against=other.name, cores=cores, unit="µs of CPU"
        )
        for other in (sides.not_rereading, sides.sleeping, sides.rereading)
    ]


@dataclass(frozen=True, slots=True)
class Sides:
    """Who takes turns."""

    ours: Side
    not_rereading: Side
    sleeping: Side
    rereading: Side


def _own_policy_row(place: str, cores: Cores, rounds: int) -> Row:
    mine = Side("a policy in Python", ours("--own-policy").command)
    other = sleeping()
    measured = alternate([mine, other], BACK_TO_BACK, cores, rounds)
    return compare(
        f"back-to-back, a policy of your own, {place}",
        figures(measured[mine.name], "p50_us"),
        figures(measured[other.name], "p50_us"),
        against=other.name,
        cores=str(cores),
        p99=figures(measured[mine.name], "p99_us"),
    )


def measure(rounds: int) -> list[Row]:
    """Run all cases."""
    sides = Sides(
        ours(),
        Side("uffdaemon, not re-reading", ours("--rereads", "0").command),
        sleeping(),
        rereading(REREADS),
    )
    rows: list[Row] = []
    processor: list[Row] = []
    for place, cores in placements().items():
        unguarded = [touch_unguarded(UNGUARDED, cores) for _ in range(rounds)]
        rows.append(
            limit(
                f"the kernel's own anonymous fault, {place}",
                figures(unguarded, "p50_us"),
                p99=figures(unguarded, "p99_us"),
                unit="µs",
                against="",
                cores=f"client {cores.client}",
            )
        )
        for case in CASES:
            turns = [sides.ours, sides.sleeping, sides.rereading, sides.not_rereading]
            measured = alternate(turns, case.client, cores, rounds)
            rows += _latency_rows(case, place, str(cores), measured, sides)
            processor += _processor_rows(case, place, str(cores), measured, sides)
        rows.append(_own_policy_row(place, cores, rounds))
    return rows + processor


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
