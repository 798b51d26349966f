"""Functions stay small: at most eight parameters, and forty lines below the docstring.

One that is larger has an entry here with the reason.  An entry that is no longer needed fails.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

import uffdaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(uffdaemon.__file__).parent

PARAMETERS = 8
LINES = 40

OPTIONS = "keyword-only options of a public function: an object for them would say less in a call"
KERNEL = "the fields of the kernel's struct, by name"

MANY_PARAMETERS = {
    "daemon.daemon.Daemon.guard": OPTIONS,
    "daemon.entry.open_daemon": OPTIONS,
    "native.scan": KERNEL,
}
MANY_LINES: dict[str, str] = {}

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Every function below `tree`, inner ones included, by its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from functions(node, name)
        else:
            yield from functions(node, prefix)


def parameters(function: Function) -> int:
    """How many arguments a caller can pass."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    variadic = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len(names) - (names[:1] in (["self"], ["cls"])) + len(variadic)


def lines(function: Function) -> int:
    """The lines of the body without the docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def all_functions() -> dict[str, Function]:
    found: dict[str, Function] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.update(functions(ast.parse(path.read_text()), module.removesuffix(".__init__")))
    return found


@pytest.mark.parametrize(
    ("measure", "most", "allowed"),
    [(parameters, PARAMETERS, MANY_PARAMETERS), (lines, LINES, MANY_LINES)],
    ids=["parameters", "lines"],
)
def test_functions_stay_small_or_say_why(
    measure: Callable[[Function], int], most: int, allowed: dict[str, str]
) -> None:
    sizes = {name: measure(function) for name, function in all_functions().items()}
    large = {name: size for name, size in sizes.items() if size > most}
    assert large.keys() == allowed.keys(), large


def test_what_is_measured() -> None:
    """Otherwise the other test could pass because it finds nothing."""
    tree = ast.parse(
        "class A:\n"
        "    def f(self, a, /, b, *c, d, **e):\n"
        "        '''Doc.\n\n        More.'''\n"
        "        async def g(): pass\n"
        "        if a:\n"
        "            def h(x): return x\n"
    )
    found = {
        name: (parameters(function), lines(function)) for name, function in functions(tree, "m")
    }
    assert found == {"m.A.f": (5, 3), "m.A.f.g": (0, 1), "m.A.f.h": (1, 1)}
    assert len(all_functions()) > 1000
