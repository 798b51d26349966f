"""Ten thousand moves of pages that threads write to, through everything that gets in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.soak.bouncing import Report, soak
from tests.soak.threads import build
from tests.support import clib
from tests.support.kernel_tests import kernel_test
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROTECTED = Features.MOVE | Features.PAGEFAULT_FLAG_WP


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C side, compiled."""
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    return build(tmp_path_factory.mktemp("soak"))


def soaks(
    enough: Callable[[Report], object],
    library: Path,
    mover: str,
    writers: int,
    moves: int,
    *,
    disturbances: tuple[str, ...] = (),
) -> list[Report]:
    """Soak until a report shows `enough`: on a busy machine a thread may get no CPU time in one
    run.  The deadline is the limit."""
    reports: list[Report] = []
    while not reports or not enough(reports[-1]):
        reports.append(soak(library, mover, writers, moves, disturbances))
        print(reports[-1])
    return reports


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("mover", ["strict", "ladder", "exact"])
@kernel_test(features=PROTECTED)
def test_no_write_is_lost_without_disturbance(mover: str, writers: int, library: Path) -> None:
    for report in soaks(lambda r: r.writes > 0 < r.reads, library, mover, writers, 1000):
        assert report.clean, report


@pytest.mark.parametrize("mover", ["strict", "ladder"])
@pytest.mark.parametrize("disturbance", ["fork", "direct", "ring", "split"])
@kernel_test(features=PROTECTED)
def test_no_write_is_lost_with_a_disturbance(mover: str, disturbance: str, library: Path) -> None:
    def enough(report: Report) -> bool:
        return disturbance != "fork" or any("shared" in name for name in report.outcomes)

    for report in soaks(enough, library, mover, 3, 400, disturbances=(disturbance,)):
        assert report.clean, report


@pytest.mark.parametrize("mover", ["strict", "ladder", "exact"])
@pytest.mark.usefixtures("ksm", "swap")
@kernel_test(features=PROTECTED)
def test_nothing_is_lost_to_merging_and_swapping(mover: str, library: Path) -> None:
    def enough(report: Report) -> bool:
        return report.happened["pageout"] > 0

    disturbances = ("ksm", "pageout", "fork")
    for report in soaks(enough, library, mover, 3, 600, disturbances=disturbances):
        assert report.clean, report


@kernel_test(features=PROTECTED)
def test_a_copy_that_is_not_exact_is_seen_to_lose(library: Path) -> None:
    """Or else the tests above could not fail."""
    assert soaks(lambda r: r.lost, library, "naive", 3, 1000)[-1].lost > 0


@kernel_test(features=PROTECTED)
def test_a_destination_that_is_not_protected_is_seen_to_show_the_past(library: Path) -> None:
    reports = soaks(lambda r: r.stale, library, "lopsided", 3, 2000)
    assert {(report.lost, report.left) for report in reports} == {(0, 0)}
    assert reports[-1].stale > 0
