from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import MINOR, MISSING, WP, FakePort, a_fault, a_region
from uffdaemon.model.ledger import OpenFault, Waiting
from uffdaemon.model.statistics import (
    BUCKETS,
    Counters,
    OpenFaultDict,
    Statistics,
    StatisticsDict,
    latency_quantile,
)
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code, Outcome

LATENCIES = st.integers(0, 1 << 70)
ENDINGS = st.lists(st.tuples(st.sampled_from(FaultKind), st.sampled_from(Outcome), LATENCIES))
HISTOGRAMS = st.lists(st.integers(0, 1000), max_size=BUCKETS)


def snapshot(counters: Counters, open_faults: list[OpenFault] | None = None) -> Statistics:
    return Statistics(
        faults=dict(counters.outcomes),
        failures=dict(counters.failures),
        events=dict(counters.events),
        bytes_done=dict(counters.bytes_done),
        open_faults=open_faults or [],
        joined=counters.joined,
        latencies=counters.latencies,
    )


def counted(endings: list[tuple[FaultKind, Outcome, int]]) -> Counters:
    counters = Counters()
    for kind, outcome, latency in endings:
        counters.resolved(kind, outcome, latency)
    return counters


@given(ENDINGS)
def test_every_outcome_is_counted_once_by_kind_and_latency(
    endings: list[tuple[FaultKind, Outcome, int]],
) -> None:
    counters = counted(endings)
    assert counters.outcomes == Counter((kind, outcome) for kind, outcome, _ in endings)
    assert len(counters.latencies) == BUCKETS
    for bucket, count in enumerate(counters.latencies):
        low, high = (1 << bucket) >> 1, 1 << bucket
        last = bucket == BUCKETS - 1
        assert count == sum(low <= latency and (last or latency < high) for *_, latency in endings)
    resolved = sum(outcome.final for _, outcome, _ in endings)
    assert snapshot(counters).resolved == resolved


@given(ENDINGS, ENDINGS, st.integers(0, 9), st.integers(0, 9))
def test_the_sum_of_two_handlers_is_that_of_all_their_faults(
    here: list[tuple[FaultKind, Outcome, int]],
    there: list[tuple[FaultKind, Outcome, int]],
    joined: int,
    failed: int,
) -> None:
    one, other = counted(here), counted(there)
    one.joined, other.joined = joined, 1
    one.failures["SourceFailed"] = failed
    other.failures.update(["SourceFailed", "NoAnswer"])
    other.events["fork"] += 2
    one.bytes_done[Outcome.COPIED] += 4096
    other.bytes_done[Outcome.COPIED] += 8192
    total = Counters()
    total.add(one)
    total.add(other)
    both = counted(here + there)
    assert total.outcomes == both.outcomes
    assert total.latencies == both.latencies
    assert total.joined == joined + 1
    assert total.failures == Counter({"SourceFailed": failed + 1, "NoAnswer": 1})
    assert total.events == {"fork": 2}
    assert total.bytes_done == {Outcome.COPIED: 12288}
    assert one.outcomes == counted(here).outcomes


def test_faults_resolved_by_rules_are_counted_like_pythons() -> None:
    latencies = [0] * BUCKETS
    latencies[11] = 8
    port = FakePort(
        counts=[
            (0, Code.COPY, 5),
            (1, Code.COPY, 2),  # a write
            (1, 0, 1),  # was there before
            (4, Code.CONTINUE, 4),
            (0, Code.POISON, 3),
            (0, 1, 2),  # deferred: no outcome yet
        ],
        done=[(Code.COPY, 7 * 4096), (Code.CONTINUE, 4 * 4096)],
        latencies=latencies,
    )
    counters = Counters()
    counters.resolved(MISSING, Outcome.COPIED, 1500)
    counters.add_port(port.as_port())
    assert counters.outcomes == {
        (MISSING, Outcome.COPIED): 8,
        (MISSING, Outcome.ALREADY_PRESENT): 1,
        (MINOR, Outcome.MAPPED): 4,
        (MISSING, Outcome.POISONED): 3,
        (MISSING, Outcome.DEFERRED): 2,
    }
    assert counters.bytes_done == {Outcome.COPIED: 28672, Outcome.MAPPED: 16384}
    assert counters.latencies[11] == 9
    counters.add_port(FakePort().as_port())
    assert sum(counters.latencies) == 9


@given(HISTOGRAMS, st.floats(0, 1))
def test_a_quantile_is_the_upper_end_of_the_bucket_that_reaches_it(
    histogram: list[int], fraction: float
) -> None:
    found = latency_quantile(histogram, fraction)
    if not sum(histogram):
        assert found == 0.0
        return
    bucket = round(found * 1e9).bit_length() - 1
    assert found == (1 << bucket) / 1e9
    assert histogram[bucket] > 0
    assert sum(histogram[: bucket + 1]) >= fraction * sum(histogram)
    assert bucket == 0 or sum(histogram[:bucket]) <= fraction * sum(histogram)


def test_quantiles_by_hand() -> None:
    counters = counted(
        [(MISSING, Outcome.COPIED, latency) for latency in [900] * 98 + [70_000] * 2]
    )
    statistics = snapshot(counters)
    assert statistics.latency(0.5) == pytest.approx(1024e-9)
    assert statistics.latency(0.98) == pytest.approx(1024e-9)
    assert statistics.latency(0.99) == pytest.approx(131072e-9)
    assert statistics.latency(0) == pytest.approx(1024e-9)
    assert snapshot(Counters()).latency(0.5) == 0.0


def test_a_snapshot_as_plain_values() -> None:
    counters = counted(
        [
            (WP, Outcome.UNPROTECTED, 900),
            (MISSING, Outcome.HELD, 0),
            (MISSING, Outcome.COPIED, 900),
            (MISSING, Outcome.COPIED, 70_000),
        ]
    )
    counters.joined = 7
    counters.failures.update(["SourceFailed", "NoAnswer"])
    counters.events["remove"] += 1
    counters.bytes_done[Outcome.COPIED] += 8192
    stuck = a_fault(a_region(name="heap"), 2, thread=11)
    waits = OpenFault(stuck, (11, 12), 1_500_000_000, Waiting.NOBODY, "held")
    found = snapshot(counters, [waits]).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "faults": {
            "missing": {"copied": 2, "held": 1},
            "write_protect": {"unprotected": 1},
        },
        "resolved": 3,
        "joined": 7,
        "failures": {"NoAnswer": 1, "SourceFailed": 1},
        "events": {"remove": 1},
        "bytes": {"copied": 8192},
        "open": [
            {
                "threads": [11, 12],
                "address": stuck.exact_address,
                "kind": "missing",
                "region": "heap",
                "age_seconds": 1.5,
                "waits_for": "nobody",
                "reason": "held",
                "attempts": 0,
            }
        ],
        "latency_seconds": {
            "p50": 1024e-9,
            "p90": 131072e-9,
            "p99": 131072e-9,
            "max": 131072e-9,
        },
        "latency_histogram_ns": {"1": 1, "1024": 2, "131072": 1},
    }


def test_a_snapshot_reads_well() -> None:
    assert repr(snapshot(Counters())) == "<Statistics: 0 faults resolved, 0 open>"
    counters = counted([(WP, Outcome.ALREADY_PRESENT, 900), (MISSING, Outcome.COPIED, 70_000)])
    counters.failures["NoAnswer"] += 2
    counters.events["fork"] += 1
    counters.bytes_done[Outcome.COPIED] += 8192
    assert repr(snapshot(counters)) == (
        "<Statistics: 2 faults resolved, 0 open; missing: 1 copied; "
        "write_protect: 1 already_present; failures: 2 NoAnswer; events: 1 fork; "
        "bytes: 8192 copied; p50 1.024 µs, p99 131.1 µs>"
    )


def test_kinds_and_outcomes_are_named_like_identifiers() -> None:
    assert all(each.value.isidentifier() for each in (*FaultKind, *Outcome))
    assert [outcome.value for outcome in Outcome] == [name.lower() for name in Outcome.__members__]


def test_checkers_know_the_plain_values() -> None:
    stuck = OpenFault(a_fault(a_region(), 0), (1,), 0, Waiting.NOBODY, "")
    plain = snapshot(Counters(), [stuck]).as_dict()
    assert set(plain) == set(StatisticsDict.__annotations__)
    assert [set(each) for each in plain["open"]] == [set(OpenFaultDict.__annotations__)]
