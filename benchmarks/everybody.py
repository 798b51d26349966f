"""The comparison with everybody who answers page faults, by the same toucher, in the same minutes.

The kernel's own faults (in a mapped file it maps the pages round each one), handlers in C that do
nothing but answer, ours in each of its ways, and other people's: the crate userfaultfd, Go, pyfuse3
and LLNL umap (where UMAP_PREFIX says where that is installed).  One thread touches pages
back-to-back, on the handler's core, on another, and on a core of its own while the handler may run
on either; then eight threads on two cores.  Who cannot be built or run here has a row that says
why.

The handler in Go stands on golang.org/x/sys/unix alone: no module for userfaultfd was to be had
from the module proxy where this was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks import contenders as who
from benchmarks.external import Figure, figures
from benchmarks.rows import Row, absent, compare, script
from benchmarks.turns import Client, Cores, Seen, Side, TurnFailed, alternate, placements

BACK_TO_BACK = Client(pages=4608, warm=512)
EIGHT = Client(pages=16384, warm=512, threads=8)
SAME, DIFFERENT, FREE = "same core", "different cores", "handler free"

Measured = Mapping[str, Sequence[Seen]]


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of one of ours against another: the largest ratio of a figure."""

    ours: str
    other: str
    figure: Figure
    most: float
    places: tuple[str, ...] = (SAME, DIFFERENT)


TARGETS = (
    Target(who.IN_THREAD, who.SLEEPING, "p50_us", 0.70, (SAME,)),
    Target(who.IN_THREAD, who.SIGBUS, "p50_us", 1.08, (SAME,)),
    Target(who.NUMPY, who.SIGBUS, "p50_us", 1.3, (SAME,)),
    Target(who.THREAD, who.REREADING, "p50_us", 1.05, (SAME, DIFFERENT, FREE)),
    Target(who.THREAD, who.REREADING, "p99_us", 1.2, (SAME, DIFFERENT, FREE)),
    Target(who.THREAD, who.RUST, "p50_us", 1.03, (SAME, DIFFERENT, FREE)),
    Target(who.THREAD, who.RUST, "p99_us", 1.2, (SAME, DIFFERENT, FREE)),
)
WORDS: Mapping[Figure, str] = {"p50_us": "p50", "p99_us": "p99", "wall_us_per_page": "wall a page"}


def settings() -> dict[str, Cores]:
    """Where one thread touches and where the handler is."""
    result = placements()
    if DIFFERENT in result:
        result[FREE] = replace(result[DIFFERENT], free=True)
    return result


def _takes_part(name: str, place: str) -> bool:
    """Who has no handler does the same wherever that would be; who spins wants a core."""
    if name == who.SPINNING:
        return place == DIFFERENT
    return place == SAME or name not in who.NO_HANDLER


def _note(seen: Sequence[Seen], figure: Figure) -> str:
    if figure == "wall_us_per_page":
        return f"{1e6 / median(figures(seen, figure)):,.0f} pages per second"
    present = [turn["present_us"] for turn in seen if "present_us" in turn]
    if not present:
        return ""
    return f"{median(present):.2f} µs, what it takes where the page is there, are subtracted"


def _everybody(
    measured: Measured, figure: Figure, place: str, cores: Cores, title: str
) -> list[Row]:
    """A row for each side, against the yardstick that sleeps."""
    theirs = figures(measured[who.SLEEPING], figure)
    return [
        replace(
            compare(
                f"{title}, {place}: {name}",
                figures(seen, figure),
                theirs,
                against=who.SLEEPING,
                cores=str(cores),
                p99=figures(seen, "p99_us"),
                note=_note(seen, figure),
            ),
            group=f"{title}, {place}",
            label=name,
        )
        for name, seen in measured.items()
    ]


def _targets(measured: Measured, place: str, cores: Cores) -> list[Row]:
    return [
        compare(
            f"{WORDS[target.figure]}, {place}: {target.ours}",
            figures(measured[target.ours], target.figure),
            figures(measured[target.other], target.figure),
            against=target.other,
            cores=str(cores),
            target=target.most,
        )
        for target in TARGETS
        if place in target.places and {target.ours, target.other} <= measured.keys()
    ]


def _one_thread(sides: Mapping[str, Side], rounds: int) -> tuple[list[Row], list[Row]]:
    rows: list[Row] = []
    targets: list[Row] = []
    resolver: dict[str, Sequence[Seen]] = {}
    for place, cores in settings().items():
        part = [side for name, side in sides.items() if _takes_part(name, place)]
        measured = by_name(part, sides, BACK_TO_BACK, cores, rounds)
        rows += _everybody(measured, "p50_us", place, cores, "back-to-back")
        targets += _targets(measured, place, cores)
        resolver |= {place: measured[who.THREAD]} if who.THREAD in measured else {}
    for shared in (SAME, FREE):
        if shared in resolver and DIFFERENT in resolver:
            row = compare(
                f"what sharing a core gains, {shared}: {who.THREAD}",
                figures(resolver[shared], "p50_us"),
                figures(resolver[DIFFERENT], "p50_us"),
                against=f"the same, {DIFFERENT}",
                cores=str(settings()[shared]),
            )
            targets.append(row)
    return rows, targets


def _eight_threads(sides: Mapping[str, Side], rounds: int) -> tuple[list[Row], list[Row]]:
    cores = placements().get(DIFFERENT)
    if cores is None:
        return [absent("8 threads on 2 cores", "there is one core")], []
    cores = replace(cores, spread=True, free=True)
    part = [side for name, side in sides.items() if name not in who.ONE_THREAD]
    measured = by_name(part, sides, EIGHT, cores, rounds)
    rows = _everybody(measured, "wall_us_per_page", "wall a page", cores, "8 threads on 2 cores")
    targets = [
        compare(
            f"8 threads on 2 cores, wall a page: {mine}",
            figures(measured[mine], "wall_us_per_page"),
            figures(measured[peer], "wall_us_per_page"),
            against=peer,
            cores=str(cores),
            target=1.0,
        )
        for mine in (who.THREAD, who.IN_THREAD)
        for peer in who.PEERS
        if {mine, peer} <= measured.keys()
    ]
    return rows, targets


def by_name(
    part: Sequence[Side], sides: Mapping[str, Side], client: Client, cores: Cores, rounds: int
) -> Measured:
    """What the client saw, by the names of this module."""
    measured = alternate(part, client, cores, rounds)
    return {name: measured[side.name] for name, side in sides.items() if side.name in measured}


def measure(rounds: int) -> list[Row]:
    """A row for each contender and way to fault; then the targets; then who is absent.

    Raises `TurnFailed` when not even the yardstick can run.
    """
    places = placements()
    sides, reasons = who.gather(places.get(DIFFERENT, places[SAME]))
    if who.SLEEPING not in sides:
        raise TurnFailed(reasons[who.SLEEPING])
    one, one_targets = _one_thread(sides, rounds)
    eight, eight_targets = _eight_threads(sides, rounds)
    missing = [absent(name, reason) for name, reason in reasons.items()]
    return [*one, *eight, *one_targets, *eight_targets, *missing]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
