"""Every public name is in the API reference, with a docstring."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

import pytest

from tests.docs.test_blocks import BLOCKS
from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = ROOT / "docs" / "reference"
HOMES = sorted(
    name
    for page in PAGES.glob("*.rst")
    for name in re.findall(r"^\.\. (?:auto|py:)?module:: (\S+)", page.read_text(), re.MULTILINE)
)


def public_names(home: str) -> list[str]:
    module = importlib.import_module(home)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == home
    ]


def described(name: str, value: object) -> bool:
    """Values and aliases have no docstring, and that of a dataclass may be made up by itself."""
    if not isinstance(value, (type, ModuleType, FunctionType)):
        return True
    text = value.__doc__ or ""
    return bool(text) and not text.startswith(f"{name}(")


def test_the_homes_are_the_public_modules() -> None:
    assert "uffdaemon" in HOMES
    assert len(HOMES) == len(set(HOMES))


@pytest.mark.parametrize("home", HOMES)
def test_every_public_name_has_a_docstring(home: str) -> None:
    module = importlib.import_module(home)
    assert module.__doc__
    values = {name: getattr(module, name) for name in public_names(home)}
    assert [name for name, value in values.items() if not described(name, value)] == []


def test_every_public_name_is_in_the_reference() -> None:
    inventories = pytest.importorskip("sphinx.util.inventory", reason="no sphinx to build it with")
    trees, site = ROOT / "build" / "doctrees", ROOT / "build" / "docs"  # as `make docs` has it
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-qW", "-d", trees, ROOT / "docs", site],
        check=True,
        timeout=DEADLINE,
    )
    inventory = inventories.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    found = {name for kind in inventory.data if kind[:3] == "py:" for name in inventory.data[kind]}
    wanted = {f"{home}.{name}" for home in HOMES for name in public_names(home)}
    # A module within a home has a page of its own.
    assert sorted(wanted - found - set(HOMES)) == []


def programs() -> list[tuple[str, str]]:
    """The examples, and the Python of the pages."""
    found = [(path.name, path.read_text()) for path in sorted((ROOT / "examples").glob("*.py"))]
    return found + [(block.name, block.code) for block in BLOCKS if block.language == "python"]


def used_names(code: str) -> Iterator[tuple[str, str]]:
    """What a program takes from this library: (module, name)."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "uffdaemon":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("uffdaemon."):
                    yield ("uffdaemon", alias.name.removeprefix("uffdaemon."))
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "uffdaemon"
        ):
            yield ("uffdaemon", node.attr)


def test_docs_and_examples_use_public_names_only() -> None:
    public = {(home, name) for home in HOMES for name in public_names(home)}
    public |= {("uffdaemon", home.removeprefix("uffdaemon.")) for home in HOMES}
    used = {(where, *name) for where, code in programs() for name in used_names(code)}
    assert sorted(use for use in used if use[1:] not in public) == []
