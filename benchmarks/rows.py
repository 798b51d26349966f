"""The result of a measurement: rows, for people as a table and for machines as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

DEFAULT_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.  `target` bounds `ratio` from above, or `median` where there is no ratio."""

    name: str
    unit: str
    median: float | None
    """The median of the rounds' figures, each the median of its faults where faults are timed;
    None where it could not be measured, for the reason in `note`."""
    p99: float | None
    """The median of the rounds' 99th percentiles; None where a round yields one number only."""
    against: str
    ratio: float | None
    target: float | None
    met: bool | None
    """None: the row is there for information and has no target."""
    cores: str
    """On which cores the sides ran."""
    rounds: int
    against_median: float | None = None
    ratio_range: tuple[float, float] | None = None
    """The smallest and the largest ratio of one round."""
    points: tuple[tuple[float, float, float], ...] = ()
    """For a plot: (x, our median, their median) where a row sums up a curve."""
    note: str = ""
    group: str = ""
    """A picture of its own shows the rows of a group side by side, each by its `label`."""
    label: str = ""


Measure: TypeAlias = Callable[[int], list[Row]]
"""Runs one benchmark with at least so many alternating rounds."""


def compare(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    against: str,
    cores: str,
    target: float | None = None,
    p99: Sequence[float] = (),
    unit: str = "µs",
    note: str = "",
    points: tuple[tuple[float, float, float], ...] = (),
) -> Row:
    """The row for figures of alternating rounds, `ours` over `theirs`; less is better."""
    median, other = statistics.median(ours), statistics.median(theirs)
    ratio = median / other if other else None
    pairs = [a / b for a, b in zip(ours, theirs, strict=True) if b]
    return Row(
        name=name,
        unit=unit,
        median=round(median, 4),
        p99=round(statistics.median(p99), 4) if p99 else None,
        against=against,
        ratio=None if ratio is None else round(ratio, 3),
        target=target,
        met=None if target is None or ratio is None else ratio <= target,
        cores=cores,
        rounds=len(ours),
        against_median=round(other, 4),
        ratio_range=(round(min(pairs), 3), round(max(pairs), 3)) if pairs else None,
        note=note,
        points=points,
    )


def limit(
    name: str,
    values: Sequence[float],
    *,
    unit: str,
    against: str,
    cores: str,
    target: float | None = None,
    p99: Sequence[float] = (),
    note: str = "",
) -> Row:
    """The row for figures that have a limit, not a peer; without `target` one for information."""
    median = statistics.median(values)
    return Row(
        name=name,
        unit=unit,
        median=round(median, 6),
        p99=round(statistics.median(p99), 4) if p99 else None,
        against=against,
        ratio=None,
        target=target,
        met=None if target is None else median <= target,
        cores=cores,
        rounds=len(values),
        note=note,
    )


def absent(name: str, reason: str, *, cores: str = "") -> Row:
    """The row for what cannot be measured here."""
    return Row(
        name=name,
        unit="",
        median=None,
        p99=None,
        against="not measured",
        ratio=None,
        target=None,
        met=None,
        cores=cores,
        rounds=0,
        note=reason,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, their columns aligned, and their notes."""
    lines = [
        (
            "what",
            "cores",
            "unit",
            "median",
            "p99",
            "against",
            "its median",
            "ratio",
            "target",
            "met",
        )
    ]
    lines += [
        (
            row.name,
            row.cores,
            row.unit,
            _number(row.median),
            _number(row.p99),
            row.against,
            _number(row.against_median),
            _number(row.ratio),
            _number(row.target),
            {True: "yes", False: "NO", None: ""}[row.met],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0, 1, 2, 5}
    for line in lines:
        cells = (
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    for row in rows:
        if row.note:
            print(f"  {row.name}: {row.note}")


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Write the rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    result.add_argument(
        "--rounds",
        type=int,
        default=DEFAULT_ROUNDS,
        metavar="N",
        help=f"how often the sides take turns (default: {DEFAULT_ROUNDS})",
    )
    return result


def script(measure: Measure, description: str | None) -> None:
    """Run one benchmark as a program of its own."""
    options = parser(description).parse_args()
    rows = measure(options.rounds)
    print_table(rows)
    if options.json is not None:
        write_json(rows, options.json)
