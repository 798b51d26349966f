"""Policies for `placement="external"`: one for each pattern, by its name, to be imported by the
process that serves."""

from __future__ import annotations

from tests.hangs.patterns import PATTERNS
from uffdaemon import BytesSource, CopyFrom


def __getattr__(name: str) -> CopyFrom:
    if name not in PATTERNS:
        raise AttributeError(name)
    return CopyFrom(BytesSource(PATTERNS[name].make_data()))
