"""What holds for the tests themselves: where they import from, and that there is one deadline."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TESTS = ROOT / "tests"
FOLDERS = {path.parent.name for path in TESTS.glob("*/__init__.py")}
MODULES = {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob("*.py"))}
LIMITED = {"run", "Popen", "wait", "communicate", "join", "result", "settimeout", "kernel_test"}
"""Calls that take a number of seconds after which something counts as hung."""
TIMED = {"fail_after", "fail_at", "move_on_after", "move_on_at", "monotonic"}


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call, with the last part of the name that is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def sets_a_limit(name: str, call: ast.Call) -> bool:
    given = [each.value for each in call.keywords if each.arg in ("timeout", "deadline")]
    if name in ("wait", "join", "result", "settimeout"):
        given += call.args
    numbers = (
        isinstance(each, ast.Constant) and isinstance(each.value, int | float) for each in given
    )
    return name in TIMED or (name in LIMITED and any(numbers))


def test_there_are_folders_and_modules() -> None:
    assert {"pure", "fake", "kernel", "daemon", "hangs", "support"} <= FOLDERS
    assert len(MODULES) > 100


def test_folders_share_nothing_but_through_support() -> None:
    """Neither by an import nor by a name that a child process imports."""
    offenders: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        named = set(re.findall(r"\btests(?:\.| import )(\w+)", path.read_text())) & FOLDERS
        if not named <= {name.partition("/")[0], "support"}:
            offenders[name] = named
    assert offenders == {}


def test_nothing_has_a_deadline_of_its_own() -> None:
    """DEADLINE of tests.support.deadline is for what hangs, and a test has no other limit.

    Programs under a sanitizer run for as many seconds as they were asked to.
    """
    assert [
        f"{name}:{call.lineno}: {ast.unparse(call)}"
        for name, path in MODULES.items()
        if not name.startswith("sanitize/")
        for called, call in calls_in(path)
        if sets_a_limit(called, call)
    ] == []


def test_hypothesis_has_one_profile() -> None:
    """tests.support.properties: without a deadline, and without the health check of speed."""
    assert [
        f"{name}:{call.lineno}: {ast.unparse(call)}"
        for name, path in MODULES.items()
        if name != "support/properties.py"
        for called, call in calls_in(path)
        if called == "settings"
        and {"deadline", "suppress_health_check"} & {each.arg for each in call.keywords}
    ] == []
