"""Checks of arguments: a mistake shows where it is made, by the name of the argument.

They raise TypeError or ValueError.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from uffdaemon.names import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXT = 100


def check_count(name: str, value: object, *, least: int = 0) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an integer, not {shown(value, _TEXT)}")
    if value < least:
        raise ValueError(f"{name} is at least {least}, not {value}")


def check_seconds(name: str, value: object, *, positive: bool = False) -> None:
    """Raise unless `value` is a number of seconds, 0 or more; with `positive`, more than 0.

    ``math.inf`` is one.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is a number of seconds, not {shown(value, _TEXT)}")
    if math.isnan(value) or value < 0 or (positive and value == 0):
        least = "above 0" if positive else "at least 0"
        raise ValueError(f"{name} is a number of seconds, {least}, not {value}")


def check_callable(name: str, value: object, takes: str) -> None:
    """Raise unless `value` can be called; a class is taken for a forgotten pair of parentheses."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} is a callable that takes {takes}, not the class {value.__name__}: "
            f"{value.__name__}() makes one"
        )
    if not callable(value):
        raise TypeError(f"{name} is a callable that takes {takes}, not {shown(value, _TEXT)}")


def check_policy(name: str, value: object) -> None:
    """Raise unless `value` can be a policy."""
    check_callable(name, value, "a fault")


def check_type(name: str, value: object, kind: type, hint: str = "") -> None:
    """Raise unless `value` is a `kind`; `hint` says how to get one."""
    if not isinstance(value, kind):
        end = f": {hint}" if hint else ""
        raise TypeError(f"{name} is a {kind.__name__}, not {shown(value, _TEXT)}{end}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} is {', '.join(first)} or {last}, not {shown(value, _TEXT)}")
