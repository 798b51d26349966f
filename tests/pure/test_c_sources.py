"""The C side is layered: no circle of calls between its files, and each includes what it uses."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import uffdaemon.native

NATIVE = Path(uffdaemon.native.__file__).parent
SOURCES = sorted(path for path in NATIVE.glob("*.c") if path.name != "_native.c")
HEADERS = sorted(NATIVE.glob("*.h"))
ALL = "native.h"
"""The header for Python, which includes all others."""
MOST_LINES = 300

pytestmark = pytest.mark.skipif(not SOURCES, reason="installed without its C sources")


def code_of(path: Path) -> str:
    """The text without comments and string literals."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(
        r'"(?:[^"\\\n]|\\.)*"', lambda found: found[0] if ".h" in found[0] else '""', text
    )


def includes_of(path: Path) -> set[str]:
    return set(re.findall(r'^#include "(\w+\.h)"', code_of(path), re.MULTILINE))


def declared_in(header: Path) -> set[str]:
    """Functions, and variables that are `extern`."""
    code = code_of(header)
    return {
        *re.findall(r"^(?!static|\s)[\w \t*]*?\b(uffdaemon_\w+)\(", code, re.MULTILINE),
        *re.findall(r"^extern [\w \t]*?\b(uffdaemon_\w+);", code, re.MULTILINE),
    }


HOMES = {name: header.stem for header in HEADERS for name in declared_in(header)}
"""Where each name that files share is declared."""


def homes_used_by(source: Path) -> set[str]:
    names = set(re.findall(r"\buffdaemon_\w+", code_of(source)))
    return {HOMES[name] for name in names & HOMES.keys()} - {source.stem}


def test_names_are_found() -> None:
    assert HOMES["uffdaemon_now"] == "base"
    assert HOMES["uffdaemon_serve"] == "serve"
    assert HOMES["uffdaemon_tables_replaced"] == "table"
    assert "base" in homes_used_by(NATIVE / "serve.c")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_what_is_shared_is_declared_in_the_header_of_its_file(source: Path) -> None:
    defined = set(
        re.findall(
            r"^(?!static|extern|\s)[\w \t*]*?\b(uffdaemon_\w+)\(", code_of(source), re.MULTILINE
        )
    )
    assert defined
    assert {HOMES.get(name) for name in defined} == {source.stem}


def test_calls_between_files_make_no_circle() -> None:
    calls = {source.stem: homes_used_by(source) for source in SOURCES}
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_includes_make_no_circle() -> None:
    TopologicalSorter({header.name: includes_of(header) for header in HEADERS}).prepare()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_file_includes_what_it_uses(source: Path) -> None:
    included = includes_of(source)
    assert ALL not in included
    assert f"{source.stem}.h" in included
    included |= includes_of(source.with_suffix(".h"))
    assert {f"{home}.h" for home in homes_used_by(source)} - included == set()


@pytest.mark.parametrize("path", [*SOURCES, *HEADERS], ids=lambda path: path.name)
def test_a_file_is_short_and_names_its_licence(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "/* SPDX-License-Identifier: Apache-2.0 */"
    assert len(lines) <= MOST_LINES


def test_all_files_are_built() -> None:
    built = re.findall(r'^    "(\w+\.c)",$', (NATIVE / "build.py").read_text(), re.MULTILINE)
    assert sorted(built) == [source.name for source in SOURCES]
