from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from tests.pure.fakes import FakeSource
from uffdaemon.actions import (
    Action,
    Continue,
    Copy,
    Fallback,
    Fill,
    Hold,
    Move,
    Perform,
    Poison,
    Span,
    Unprotect,
    Wake,
    Zero,
)

FILLS: list[Fill] = [
    Copy(FakeSource(4096)),
    Zero(),
    Move(0x1000),
    Continue(),
    Poison(),
    Unprotect(),
]


def test_the_union_is_closed_and_fills_are_a_part_of_it() -> None:
    assert set(get_args(Fill)) == {type(fill) for fill in FILLS}
    assert set(get_args(Action)) - set(get_args(Fill)) == {Wake, Hold, Perform}


@pytest.mark.parametrize("fill", FILLS)
def test_one_action_serves_all_faults_so_none_can_change(fill: Fill) -> None:
    assert fill.extent == 1
    with pytest.raises(FrozenInstanceError):
        fill.extent = 2  # type: ignore[misc]


def test_equal_actions_are_equal() -> None:
    source = FakeSource(4096)
    assert Copy(source, 8, Span(0, 4096)) == Copy(source, 8, Span(0, 4096))
    assert Copy(source) != Copy(source, write_protect=True)
    assert Copy(source) != Copy(FakeSource(4096))
    assert Move(0x1000) != Move(0x1000, fallback=Fallback())


def test_nothing_is_copied_that_was_not_asked_for() -> None:
    assert Move(0x1000).fallback is None
    assert not Fallback().copy_pinned


def test_a_hold_has_a_reason() -> None:
    assert Hold().reason == "held"
    assert Hold("no disk").reason == "no disk"
