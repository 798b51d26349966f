"""Each public name has one home, and importing the package loads next to nothing."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import uffdaemon

if TYPE_CHECKING:
    from types import ModuleType

HOMES = ("actions", "errors", "lowlevel", "moves")
LAZY = ("uffdaemon", "uffdaemon.moves")

LOADED = "import sys; before = set(sys.modules); {}; print(*sorted(set(sys.modules) - before))"


def home(name: str) -> ModuleType:
    return importlib.import_module(name)


def loaded_by(statement: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter."""
    command = [sys.executable, "-c", LOADED.format(statement)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def for_checkers(module: ModuleType) -> dict[str, list[str]]:
    """What type checkers see a home import, by the module it comes from."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module != "uffdaemon":
                    found.setdefault(str(line.module), []).extend(n.name for n in line.names)
    return found


def test_nothing_else_shows() -> None:
    importlib.import_module("uffdaemon.engine.decide")  # binds `engine` in the package
    assert dir(uffdaemon) == sorted([*uffdaemon.__all__, *HOMES])
    moves = home("uffdaemon.moves")
    assert dir(moves) == sorted(moves.__all__)


@pytest.mark.parametrize("name", LAZY)
def test_checkers_and_the_interpreter_see_the_same(name: str) -> None:
    module, imports = home(name), for_checkers(home(name))
    assert imports == {source: list(names) for source, names in module._MODULES.items()}
    assert sorted(module.__all__) == sorted(n for names in imports.values() for n in names)
    for source, names in imports.items():
        for public in names:
            assert getattr(module, public) is getattr(home(source), public)


def test_a_thing_has_one_home() -> None:
    homes = [home("uffdaemon"), *(home(f"uffdaemon.{name}") for name in HOMES)]
    found = Counter(
        id(value)
        for module in homes
        for name, value in ((name, getattr(module, name)) for name in dir(module))
        if name in getattr(module, "__all__", ())
    )
    assert found
    assert set(found.values()) == {1}


def test_a_name_that_is_not_there() -> None:
    for name in LAZY:
        with pytest.raises(AttributeError, match=f"^module '{name}' has no attribute 'Pony'$"):
            getattr(home(name), "Pony")  # noqa: B009  # to checkers it is an error


def test_the_version_is_that_of_the_distribution() -> None:
    assert uffdaemon.__version__ == importlib.metadata.version("uffdaemon")


def test_the_package_alone_loads_next_to_nothing() -> None:
    ours = {name for name in loaded_by("import uffdaemon") if name.startswith("uffdaemon")}
    assert ours == {"uffdaemon", "uffdaemon.lazy"}
    strangers = {name.partition(".")[0] for name in loaded_by("import uffdaemon")}
    assert not strangers & {
        "trio",
        "structlog",
        "cffi",
        "numpy",
        "asyncio",
        "email",
        "_cffi_backend",
    }


def test_what_a_program_with_a_daemon_does_not_need_is_not_loaded() -> None:
    found = loaded_by("from uffdaemon import *; from uffdaemon.moves import *")
    assert {"trio", "uffdaemon.daemon.daemon", "uffdaemon.moves.staging"} <= found
    packages = {".".join(name.split(".")[:2]) for name in found}
    ours = {"uffdaemon.check", "uffdaemon.cli", "uffdaemon.demo", "uffdaemon.worker"}
    assert not packages & {*ours, "numpy", "importlib.metadata"}


def test_userfaultfds_need_no_event_loop() -> None:
    found = {name.partition(".")[0] for name in loaded_by("import uffdaemon.lowlevel")}
    assert not found & {"trio", "structlog", "asyncio", "numpy"}
