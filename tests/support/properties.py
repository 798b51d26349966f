"""The hypothesis profile of all tests: nothing in it depends on how fast the machine is."""

from __future__ import annotations

from typing import Final

from hypothesis import HealthCheck, settings

UNTIMED: Final = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
"""For the parent of settings in a child process, which loads no conftest.py."""


def load_profile() -> None:
    """Make it the default of every test that is imported from now on."""
    settings.register_profile("untimed", UNTIMED)
    settings.load_profile("untimed")
