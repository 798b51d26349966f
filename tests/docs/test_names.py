"""Every module, file and folder that the documentation names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.test_blocks import FILE, PAGES
from tests.support.paths import ROOT

PAGES_WITH_NAMES = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "tests/README.md")),
]
FOLDERS = ["", "uffdaemon", "uffdaemon/native", "tests", "examples", "docs"]
"""Where a path may start."""
PATH = re.compile(r"`([\w./-]*(?:/|\w\.(?:py|c|h|md|rs|go|svg|toml)))`")
DOTTED = re.compile(r"\buffdaemon(?:\.[A-Za-z_]\w*)+")
MADE = {"build/docs", "dist/"}
OF_THE_KERNEL = re.compile(r"tools/testing/|uffd-stress\.c$")


def resolve(name: str) -> object:
    """The module or attribute with a dotted name.  Raises ImportError or AttributeError."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def exists(path: str, page: Path) -> bool:
    return (
        any((ROOT / folder / path).exists() for folder in FOLDERS) or (page.parent / path).exists()
    )


def test_names_are_found() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert {"ports/endpoint.py", "affinity.c", "model/"} <= set(PATH.findall(text))
    assert DOTTED.findall("`uffdaemon.Memory.map`.") == ["uffdaemon.Memory.map"]
    assert not exists("no/such.py", ROOT / "README.md")
    with pytest.raises(AttributeError):
        resolve("uffdaemon.no_such_name")


@pytest.mark.parametrize("page", PAGES_WITH_NAMES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    if not (ROOT / "uffdaemon").exists():
        pytest.skip("the package was installed: its sources are not here")
    text = page.read_text()
    written = {
        name
        for block in re.findall(r"```python\n(.*)", text)
        for name in FILE.findall(block + "\n")
    }
    named = {name for name in PATH.findall(text) if not OF_THE_KERNEL.match(name)}
    assert [name for name in sorted(named - written - MADE) if not exists(name, page)] == []


@pytest.mark.parametrize("page", PAGES_WITH_NAMES, ids=lambda page: page.name)
def test_modules_and_names_exist(page: Path) -> None:
    for name in sorted(set(DOTTED.findall(page.read_text()))):
        resolve(name)
