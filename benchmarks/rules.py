"""What a fault costs with 1, 100 and 10,000 rules: looking one up is a bisection.

One region of 10,000 pages, all of which are touched in random order, divided into so many ranges,
each with a rule of its own: neighbours are copied from different mappings of the image, so that no
two rules are one.  The row is the time of a fault with the most rules over that with one.
"""

from __future__ import annotations

import statistics

from benchmarks import contenders as who
from benchmarks.rows import Row, absent, compare, script
from benchmarks.turns import Client, Cores, Side, TurnFailed, alternate, placements

COUNTS = (1, 100, 10_000)
CLIENT = Client(pages=10_000, warm=512)
TARGET = 1.2


def _with_rules(side: Side, count: int) -> Side:
    return side.with_words(f"{side.name}, {count} rules", "--rules", str(count))


def _curve(mine: Side, other: Side, cores: Cores, rounds: int) -> Row:
    sides = [_with_rules(mine, count) for count in COUNTS]
    measured = alternate([*sides, other], CLIENT, cores, rounds)
    seen = [[turn["p50_us"] for turn in measured[side.name]] for side in sides]
    theirs = statistics.median(turn["p50_us"] for turn in measured[other.name])
    points = tuple(
        (float(count), round(statistics.median(turns), 3), theirs)
        for count, turns in zip(COUNTS, seen, strict=True)
    )
    return compare(
        f"{mine.name}, {COUNTS[-1]:,} rules, p50",
        seen[-1],
        seen[0],
        against="the same with 1 rule",
        cores=str(cores),
        target=TARGET,
        note="; ".join(f"{int(count):,}: {own:.2f} µs" for count, own, _ in points)
        + f"; {other.name}: {theirs:.2f} µs",
        points=points,
    )


def measure(rounds: int) -> list[Row]:
    """A row for each way to answer by rules."""
    cores = placements()["same core"]
    rows: list[Row] = []
    for name, yardstick in (
        (who.LOOP, who.SLEEPING),
        (who.THREAD, who.SLEEPING),
        (who.IN_THREAD, who.SIGBUS),
    ):
        try:
            rows.append(_curve(who.MAKERS[name](), who.MAKERS[yardstick](), cores, rounds))
        except TurnFailed as error:
            rows.append(absent(f"{name}, rules", who.reason(name, error)))
    return rows


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
