"""What arguments have to be, and that a mistake names its argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from uffdaemon.arguments import (
    check_callable,
    check_choice,
    check_count,
    check_policy,
    check_seconds,
    check_type,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "check",
    [
        lambda: check_count("n", 0),
        lambda: check_count("n", 1, least=1),
        lambda: check_seconds("n", 0),
        lambda: check_seconds("n", math.inf, positive=True),
        lambda: check_seconds("n", 0.5),
        lambda: check_callable("n", len, "a list"),
        lambda: check_policy("n", lambda fault: fault),
        lambda: check_type("n", "text", str),
        lambda: check_choice("n", "a", ("a", "b")),
    ],
)
def test_good(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "error", "text"),
    [
        (lambda: check_count("n", 1.5), TypeError, "n is an integer, not 1.5"),
        (lambda: check_count("n", True), TypeError, "n is an integer, not True"),
        (lambda: check_count("n", 0, least=1), ValueError, "n is at least 1, not 0"),
        (lambda: check_seconds("n", "1"), TypeError, "n is a number of seconds, not '1'"),
        (lambda: check_seconds("n", False), TypeError, "n is a number of seconds, not False"),
        (lambda: check_seconds("n", math.nan), ValueError, "n is a number of seconds, at least 0"),
        (lambda: check_seconds("n", -1), ValueError, "at least 0, not -1"),
        (lambda: check_seconds("n", 0, positive=True), ValueError, "above 0, not 0"),
        (lambda: check_callable("n", 5, "a list"), TypeError, "n is a callable that takes a list"),
        (lambda: check_policy("n", dict), TypeError, "takes a fault, not the class dict: dict()"),
        (lambda: check_type("n", 5, str), TypeError, "n is a str, not 5"),
        (lambda: check_type("n", 5, str, "say so"), TypeError, "n is a str, not 5: say so"),
        (lambda: check_choice("n", "c", ("a", "b")), ValueError, "n is 'a' or 'b', not 'c'"),
    ],
)
def test_bad(check: Callable[[], None], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        check()
    assert text in str(caught.value)
