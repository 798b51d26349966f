"""Fixtures of the daemon's kernel tests: settings of the machine, and the library in C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import clib, system
from uffdaemon.memory import MemoryType


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


@pytest.fixture(scope="session")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """helpers.c, compiled."""
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    return clib.build(tmp_path_factory.mktemp("helpers"))
