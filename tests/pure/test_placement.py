"""Choices by name: what is no choice is said at once."""

from __future__ import annotations

from typing import get_args

import pytest

from uffdaemon.placement import Placement, PlacementName, Resolver, ResolverName, Then, Watchdog


def test_the_word_does_as_well() -> None:
    assert {Placement(word) for word in get_args(PlacementName)} == set(Placement)
    assert {Resolver(word) for word in get_args(ResolverName)} == set(Resolver)


@pytest.mark.parametrize("choice", [Placement, Resolver])
def test_an_unknown_choice_lists_the_valid_ones(choice: type[Placement | Resolver]) -> None:
    with pytest.raises(ValueError, match=r"is one of .*'in[-_].*, not 'in thread'"):
        choice("in thread")


@pytest.mark.parametrize("after", [0.0, -1.0, float("nan")])
def test_a_watchdog_without_a_sensible_timeout_is_refused(after: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Watchdog(after)


def test_what_a_watchdog_can_do() -> None:
    assert {Watchdog(1.0, then).then for then in get_args(Then)} == set(get_args(Then))
    with pytest.raises(ValueError, match="not 'bite'"):
        Watchdog(1.0, "bite")  # type: ignore[arg-type]  # that is what is tested
