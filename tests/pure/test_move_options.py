"""The options of moves: what type checkers know, what is taken at run time, and the defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from uffdaemon.moves import (
    CopyOptions,
    Fallback,
    MoveOptions,
    copy_exactly,
    move,
    move_in_trio,
    move_many,
)
from uffdaemon.moves.options import DEFAULTS, Chosen
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.moved import Cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.moves import Moved

MINE, FOREIGN = (cast("Any", type("Fd", (), {"same_process": mine})()) for mine in (True, False))


def test_checkers_and_the_interpreter_know_the_same_options() -> None:
    assert set(Chosen._fields) == set(MoveOptions.__annotations__)
    assert set(MoveOptions.__annotations__) - set(CopyOptions.__annotations__) == {"fallback"}
    assert not MoveOptions.__required_keys__


@pytest.mark.parametrize("call", [move, move_many, copy_exactly])
def test_an_unknown_option_is_refused(call: Callable[..., Moved]) -> None:
    arguments = [MINE, [(0, 0, 0)]] if call is move_many else [MINE, 0, 0, 0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'fallbck'"):
        call(*arguments, fallbck=Fallback())


async def test_an_unknown_option_is_refused_in_trio() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'fallbck'"):
        await move_in_trio(MINE, 0, 0, 0, **cast("Any", {"fallbck": None}))


def test_an_exact_copy_has_no_fallback_to_choose() -> None:
    with pytest.raises(TypeError, match="fallback"):
        copy_exactly(MINE, 0, 0, PAGE_SIZE, **cast("Any", {"fallback": Fallback()}))


def test_the_terms_name_why_a_move_is_impossible() -> None:
    assert DEFAULTS.terms(MINE).impossible is None
    assert DEFAULTS.terms(FOREIGN).impossible is Cause.OTHER_PROCESS
    huge = Chosen(page_size=512 * PAGE_SIZE, piece=PAGE_SIZE, fallback=Fallback(patience=2))
    assert huge.terms(MINE) == (
        Fallback(patience=2),
        False,
        Cause.WRONG_MEMORY,
        512 * PAGE_SIZE,
        PAGE_SIZE,
    )
