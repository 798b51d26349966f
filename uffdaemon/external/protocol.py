"""The messages between the owner of guarded memory and the worker that resolves its faults.

Each message is one packet of a Unix socket of type SOCK_SEQPACKET.  The owner never waits for the
worker, nor the worker for the owner.

    worker, supervisor                        owner
                                     <-       the plan: a file, read by each worker when it starts
    {"kind": "ready", "pid"}         ->
    {"kind": "refused", "text"}      ->       the policy cannot be loaded; each fault fails
    {"kind": "log", ...}             ->
    {"kind": "failed", ...}          ->       for ``failed`` hooks
    {"kind": "statistics", ...}      ->       the totals of this worker
    {"kind": "dropped", "count"}     ->       so many of the next line were dropped
    resolved faults, events (binary) ->       for ``after`` hooks and hooks of events
    {"kind": "died", "text", ...}    ->       from the supervisor
    {"kind": "given up", "text"}     ->       from the supervisor
                                     <-       {"kind": "count", "number"}: send statistics now
                                     <-       {"kind": "end", "how", "timeout"}
    {"kind": "ended"}                ->
                                     <-       the owner shuts the socket down: exit
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.hooks import Resolved
from uffdaemon.model.ledger import OpenFault, Waiting
from uffdaemon.model.region import Fault, policy_name
from uffdaemon.model.statistics import BUCKETS, Counters
from uffdaemon.names import shorten
from uffdaemon.uapi import events
from uffdaemon.uapi.events import Event, FaultKind, ForkEvent
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from uffdaemon.journal.packet import Json, Packet
    from uffdaemon.model.region import Region
    from uffdaemon.model.statistics import Statistics

LIMIT: Final = 1 << 16
"""The maximum length of a packet, in bytes."""
MAX_OPEN: Final = 100
"""How many open faults a packet has, the oldest; fewer if their texts are long."""
_TEXT: Final = 4000  # characters of one text; a packet can have several

_RESOLVED: Final = struct.Struct("=QQQQQIBBB")
_RESOLVED_TAG: Final = b"E"
_EVENTS_TAG: Final = b"V"
MAX_RESOLVED: Final = (LIMIT - 1) // _RESOLVED.size
MAX_EVENTS: Final = (LIMIT - 1) // events.MESSAGE.size
_FROM_TEXT: Final = frozenset(
    ("PolicyRaised", "PolicyAnswerInvalid", "PolicyTooSlow", "NoAnswer", "PolicyNotLoaded")
)
"""Errors of policies that are constructed from the policy's name and a text."""
_KINDS: Final = tuple(FaultKind)
_OUTCOMES: Final = tuple(Outcome)


# -- packets -----------------------------------------------------------------------------------


def encode(kind: str, fields: Mapping[str, Json] | None = None) -> bytes:
    """Encode a packet."""
    return json.dumps({"kind": kind, **(fields or {})}, ensure_ascii=False).encode(errors="replace")


def short(value: object) -> str:
    """The text, shortened so that a packet can have several."""
    return shorten(str(value), _TEXT)


# -- faults ------------------------------------------------------------------------------------


def pack_fault(fault: Fault) -> dict[str, Json]:
    """A fault without its region."""
    return {
        "address": fault.address,
        "fault": fault.kind.value,
        "write": fault.write,
        "thread": fault.thread,
        "exact": fault.exact_address,
        "read_at": fault.read_at,
    }


def unpack_fault(packet: Packet, region: Region) -> Fault:
    """The fault of `pack_fault`, in the owner's region."""
    return Fault(
        packet.integer("address"),
        FaultKind(packet.text("fault")),
        bool(packet.fields.get("write")),
        packet.integer("thread"),
        packet.integer("exact"),
        region,
        packet.integer("read_at"),
    )


def pack_failure(fault: Fault, error: Exception) -> dict[str, Json]:
    """The arguments of a ``failed`` hook."""
    return {
        **pack_fault(fault),
        "text": short(error),
        "type": type(error).__name__,
        "policy": short(policy_name(fault.region.policy)),
    }


def unpack_failure(packet: Packet) -> Exception:
    """The error, of its own type if that can be made from its text, or else a `WorkerFailure`."""
    name, policy, text = packet.text("type"), packet.text("policy"), packet.text("text")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.SourceError):
        return kind(text)
    if isinstance(kind, type) and issubclass(kind, errors.PolicyError) and name in _FROM_TEXT:
        return kind(policy, text.removeprefix(f"policy {policy} "))
    return errors.WorkerFailure(policy, name, text)


def pack_resolved(resolved: Iterable[Resolved]) -> bytes:
    """Pack at most `MAX_RESOLVED` faults with their outcomes."""
    return _RESOLVED_TAG + b"".join(
        _RESOLVED.pack(
            fault.address,
            fault.exact_address,
            fault.read_at,
            latency,
            done,
            fault.thread,
            _KINDS.index(fault.kind),
            _OUTCOMES.index(outcome),
            fault.write,
        )
        for fault, outcome, latency, done in resolved
    )


def pack_events(batch: Iterable[Event]) -> bytes:
    """Pack at most `MAX_EVENTS` events.  The descriptors of children are not sent."""
    return _EVENTS_TAG + b"".join(
        events.message(ForkEvent(0) if isinstance(event, ForkEvent) else event) for event in batch
    )


def unpack_binary(data: bytes, region: Region) -> list[Resolved] | list[Event] | None:
    """Unpack the result of `pack_resolved` or `pack_events`; None for any other packet."""
    if data[:1] == _EVENTS_TAG:
        return [
            event._replace(fd=-1) if isinstance(event, ForkEvent) else event
            for event in events.parse(data[1:])
        ]
    if data[:1] != _RESOLVED_TAG:
        return None
    return [
        Resolved(
            Fault(address, _KINDS[kind], bool(write), thread, exact, region, read_at),
            _OUTCOMES[outcome],
            latency,
            done,
        )
        for address, exact, read_at, latency, done, thread, kind, outcome, write in (
            _RESOLVED.iter_unpack(data[1:])
        )
    ]


# -- statistics --------------------------------------------------------------------------------


def pack_statistics(statistics: Statistics, most: int = MAX_OPEN) -> dict[str, Json]:
    """All counts, and the `most` oldest open faults."""
    return {
        "outcomes": [
            {"fault": kind.value, "outcome": outcome.value, "count": count}
            for (kind, outcome), count in statistics.faults.items()
        ],
        "failures": statistics.failures,
        "events": statistics.events,
        "bytes": {outcome.value: count for outcome, count in statistics.bytes_done.items()},
        "joined": statistics.joined,
        "latencies": statistics.latencies,
        "open": [
            {
                **pack_fault(entry.fault),
                "threads": entry.threads[:8],
                "waiting": entry.waiting.value,
                "reason": shorten(entry.reason, 400),
                "attempts": entry.attempts,
            }
            for entry in statistics.open_faults[:most]
        ],
    }


def unpack_counters(packet: Packet) -> Counters:
    """The counts of `pack_statistics`."""
    counters = Counters()
    for entry in packet.packets("outcomes"):
        key = FaultKind(entry.text("fault")), Outcome(entry.text("outcome"))
        counters.outcomes[key] += entry.integer("count")
    for name, target in (("failures", counters.failures), ("events", counters.events)):
        figures = packet.packet(name)
        target.update({word: figures.integer(word) for word in figures.fields})
    figures = packet.packet("bytes")
    counters.bytes_done.update({Outcome(word): figures.integer(word) for word in figures.fields})
    counters.joined = packet.integer("joined")
    counters.latencies = packet.integers("latencies")[:BUCKETS]
    return counters


def unpack_open_faults(packet: Packet, region: Region, now: int) -> list[OpenFault]:
    """The open faults of `pack_statistics`, with their ages at the time `now`.

    Times are ``time.perf_counter_ns``, which is the same clock in all processes.
    """
    found: list[OpenFault] = []
    for entry in packet.packets("open"):
        fault = unpack_fault(entry, region)
        threads = tuple(entry.integers("threads"))
        waiting, reason = Waiting(entry.text("waiting")), entry.text("reason")
        age, attempts = now - fault.read_at, entry.integer("attempts")
        found.append(OpenFault(fault, threads, age, waiting, reason, attempts))
    return found
