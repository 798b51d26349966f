"""The way of a fault: one record, in by one door and out by one, and nobody climbs back up.

Read from the sources, so that a second way is found when it is written.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import uffdaemon
from uffdaemon.handlers import Handler
from uffdaemon.model.ledger import Ledger

PACKAGE = Path(uffdaemon.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
REMOVERS = {"pop", "popitem", "clear", "__delitem__"}


def functions(text: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    return {
        node.name: node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def names_records(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "_records"


def removes_or_replaces(function: ast.AST) -> bool:
    """Whether a record leaves the mapping here, in whatever way Python has for that."""
    for node in ast.walk(function):
        if isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and names_records(target.value):
                    return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in REMOVERS
            and names_records(node.func.value)
        ):
            return True
        if isinstance(node, ast.Assign) and any(map(names_records, node.targets)):
            return True
        if isinstance(node, ast.AnnAssign) and names_records(node.target):
            return True
    return False


def calls(text: str, method: str) -> list[str]:
    """The functions of a file that call `method` of something."""
    return [
        name
        for name, function in functions(text).items()
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
        and "ledger" in ast.unparse(node.func.value)
    ]


def test_a_record_leaves_in_one_function() -> None:
    ledger = SOURCES["model/ledger.py"]
    removing = [name for name, node in functions(ledger).items() if removes_or_replaces(node)]
    assert removing == ["__init__", Ledger.leave.__name__]


def test_a_second_way_out_would_be_found() -> None:
    second = "def close(self):\n    self._records.clear()\n"
    assert removes_or_replaces(ast.parse(second))
    assert removes_or_replaces(ast.parse("self._records = {}"))
    assert removes_or_replaces(ast.parse("del self._records[key]"))
    assert not removes_or_replaces(ast.parse("self._records[key] = record"))


def test_only_the_ledger_touches_its_records() -> None:
    assert [
        name
        for name, text in SOURCES.items()
        if not name.startswith("native") and re.search(r"\._records\b", text)
    ] == ["model/ledger.py"]


@pytest.mark.parametrize(
    ("method", "function"), [("leave", Handler.resolve.__name__), ("enter", "_enter")]
)
def test_the_ledger_is_entered_and_left_by_one_function_of_the_handler(
    method: str, function: str
) -> None:
    found = {name: calls(text, method) for name, text in SOURCES.items()}
    assert {name: where for name, where in found.items() if where} == {"handlers.py": [function]}


def test_only_the_handler_touches_its_batch() -> None:
    owners = [name for name, text in SOURCES.items() if "._batch" in text or "._apart" in text]
    assert owners == ["handlers.py"]


def test_no_attribute_of_the_handler_is_filled_from_outside() -> None:
    for name, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute):
                    assert not ast.unparse(target.value).endswith("handler"), (name, target.lineno)


def test_the_engine_does_not_know_the_handler() -> None:
    for name, text in SOURCES.items():
        if name.startswith("engine/"):
            assert "import Handler" not in text
