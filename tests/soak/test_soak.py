"""Ten thousand moves of pages that threads write to, through everything that gets in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel import clib
from tests.kernel.harness import kernel_test
from tests.soak.bouncing import soak
from tests.soak.threads import build
from uffdaemon import Features

PROTECTED = Features.MOVE | Features.PAGEFAULT_FLAG_WP


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C side, compiled."""
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    return build(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("mover", ["strict", "ladder", "exact"])
@kernel_test(features=PROTECTED, deadline=60)
def test_nothing_is_lost_when_nobody_is_in_the_way(mover: str, writers: int, library: Path) -> None:
    report = soak(library, mover, writers, 1000)
    assert report.clean, report
    assert report.writes > 0 < report.reads


@pytest.mark.parametrize("mover", ["strict", "ladder"])
@pytest.mark.parametrize("disturbance", ["fork", "direct", "ring", "split"])
@kernel_test(features=PROTECTED, deadline=90)
def test_nothing_is_lost_when_somebody_is(mover: str, disturbance: str, library: Path) -> None:
    report = soak(library, mover, 3, 400, (disturbance,))
    assert report.clean, report
    if disturbance == "fork":
        assert any("shared" in name for name in report.outcomes), report


@pytest.mark.parametrize("mover", ["strict", "ladder", "exact"])
@pytest.mark.usefixtures("ksm", "swap")
@kernel_test(features=PROTECTED, deadline=90)
def test_nothing_is_lost_to_merging_and_swapping(mover: str, library: Path) -> None:
    report = soak(library, mover, 3, 600, ("ksm", "pageout", "fork"))
    assert report.clean, report
    assert report.happened["pageout"] > 0


@kernel_test(features=PROTECTED, deadline=60)
def test_a_copy_that_is_not_exact_is_seen_to_lose(library: Path) -> None:
    """Or else the tests above could not fail."""
    assert soak(library, "naive", 3, 1000).lost > 0


@kernel_test(features=PROTECTED, deadline=60)
def test_a_destination_that_is_not_protected_is_seen_to_show_the_past(library: Path) -> None:
    report = soak(library, "lopsided", 3, 2000)
    assert (report.lost, report.left) == (0, 0)
    assert report.stale > 0
