"""The table of conformance, printed at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kernel.table import Table

if TYPE_CHECKING:
    import pytest

_TABLE = Table()


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
