"""What types promise and nobody may have checked: found out when it is made, not at a fault."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pure.fakes import PAGE, a_fault, a_region
from uffdaemon import actions
from uffdaemon.model.batch import target
from uffdaemon.model.region import Region, Retry
from uffdaemon.policy import CopyFrom, MoveOrCopy, StrictMove, ZeroPage
from uffdaemon.ranges import PAGE_SIZE


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"policy": ZeroPage}, TypeError),
        ({"policy": 42}, TypeError),
        ({"on_failure": "hold"}, TypeError),
        ({"after_remove": "bogus"}, ValueError),
    ],
    ids=repr,
)
def test_a_region_checks_what_it_is_made_of(options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Region(0x10000, PAGE_SIZE, **{"policy": ZeroPage(), **options})


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"timeout": 0.0}, {"timeout": -1.0}], ids=repr
)
def test_a_source_is_asked_once_at_least_and_has_some_time(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is (at least|a number of seconds, above)"):
        Retry(**options)


def test_what_is_no_source_or_no_memory_is_refused_at_once() -> None:
    nothing: Any = b"an image"
    with pytest.raises(TypeError, match=r"BytesSource\(data\)"):
        CopyFrom(nothing)
    with pytest.raises(TypeError, match="Memory or an address"):
        StrictMove(nothing)
    with pytest.raises(TypeError, match="Memory or an address"):
        MoveOrCopy(nothing)


@pytest.mark.parametrize(
    ("length", "page", "expected"),
    [
        (None, 1, (0, 8)),
        (8 * PAGE, 1, (0, 8)),
        (3 * PAGE, 1, (0, 3)),
        (3 * PAGE, 2, (0, 3)),
        (3 * PAGE + 1, 2, (0, 3)),
    ],
)
def test_a_move_reaches_as_far_as_its_source(
    length: int | None, page: int, expected: tuple[int, int]
) -> None:
    region = a_region(pages=8)
    move = actions.Move(0x100000, extent=8, length=length)
    start, size = target(a_fault(region, page), move)
    assert ((start - region.start) // PAGE, size // PAGE) == expected


def test_a_page_that_the_source_lacks_drags_no_other_along() -> None:
    region = a_region(pages=8)
    move = actions.Move(0x100000, extent=8, length=3 * PAGE)
    assert target(a_fault(region, 5), move) == (region.start + 5 * PAGE, PAGE)
