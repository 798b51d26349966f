"""Fault-around: each fault brings the 512 pages round it, in the daemon and in a loop in C.

The client reads its pages one after the other; the figure is wall time over pages.  The first 512
pages, one answer, are not timed.
"""

from __future__ import annotations

from benchmarks.rows import Row, compare, script
from benchmarks.turns import Client, Side, alternate, ours, placements, sleeping

PAGES = 512
CLIENT = Client(pages=64 * PAGES, warm=PAGES, sequential=True)
TARGET = 1.2


def measure(rounds: int) -> list[Row]:
    """One row for each placement."""
    mine = ours("--around", str(PAGES))
    other = Side(f"C copying {PAGES} pages", sleeping("--around", str(PAGES)).command)
    rows = []
    for place, cores in placements().items():
        measured = alternate([mine, other], CLIENT, cores, rounds)
        rows.append(
            compare(
                f"fault-around of {PAGES} pages, per page, {place}",
                [turn["wall_us_per_page"] for turn in measured[mine.name]],
                [turn["wall_us_per_page"] for turn in measured[other.name]],
                against=other.name,
                cores=str(cores),
                target=TARGET,
            )
        )
    return rows


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
