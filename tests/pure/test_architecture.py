"""The folders are the architecture: imports point down, and the pure part stays pure.

The order is one of packages and of the modules beside them.  What a package holds is read from the
disk, so that a new module is covered from its first line.  Inside a package the modules' imports
must not go round in a circle either.  Imports for type checkers count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import uffdaemon

PACKAGE = Path(uffdaemon.__file__).parent

FLOORS = (
    "lazy",
    "names",
    "log",
    "native",
    "uapi",
    "errors",
    "ranges",
    "arguments",
    "kernel",
    "actions",
    "model",
    "policy",
    "hooks",
    "placement",
    "sources",
    "journal",
    "keeper",
    "moves",
    "ports",
    "guard",
    "engine",
    "handlers",
    "rules",
    "loop",
    "external",
    "lowlevel",
    "daemon",
    "__init__",
    "worker",
    "check",
    "demo",
    "cli",
    "__main__",
)
"""From the bottom up: each may import what stands before it."""

CIRCLES = {
    ("actions", "model.region"): "an action names the fault it is for, and a fault its region"
}
"""Modules that know each other's types, and why that cannot be otherwise."""

PURE = (
    "lazy",
    "names",
    "uapi",
    "errors",
    "ranges",
    "arguments",
    "actions",
    "model",
    "policy",
    "hooks",
    "placement",
)
PURE_MODULES = ("moves.ladder", "moves.refusals", "moves.requests", "rules.lowering")
"""What decides without a system call, in packages that also carry out."""

BOOK = ("native", "native.page_book", "native._native", "native._native.lib")
"""The page book in C, which `model.page_map` views: memory and bits, nothing of the kernel."""

LONGEST = 400
"""Lines of a module."""
MOST = 16
"""Modules in a package."""

IN_THE_WAY = """
import importlib, sys, types
package = types.ModuleType("uffdaemon")
package.__path__ = [sys.argv[1]]
sys.modules["uffdaemon"] = package  # its own __init__ imports everything
for name in sys.argv[2:]:
    importlib.import_module("uffdaemon." + name)
print(*sorted(sys.modules))
"""


def module_of(path: Path) -> str:
    """``engine.decide``; a package is called like its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> list[str]:
    """The modules that a file imports, wherever in it and for whatever that is said."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def runtime(tree: ast.AST) -> ast.Module:
    """The same file without what only type checkers read."""

    class Cut(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node

    cut = Cut().visit(tree)
    assert isinstance(cut, ast.Module)
    return cut


def own(module: str, tree: ast.AST | None = None) -> set[str]:
    """The modules of this library that `module` imports."""
    tree = ast.parse(MODULES[module].read_text()) if tree is None else tree
    found = set()
    for name in imports(tree):
        first, _, rest = name.partition(".")
        if first != "uffdaemon":
            continue
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]  # a name that the module defines
        found.add(rest or "__init__")
    return found - {module}


def floor(module: str) -> int:
    return FLOORS.index(module.partition(".")[0])


def is_circle(module: str, other: str) -> bool:
    return (module, other) in CIRCLES or (other, module) in CIRCLES


def is_pure(module: str) -> bool:
    return module.partition(".")[0] in PURE or module in PURE_MODULES


def test_every_module_stands_on_a_floor() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set(FLOORS)
    assert len(FLOORS) == len(set(FLOORS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    above = {other for other in own(module) if floor(other) > floor(module)}
    assert not {other for other in above if not is_circle(module, other)}


def test_no_circle_inside_a_package() -> None:
    graph = {
        module: {other for other in own(module) if not is_circle(module, other)}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_circles_that_are_allowed_are_there() -> None:
    for module, other in CIRCLES:
        assert other in own(module)
        assert module in own(other)


@pytest.mark.parametrize("package", [name for name in FLOORS if name in MODULES])
def test_a_package_says_what_lives_there(package: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert text


def test_modules_and_packages_stay_small() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > LONGEST}
    sizes: dict[str, int] = {}
    for module in MODULES:
        package, dot, _ = module.partition(".")
        if dot and package != "native":
            sizes[package] = sizes.get(package, 0) + 1
    assert not {package: count for package, count in sizes.items() if count > MOST}


def stem(name: str) -> str:
    """What is left of a name without the ending that makes it a plural or an activity."""
    for ending in ("ings", "ing", "ers", "er", "ed", "es", "s", "e", "ment"):
        if name.endswith(ending) and len(name) - len(ending) >= 4:
            return name.removesuffix(ending)
    return name


def test_no_two_modules_differ_by_an_ending() -> None:
    names: dict[str, set[str]] = {}
    for module in MODULES:
        for name in module.split("."):
            names.setdefault(stem(name), set()).add(name)
    assert not {key: sorted(group) for key, group in names.items() if len(group) > 1}


@pytest.mark.parametrize("module", [module for module in MODULES if is_pure(module)])
def test_a_pure_module_needs_nothing_but_the_standard_library(module: str) -> None:
    tree = runtime(ast.parse(MODULES[module].read_text()))
    named = {name.partition(".")[0] for name in imports(tree)}
    assert named - {"uffdaemon"} <= sys.stdlib_module_names - {"asyncio", "socket", "threading"}
    beside = {other for other in own(module, tree) if not is_pure(other)}
    assert beside == ({"native.page_book"} if module == "model.page_map" else set())


def test_nothing_else_is_loaded_with_them_either() -> None:
    pure = [module for module in MODULES if is_pure(module)]
    loaded = subprocess.run(
        [sys.executable, "-c", IN_THE_WAY, str(PACKAGE), *pure],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    ours = {name.removeprefix("uffdaemon.") for name in loaded if name.startswith("uffdaemon.")}
    assert {name for name in ours if not is_pure(name)} <= {"moves", "rules", *BOOK}
    strangers = {"trio", "structlog", "asyncio", "socket"}
    assert not strangers & set(loaded)
