"""What is found, one by one and together, and its form for a machine.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdaemon.check.facts import Facts, Json

FORMAT: Final = 1
"""The number of the JSON form; another one means that keys were renamed or removed."""

CORE: Final = "core"
"""The key of the finding that decides whether this machine will do."""


class Mark(Enum):
    """What a finding comes to."""

    OK = "ok"
    LIMITED = "limited"
    """It is there, with less than it could give."""
    MISSING = "missing"
    UNKNOWN = "unknown"
    """It could not be found out."""


class Group(Enum):
    """Findings that belong together; the value is what a person reads above them."""

    CORE = "The core"
    OPEN = "Ways to open a userfaultfd"
    PERMISSION = "Permissions"
    FEATURE = "Features"
    OPERATION = "Operations"
    MEMORY = "Memory"


class Verdict(NamedTuple):
    """What one look at the facts says."""

    mark: Mark
    found: str
    """What was seen, in a few words."""
    mend: str = ""
    """The line that mends it; a command wherever there is one."""
    details: Mapping[str, Json] = {}
    """The same for a machine."""


class Finding(NamedTuple):
    """A verdict and what it is about."""

    key: str
    """The same in every release of this library."""
    group: Group
    title: str
    verdict: Verdict

    @property
    def mark(self) -> Mark:
        """What it comes to."""
        return self.verdict.mark


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found."""

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
        """Whether a userfaultfd can be opened, and a fault was answered with a copied page."""
        return self[CORE].mark in (Mark.OK, Mark.LIMITED)

    @property
    def summary(self) -> str:
        """One sentence."""
        match self[CORE].mark:
            case Mark.OK:
                return "The core works."
            case Mark.LIMITED:
                return (
                    "The core works, for faults raised in user mode only: system calls that touch "
                    "a missing page fail with EFAULT."
                )
            case Mark.MISSING | Mark.UNKNOWN:
                return "The core cannot work here."

    def to_json(self) -> dict[str, Json]:
        """The report for a machine; docs/privileges.md describes the keys."""
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
        "mend": verdict.mend,
        "details": dict(verdict.details),
    }
