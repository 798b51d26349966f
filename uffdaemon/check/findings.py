"""The report and its findings, and their JSON form.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdaemon.check.facts import Facts, Json

FORMAT: Final = 1
"""The version of the JSON form.  It changes when a key is renamed or removed."""

CORE: Final = "core"
"""The key of the finding that decides whether uffdaemon works on this machine."""


class Mark(Enum):
    """The result of a check."""

    OK = "ok"
    LIMITED = "limited"
    """It works in part."""
    MISSING = "missing"
    UNKNOWN = "unknown"
    """The check itself failed."""


class Group(Enum):
    """Findings that belong together; the value is their heading."""

    CORE = "The core"
    OPEN = "Ways to open a userfaultfd"
    PERMISSION = "Permissions"
    FEATURE = "Features"
    OPERATION = "Operations"
    MEMORY = "Memory"


class Verdict(NamedTuple):
    """The result of a check, with the reason."""

    mark: Mark
    found: str
    """What was found, in a few words."""
    fix: str = ""
    """How to get what is missing, in one line; a command if there is one."""
    details: Mapping[str, Json] = {}
    """What was found, as values."""


class Finding(NamedTuple):
    """A verdict and its subject."""

    key: str
    """It stays the same from release to release."""
    group: Group
    title: str
    verdict: Verdict

    @property
    def mark(self) -> Mark:
        """The mark of its verdict."""
        return self.verdict.mark


@dataclass(frozen=True, slots=True)
class Report:
    """All findings."""

    uffdaemon: str
    """The version of this library."""
    facts: Facts
    findings: tuple[Finding, ...]

    def __getitem__(self, key: str) -> Finding:
        for finding in self.findings:
            if finding.key == key:
                return finding
        raise KeyError(key)

    @property
    def works(self) -> bool:
        """Whether a userfaultfd was opened, and a fault was resolved by copying a page."""
        return self[CORE].mark in (Mark.OK, Mark.LIMITED)

    @property
    def summary(self) -> str:
        """One sentence."""
        match self[CORE].mark:
            case Mark.OK:
                return "The core works."
            case Mark.LIMITED:
                return (
                    "The core works, for faults in user mode only: system calls that touch a "
                    "missing page fail with EFAULT."
                )
            case Mark.MISSING | Mark.UNKNOWN:
                return "The core does not work here."

    def to_json(self) -> dict[str, Json]:
        """The report for a program; docs/privileges.md describes the keys."""
        facts = self.facts
        return {
            "format": FORMAT,
            "works": self.works,
            "summary": self.summary,
            "uffdaemon": self.uffdaemon,
            "kernel": {"release": facts.release, "machine": facts.machine},
            "user": {"uid": facts.uid, "name": facts.user},
            "container": facts.container,
            "findings": {finding.key: _finding_json(finding) for finding in self.findings},
        }


def _finding_json(finding: Finding) -> dict[str, Json]:
    verdict = finding.verdict
    return {
        "group": finding.group.name.lower(),
        "title": finding.title,
        "mark": verdict.mark.value,
        "found": verdict.found,
        "mend": verdict.fix,  # FORMAT promises the key
        "details": dict(verdict.details),
    }
