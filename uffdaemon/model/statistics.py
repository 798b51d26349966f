"""Counters of what was served, and snapshots of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypedDict

from uffdaemon.uapi.events import KIND_OF_FLAGS, FaultKind
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.model.ledger import OpenFault
    from uffdaemon.native.ports import Port

BUCKETS: Final = 64
_DEFERRED: Final = 1
"""In place of an operation: C counts the faults that an event in flight has delayed."""


@dataclass(slots=True)
class Counters:
    """What one handler counts."""

    outcomes: Counter[tuple[FaultKind, Outcome]] = field(
        default_factory=Counter[tuple[FaultKind, Outcome]]
    )
    failures: Counter[str] = field(default_factory=Counter[str])
    """By the name of the error."""
    events: Counter[str] = field(default_factory=Counter[str])
    bytes_done: Counter[Outcome] = field(default_factory=Counter[Outcome])
    joined: int = 0
    """Messages about a page that already had an open fault."""
    latencies: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    """Bucket n: faults resolved in less than 2**n nanoseconds, and at least half of that."""

    def resolved(self, kind: FaultKind, outcome: Outcome, latency: int) -> None:
        """Count a fault that has ended, `latency` nanoseconds after it was read."""
        self.outcomes[kind, outcome] += 1
        self.latencies[min(latency.bit_length(), BUCKETS - 1)] += 1

    def add_port(self, port: Port) -> None:
        """Add the faults that C has resolved by rules."""
        for flags, code, count in port.counts():
            if code == _DEFERRED:
                outcome = Outcome.DEFERRED
            else:
                outcome = OUTCOME_OF_CODE[Code(code)] if code else Outcome.ALREADY_PRESENT
            self.outcomes[KIND_OF_FLAGS[flags], outcome] += count
        for code, done in port.bytes_by_code():
            self.bytes_done[OUTCOME_OF_CODE[Code(code)]] += done
        for bucket, count in enumerate(port.latencies()):
            self.latencies[bucket] += count

    def add(self, other: Counters) -> None:
        """Add another handler's figures."""
        self.outcomes.update(other.outcomes)
        self.failures.update(other.failures)
        self.events.update(other.events)
        self.bytes_done.update(other.bytes_done)
        self.joined += other.joined
        for bucket, count in enumerate(other.latencies):
            self.latencies[bucket] += count


class OpenFaultDict(TypedDict):
    """An open fault in a `StatisticsDict`."""

    threads: list[int]
    """The threads that reported it, the first one first; 0 for unknown."""
    address: int
    kind: str
    """The value of a `FaultKind`."""
    region: str
    """Its name, or its range."""
    age_seconds: float
    """Since it was read."""
    waits_for: str
    reason: str
    attempts: int
    """How often it was tried in vain."""


class StatisticsDict(TypedDict):
    """`Statistics` as plain values.  Kinds and outcomes are named by the values of their enums."""

    faults: dict[str, dict[str, int]]
    """How many faults, by kind and outcome."""
    resolved: int
    """How many faults have ended."""
    joined: int
    """Messages about a page that already had an open fault."""
    failures: dict[str, int]
    """How often faults failed, by the name of the error."""
    events: dict[str, int]
    """How many events, by name."""
    bytes: dict[str, int]
    """By outcome."""
    open: list[OpenFaultDict]
    """The oldest first."""
    latency_seconds: dict[str, float]
    """p50, p90, p99 and max, rounded up to the end of a bucket."""
    latency_histogram_ns: dict[str, int]
    """Faults by the upper end of their bucket in nanoseconds, a power of two."""


@dataclass(frozen=True, slots=True, repr=False)
class Statistics:
    """A snapshot of the counters, returned by `Daemon.statistics`."""

    faults: dict[tuple[FaultKind, Outcome], int]
    """How many faults of each kind had each outcome.  DEFERRED and HELD, which are not final, count
    how often faults were deferred and held."""
    failures: dict[str, int]
    """How often faults failed, by the name of the error; `HookRaised` counts hooks that
    raised, `LogLineLost` lines that the application's logger did not take."""
    events: dict[str, int]
    """Events by name: fork, remap, remove, unmap, unknown."""
    bytes_done: dict[Outcome, int]
    """Bytes by outcome, including background fills."""
    open_faults: list[OpenFault]
    """The faults that are open now, the oldest first."""
    joined: int
    """Messages about a page that already had an open fault."""
    latencies: list[int]
    """Bucket n: faults resolved in less than 2**n nanoseconds, and at least half of that."""

    def __repr__(self) -> str:
        plain = self.as_dict()
        parts = [f"{self.resolved} faults resolved, {len(self.open_faults)} open"]
        parts += [f"{kind}: {_counted(counts)}" for kind, counts in plain["faults"].items()]
        if self.failures:
            parts.append(f"failures: {_counted(plain['failures'])}")
        if self.events:
            parts.append(f"events: {_counted(plain['events'])}")
        if self.bytes_done:
            parts.append(f"bytes: {_counted(plain['bytes'])}")
        if any(self.latencies):
            half, most = self.latency(0.5) * 1e6, self.latency(0.99) * 1e6
            parts.append(f"p50 {half:.4g} µs, p99 {most:.4g} µs")
        return f"<Statistics: {'; '.join(parts)}>"

    @property
    def resolved(self) -> int:
        """How many faults have ended."""
        return sum(count for (_, outcome), count in self.faults.items() if outcome.final)

    def latency(self, fraction: float) -> float:
        """The time in seconds within which `fraction` (0 to 1) of the faults were resolved.

        It is the upper end of a bucket; 0.0 if there were no faults.
        """
        return latency_quantile(self.latencies, fraction)

    def as_dict(self) -> StatisticsDict:
        """The same as plain values, for ``json.dumps``."""
        faults: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(
            self.faults.items(), key=lambda item: (item[0][0].value, item[0][1].value)
        ):
            faults.setdefault(kind.value, {})[outcome.value] = count
        return {
            "faults": faults,
            "resolved": self.resolved,
            "joined": self.joined,
            "failures": dict(sorted(self.failures.items())),
            "events": dict(sorted(self.events.items())),
            "bytes": {outcome.value: count for outcome, count in self.bytes_done.items()},
            "open": [
                {
                    "threads": list(entry.threads),
                    "address": entry.fault.exact_address,
                    "kind": entry.fault.kind.value,
                    "region": entry.fault.region.label,
                    "age_seconds": entry.age / 1e9,
                    "waits_for": entry.waiting.value,
                    "reason": entry.reason,
                    "attempts": entry.attempts,
                }
                for entry in self.open_faults
            ],
            "latency_seconds": {
                name: self.latency(fraction)
                for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            },
            "latency_histogram_ns": {
                str(1 << bucket): count for bucket, count in enumerate(self.latencies) if count
            },
        }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def latency_quantile(latencies: Iterable[int], fraction: float) -> float:
    """The upper end, in seconds, of the bucket in which `fraction` of all faults is reached."""
    buckets = list(latencies)
    wanted = fraction * sum(buckets)
    reached = 0
    for bucket, count in enumerate(buckets):
        reached += count
        if count and reached >= wanted:
            return (1 << bucket) / 1e9
    return 0.0
