"""How long anything in the tests may take before it counts as hung."""

from __future__ import annotations

from typing import Final

DEADLINE: Final = 180.0
"""Seconds.  It ends what hangs, and is no measure of speed: on a machine whose cores are busy with
something else the slowest test takes a small part of it.  pytest's own `faulthandler_timeout` in
pyproject.toml is longer, so that a test whose child hangs can say so."""
