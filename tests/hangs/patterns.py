"""The table of all access patterns, by name."""

from __future__ import annotations

from tests.hangs import arrays, calls, modules, plain
from tests.hangs.pattern import PATTERNS, Guarded, Pattern, view_of

__all__ = ["HOLDING", "PATTERNS", "RELEASING", "Guarded", "Pattern", "view_of"]

_MODULES = (plain, arrays, modules, calls)  # each enters its own

HOLDING = [name for name, pattern in PATTERNS.items() if pattern.gil == "held"]
"""Those that hang where Python has to answer."""
RELEASING = [name for name, pattern in PATTERNS.items() if pattern.gil == "released"]
