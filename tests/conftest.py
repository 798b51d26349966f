"""What all tests share: what a machine must have for them, lent by it or skipped with the reason.

Whatever is changed for them is put back when they have run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import clib, system
from tests.support.conformance_table import Table
from tests.support.properties import load_profile
from tests.support.requirements import require
from uffdaemon import MemoryType
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

load_profile()
_TABLE = Table()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(name): does what the kernel's own test does")


# Where tests run side by side, the results come together in a process that collects no tests: it
# loads this file and no other conftest.py.
def pytest_itemcollected(item: pytest.Item) -> None:
    _TABLE.collected(item)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _TABLE.reported(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TABLE.results:
        terminalreporter.section("conformance with the kernel's own userfaultfd tests")
        terminalreporter.write_line(_TABLE.text())


@pytest.fixture(autouse=True)
def _kernel_or_its_reason(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("kernel")
    if marker is not None:
        require(Features(0), **marker.kwargs)


@pytest.fixture(scope="session")
def huge_pages() -> Iterator[None]:
    """A pool of huge pages for as long as the tests run."""
    with system.huge_pages():
        yield


@pytest.fixture(autouse=True)
def _huge_pages_where_needed(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    parameters = callspec.params.values() if callspec is not None else ()
    if any(isinstance(value, MemoryType) and value.huge for value in parameters):
        request.getfixturevalue("huge_pages")


@pytest.fixture
def transparent_huge_pages() -> Iterator[None]:
    """MADV_HUGEPAGE is listened to."""
    with system.transparent_huge_pages():
        yield


@pytest.fixture
def shmem_huge_pages() -> Iterator[None]:
    """Shared memory has transparent huge pages."""
    with system.shmem_huge_pages():
        yield


@pytest.fixture
def ksm() -> Iterator[None]:
    """KSM merges at once what is MADV_MERGEABLE."""
    with system.ksm():
        yield


@pytest.fixture
def swap() -> Iterator[None]:
    """There is something to swap to."""
    with system.swap():
        yield


@pytest.fixture(scope="session")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """helpers.c, compiled."""
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    return clib.build(tmp_path_factory.mktemp("helpers"))
