"""The figures of a compaction, their table and their plot."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIB: Final = 1 << 20
LEGEND: Final = """
compaction: from the switch to the new addresses until the old memory is unmapped
cpu: CPU time of the compactor and the daemon in that time
operation: from its scheduled time until it was done, while compacting and a little longer
faults: of mutators that touched a page before the compactor moved it
resident: memory of this process, before and after
wrong: objects that lost a write
Below 1, move is better:"""
BUCKETS: Final = 48 * 16
"""Buckets of the histogram in heap.h: 16 for each power of two."""


def bucket_end(bucket: int) -> float:
    """The upper bound of a bucket, in µs."""
    doubled = max(bucket // 16 - 1, 0)
    return ((bucket + 1 - 16 * doubled) << doubled) / 1000


@dataclass(frozen=True)
class Figures:
    """The figures of one compaction."""

    way: str
    seconds: float
    """From the switch to new addresses until from-space is unmapped."""
    cpu_seconds: float
    """CPU time of the compactor and the daemon in that time."""
    p50: float
    """µs from an operation's scheduled time until it was done."""
    p99: float
    worst: float
    faults: int
    resident_before: int
    """Resident bytes of this process."""
    resident_after: int
    operations: int
    wrong: int
    """Objects that do not contain what the mutators wrote."""
    histogram: list[int] = field(repr=False)


def percentile(histogram: list[int], share: float) -> float:
    """The latency, in µs, that `share` of all operations (0 to 1) stay below."""
    left = share * sum(histogram)
    for bucket, count in enumerate(histogram):
        left -= count
        if left <= 0:
            return bucket_end(bucket)
    return bucket_end(BUCKETS - 1)


def print_table(ways: Sequence[str], rounds: list[list[Figures]]) -> None:
    """The medians of all rounds."""
    print(
        f"{'':16}{'compaction':>14}{'cpu':>9}{'operation p50':>15}{'p99':>10}{'worst':>10}", end=""
    )
    print(f"{'faults':>8}{'resident':>16}{'wrong':>7}")
    middle: dict[str, dict[str, float]] = {}
    for way, *figures in zip(ways, *rounds, strict=True):
        every = [asdict(one) for one in figures]
        m: dict[str, float] = {
            name: statistics.median(one[name] for one in every)
            for name, value in every[0].items()
            if isinstance(value, int | float)
        }
        middle[way] = m
        print(
            f"{way:16}{m['seconds'] * 1e3:11.1f} ms{m['cpu_seconds'] * 1e3:6.1f} ms"
            f"{m['p50']:12.1f} µs{m['p99'] / 1e3:7.2f} ms{m['worst'] / 1e3:7.2f} ms"
            f"{m['faults']:8.0f}{m['resident_before'] / MIB:6.0f} →{m['resident_after'] / MIB:4.0f}"
            f" MiB{sum(one['wrong'] for one in every):7}"
        )
    print(LEGEND)
    for way in ways[1:]:
        ratio = {name: middle["move"][name] / middle[way][name] for name in ("seconds", "p99")}
        print(f"move / {way}: time {ratio['seconds']:.2f}, p99 {ratio['p99']:.2f}")


def draw(ways: Sequence[str], rounds: list[list[Figures]], path: Path) -> None:
    """Plot how many operations took longer than a given time, and how long the compaction took."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  # optional
    except ImportError:
        print("no plot: matplotlib is not installed; pip install matplotlib")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1))
    for way, *figures in zip(ways, *rounds, strict=True):
        counts = [sum(bucket) for bucket in zip(*(one.histogram for one in figures), strict=True)]
        slower = [1 - done / sum(counts) for done in accumulate(counts)]
        left.plot([bucket_end(bucket) for bucket in range(BUCKETS)], slower, label=way)
        right.bar(way, statistics.median(one.seconds * 1e3 for one in figures))
    left.set(xscale="log", yscale="log", xlim=(0.05, 1e6), ylim=(1e-6, 1))
    left.set(xlabel="µs", ylabel="share of operations that took longer")
    left.legend()
    left.set_title("mutators while the heap is compacted")
    right.set(ylabel="ms")
    right.set_title("compaction")
    right.tick_params(axis="x", rotation=20)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")
