"""How values of the application are shown in errors and logs: `repr` and friends, contained.

A `repr` that raises, or that returns a megabyte, is the application's own affair: it must end
neither a fault nor the daemon.
"""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 300


def shorten(text: str, length: int) -> str:
    """`text`, its middle left out where it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def shown(value: object, length: int = _LONGEST) -> str:
    """The repr of a value of the application, at most `length` characters; never raises."""
    try:
        return shorten(repr(value), length)
    except Exception as error:  # noqa: BLE001  # a repr may raise anything
        return f"<{type(value).__name__}: its repr raised {type(error).__name__}>"


def text_of(error: BaseException, length: int = 10 * _LONGEST) -> str:
    """The text of an exception, at most `length` characters; never raises."""
    try:
        return shorten(str(error), length)
    except Exception as raised:  # noqa: BLE001  # a str may raise anything
        return f"<{type(error).__name__}: its str raised {type(raised).__name__}>"


def name_of(function: object) -> str:
    """The qualified name of a function, or the repr of another callable; never raises."""
    try:
        name = getattr(function, "__qualname__", None)
    except Exception:  # noqa: BLE001  # `__getattr__` may raise anything
        name = None
    return name if isinstance(name, str) and name else shown(function)
