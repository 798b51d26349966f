"""How values of the application are shown: whatever their `repr` does, it ends nothing."""

from __future__ import annotations

from functools import partial

import pytest

from uffdaemon.names import name_of, shorten, shown, text_of


class Raising:
    """A lazy object whose connection is gone."""

    def __repr__(self) -> str:
        raise RuntimeError("no connection")


class RaisingError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no connection")


class Hidden:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no connection")


class Endless:
    def __repr__(self) -> str:
        return repr([self])


def test_a_value_is_shown_by_its_repr() -> None:
    assert shown("text") == "'text'"
    assert text_of(ValueError("text")) == "text"


def test_a_repr_that_raises_is_named() -> None:
    assert shown(Raising()) == "<Raising: its repr raised RuntimeError>"
    assert shown(Endless()) == "<Endless: its repr raised RecursionError>"
    assert text_of(RaisingError()) == "<RaisingError: its str raised RuntimeError>"


@pytest.mark.parametrize("length", [10, 300])
def test_a_long_repr_is_shortened_in_its_middle(length: int) -> None:
    text = shown("x" * 1_000_000, length)
    assert len(text) == length + 1
    assert text == shorten(repr("x" * 1_000_000), length)
    assert text.startswith("'x")
    assert text.endswith("x'")
    assert len(text_of(ValueError("x" * 1_000_000), length)) == length + 1


def test_a_function_has_its_name_and_another_callable_its_repr() -> None:
    assert name_of(test_a_value_is_shown_by_its_repr) == "test_a_value_is_shown_by_its_repr"
    part = partial(shown, 1)
    assert name_of(part) == repr(part)
    assert name_of(Hidden()).startswith("<")
    assert name_of(Raising()) == "<Raising: its repr raised RuntimeError>"
