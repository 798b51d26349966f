"""Policies for ``placement="external"``, to be imported by the process that serves.

A process takes its time to start, so that most patterns share one: `together` is the policy of
memory in which one pattern's pages follow another's.  A pattern that needs a mapping of its own has
a policy by its name.
"""

from __future__ import annotations

from itertools import accumulate

from tests.hangs.patterns import PATTERNS
from uffdaemon import BytesSource, CopyFrom

TOGETHER = [pattern for pattern in PATTERNS.values() if not pattern.name.startswith("mmap_")]
ALONE = [pattern for pattern in PATTERNS.values() if pattern not in TOGETHER]

_ENDS = list(accumulate(len(pattern.make_data()) for pattern in TOGETHER))
OFFSETS = dict(zip((pattern.name for pattern in TOGETHER), [0, *_ENDS], strict=False))
"""Where the pages of each begin, in bytes."""
LENGTH = _ENDS[-1]


def __getattr__(name: str) -> CopyFrom:
    if name == "together":
        return CopyFrom(BytesSource(b"".join(pattern.make_data() for pattern in TOGETHER)))
    if name not in PATTERNS:
        raise AttributeError(name)
    return CopyFrom(BytesSource(PATTERNS[name].make_data()))
