"""The table of conformance: name of the kernel's test x type of memory x result.

``python -m tests.kernel.table`` runs the conformance suite and writes docs/conformance.md.
"""

from __future__ import annotations

import platform
import re
import sys
import textwrap

import pytest

from tests.kernel.conformance import KERNEL_TESTS
from tests.support.paths import ROOT
from uffdaemon import MemoryType
from uffdaemon.lowlevel import supported_features

DOCUMENT = ROOT / "docs" / "conformance.md"
TYPES = [kind.value for kind in MemoryType]
_KEY = "conformance"

_INTRODUCTION = """\
# Conformance

You want to know whether the library passes the kernel's own tests of userfaultfd. Linux has a
suite, `tools/testing/selftests/mm/uffd-unit-tests.c` and `uffd-stress.c`. The tests in
`tests/kernel/test_conformance_*.py` check the same through the public API of uffdaemon: each named
test, on each type of memory that the kernel's test covers (`-` marks the others), and
`mmap-changing` on all types. `UFFDIO_API` needs no memory and is tested for both ways of opening.

Left out: `rwp-*`, which comes with Linux 7.3, and `wp-fork-pin*`, which needs a kernel built with
`CONFIG_GUP_TEST`.
"""


class Table:
    """Collects results while tests run."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], str] = {}
        self.reasons: dict[str, list[str]] = {}

    def collected(self, item: pytest.Item) -> None:
        """Note the place of a test in the table, if it has one."""
        marker = item.get_closest_marker(_KEY)
        if marker is not None and isinstance(item, pytest.Function):
            item.user_properties.append((_KEY, f"{marker.args[0]} on {item.callspec.id}"))

    def reported(self, report: pytest.TestReport) -> None:
        """Note a result."""
        for key, place in report.user_properties:
            if key != _KEY or (report.when != "call" and report.passed):
                continue
            name, _, column = str(place).partition(" on ")
            self.results[name, column] = {"passed": "pass", "skipped": "skip"}.get(
                report.outcome, "FAIL"
            )
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = str(report.longrepr[2]).removeprefix("Skipped: ")
                self.reasons.setdefault(reason, []).append(f"{name} on {column}")

    def text(self) -> str:
        """In Markdown: the table, what needs no memory, and why what was skipped was."""
        ran = {name for name, _ in self.results}
        rows = [["test", *TYPES]]
        for name, types in KERNEL_TESTS.items():
            if name in ran:
                covered = {kind.value for kind in types}
                cells = (
                    self.results.get((name, column), "not run") if column in covered else "-"
                    for column in TYPES
                )
                rows.append([name, *cells])
        rest = [
            f"{name} ({column}): {result}"
            for (name, column), result in self.results.items()
            if column not in TYPES
        ]
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        rows.insert(1, ["-" * width for width in widths])
        padded = ([cell.ljust(at) for cell, at in zip(row, widths, strict=True)] for row in rows)
        lines = [f"| {' | '.join(row)} |" for row in padded]
        skipped = [f"{reason}: {', '.join(where)}" for reason, where in self.reasons.items()]
        for paragraph in (rest, skipped):
            lines += ["", *(f"- {line}" for line in paragraph)] if paragraph else []
        return "\n".join(lines)

    def document(self) -> str:
        """All of docs/conformance.md."""
        release = re.match(r"[\d.]+", platform.release())
        assert release is not None
        features = ", ".join(supported_features().names)
        machine = f"Run on Linux {release.group()} ({platform.machine()}), which has {features}."
        return (
            f"{_INTRODUCTION}\n{self.text()}\n\n{textwrap.fill(machine, 100)}\n\n"
            "The suite writes this page: `.venv/bin/python -m tests.kernel.table`.\n"
        )

    # -- as a plugin of pytest -----------------------------------------------------------------

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.collected(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reported(report)


def main() -> int:
    table = Table()
    status = pytest.main([str(ROOT / "tests/kernel"), "-q", "-m", _KEY], plugins=[table])
    if table.results:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(table.document())
    return status


if __name__ == "__main__":
    sys.exit(main())
