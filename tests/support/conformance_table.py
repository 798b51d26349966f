"""The table of conformance: name of the kernel's test x type of memory x result."""

from __future__ import annotations

import pytest

from uffdaemon import MemoryType

ALL = tuple(MemoryType)
SHARED = (MemoryType.SHMEM, MemoryType.HUGETLB)
SHMEM = (MemoryType.SHMEM,)
ANONYMOUS = (MemoryType.ANONYMOUS,)

KERNEL_TESTS = {
    "register-ioctls": ALL,
    "zeropage": ALL,
    "move": ANONYMOUS,
    "move-pmd": ANONYMOUS,
    "move-pmd-split": ANONYMOUS,
    "wp-fork": ALL,
    "wp-fork-with-event": ALL,
    "wp-unpopulated": ANONYMOUS,
    "minor": SHARED,
    "minor-wp": SHARED,
    "minor-collapse": SHMEM,
    "sigbus": ALL,
    "sigbus-wp": ALL,
    "events": ALL,
    "events-wp": ALL,
    "poison": ALL,
    "mmap-changing": ALL,
    "uffd-stress": ALL,
}
"""Linux's own tests and the types of memory that they cover, in its order; of mmap-changing it
covers shmem alone, and uffd-stress is a program of its own."""

TYPES = [kind.value for kind in MemoryType]
_KEY = "conformance"


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

    # -- as a plugin of pytest -----------------------------------------------------------------

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.collected(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reported(report)
