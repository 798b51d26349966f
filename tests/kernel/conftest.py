"""Fixtures of the kernel tier, and its table of conformance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import clib, system
from tests.kernel.table import Table
from uffdaemon import MemoryType

_TABLE = Table()


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
    with system.transparent_huge_pages():
        yield


@pytest.fixture
def ksm() -> Iterator[None]:
    with system.ksm():
        yield


@pytest.fixture(scope="session")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """helpers.c, compiled."""
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    return clib.build(tmp_path_factory.mktemp("helpers"))


# -- the table of conformance ------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(name): does what the kernel's own test does")


def pytest_itemcollected(item: pytest.Item) -> None:
    _TABLE.collected(item)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _TABLE.reported(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TABLE.results:
        terminalreporter.section("conformance with the kernel's own userfaultfd tests")
        terminalreporter.write_line(_TABLE.text())
