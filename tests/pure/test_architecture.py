"""The pure core stays pure, and imports point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import uffdaemon

PACKAGE = Path(uffdaemon.__file__).parent

PURE = (
    "features",
    "errors",
    "events",
    "outcomes",
    "causes",
    "pages",
    "actions",
    "region",
    "steps",
    "ladder",
    "regions",
    "policy",
    "plan",
    "lowering",
    "ledger",
    "repeats",
    "hooks",
    "statistics",
    "placement",
)
"""From the bottom up: each may import those before it, the standard library, and nothing else."""

SHELL = (
    "native",
    "copies",
    "opening",
    "uffd",
    "memory",
    "pagemap",
    "looking",
    "mover",
    "foretelling",
    "staging",
    "sources",
    "failing",
    "moving",
    "changes",
    "deciding",
    "handlers",
    "slow",
    "filling",
    "sleeping",
    "resolving",
    "watching",
    "post",
    "rulebook",
    "publishing",
    "guarded",
    "guarding",
    "leaving",
    "loop",
    "removing",
    "supervising",
    "reports",
    "plans",
    "inheritance",
    "listening",
    "external",
    "servers",
    "daemon",
    "serving",
    "__init__",
    "reporting",
    "worker",
    "check",
    "demo",
    "cli",
    "__main__",
)
"""What knows the kernel, trio or the log, in the same order."""

ORDER = (*PURE, *SHELL)

THERE = {path.stem for path in PACKAGE.glob("*.py")} | {
    path.parent.name for path in PACKAGE.glob("*/__init__.py")
}

IN_THE_WAY = """
import importlib, sys, types
package = types.ModuleType("uffdaemon")
package.__path__ = [sys.argv[1]]
sys.modules["uffdaemon"] = package  # its own __init__ imports everything
for name in sys.argv[2:]:
    importlib.import_module("uffdaemon." + name)
print(*sorted(sys.modules))
"""


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST) -> list[str]:
    """The modules that are imported when the program runs, wherever in the file that is said."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if is_for_types(node):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            assert node.module is not None
            if node.module == "uffdaemon":
                found += [f"uffdaemon.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
        else:
            found += imports(node)
    return found


def files_of(module: str) -> list[Path]:
    """The one file of a module, or all of a subpackage."""
    single = PACKAGE / f"{module}.py"
    return [single] if single.exists() else sorted((PACKAGE / module).glob("*.py"))


def own(module: str) -> set[str]:
    """The modules of this library that `module` imports."""
    found = set()
    for path in files_of(module):
        for name in imports(ast.parse(path.read_text())):
            first, _, rest = name.partition(".")
            if first == "uffdaemon":
                head = rest.partition(".")[0]
                found.add(head if head in THERE else "__init__")
    return found - {module}


def test_every_module_has_its_place() -> None:
    assert set(ORDER) == THERE
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down_only(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    assert own(module) <= set(below)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_needs_nothing_but_the_standard_library(module: str) -> None:
    [path] = files_of(module)
    named = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert named - {"uffdaemon"} <= sys.stdlib_module_names - {"asyncio", "socket", "threading"}


def test_nothing_else_is_loaded_with_them_either() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", IN_THE_WAY, str(PACKAGE), *PURE],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    ours = {name for name in loaded if name.startswith("uffdaemon.")}
    assert ours == {f"uffdaemon.{name}" for name in PURE}
    strangers = {"trio", "cffi", "_cffi_backend", "structlog", "asyncio"}
    assert not strangers & set(loaded)
