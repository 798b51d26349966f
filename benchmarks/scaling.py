"""Nothing on the way of a fault may grow with the number of pages or regions beyond its logarithm.

One region of 1 MiB to 64 GiB, reserved and never touched except for 1,024 pages in four places;
then 1 to 1,000 regions on one userfaultfd, in which 4,000 pages are touched in random order.  The
C yardstick looks its regions up by bisection too, and has the same page tables to fill: what grows
with it is the kernel's, so the figure is the ratio to it.  The row is that ratio at the largest
size over that at the smallest; its note has the times.
"""

from __future__ import annotations

import statistics

from benchmarks.rows import Row, compare, script
from benchmarks.turns import Client, Cores, alternate, ours, placements, sleeping

MIB = 1 << 20
SIZES = {
    size * MIB: Client(pages=pages, warm=64, length=size * MIB, windows=windows)
    for size, pages, windows in (
        (1, 256, 1),
        (64, 1024, 4),
        (4096, 1024, 4),
        (65536, 1024, 4),
    )
}
REGIONS = {
    1: Client(pages=4000, warm=400),
    30: Client(pages=3990, warm=400, regions=30),
    1000: Client(pages=4000, warm=400, regions=1000),
}
TARGET = 1.25
"""Room for the logarithm and for noise: linear growth would be thousands."""


def _curve(name: str, clients: dict[int, Client], cores: Cores, rounds: int) -> Row:
    mine, other = ours(), sleeping()
    seen: dict[int, list[tuple[float, float]]] = {size: [] for size in clients}
    # The sizes alternate too: a machine that slows down meanwhile slows all of them.
    for _ in range(rounds):
        for size, client in clients.items():
            measured = alternate([mine, other], client, cores, 1)
            [own], [theirs] = measured[mine.name], measured[other.name]
            seen[size].append((own["p50_us"], theirs["p50_us"]))
    points = tuple(
        (
            float(size),
            round(statistics.median(own for own, _ in turns), 3),
            round(statistics.median(theirs for _, theirs in turns), 3),
        )
        for size, turns in seen.items()
    )
    return compare(
        name,
        [own / theirs for own, theirs in seen[max(clients)]],
        [own / theirs for own, theirs in seen[min(clients)]],
        against="the smallest of them",
        cores=str(cores),
        target=TARGET,
        unit="times C",
        note="; ".join(f"{int(x):,}: {own:.2f} µs, C {its:.2f}" for x, own, its in points),
        points=points,
    )


def measure(rounds: int) -> list[Row]:
    """A row for the pages of one region, and one for the number of regions."""
    cores = placements()["same core"]
    return [
        _curve("one region of 1 MiB to 64 GiB, p50", SIZES, cores, rounds),
        _curve("1 to 1,000 regions, p50", REGIONS, cores, rounds),
    ]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
