"""The report as text, for a person.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon.check.findings import Finding, Group, Mark, Report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COLOURS: Final = {
    Mark.OK: "32",
    Mark.LIMITED: "33",
    Mark.MISSING: "31",
    Mark.UNKNOWN: "35",
}
_MARK_WIDTH: Final = max(len(mark.value) for mark in Mark)
_INDENT: Final = " " * (_MARK_WIDTH + 4)


def render(report: Report, *, colour: bool = False) -> str:
    """One line for each finding, by group, with its mark; below it the fix, if there is one."""
    return "\n".join(_lines(report, colour=colour)) + "\n"


def _lines(report: Report, *, colour: bool) -> Iterator[str]:
    facts = report.facts
    where = f", in a container ({facts.container})" if facts.container else ""
    yield (
        f"uffdaemon {report.uffdaemon} on Linux {facts.release} ({facts.machine}), "
        f"as {facts.user}{where}"
    )
    for group in Group:
        findings = _merged([finding for finding in report.findings if finding.group is group])
        width = max((len(finding.title) for finding in findings), default=0)
        yield ""
        yield group.value
        for finding in findings:
            verdict = finding.verdict
            mark = verdict.mark.value.ljust(_MARK_WIDTH)
            if colour:
                mark = f"\x1b[{_COLOURS[verdict.mark]}m{mark}\x1b[0m"
            # An error's text may have several lines.
            yield f"  {mark}  {finding.title.ljust(width)}  {' '.join(verdict.found.split())}"
            if verdict.fix:
                yield f"{_INDENT}fix: {verdict.fix}"
    yield ""
    yield report.summary


def _merged(findings: Sequence[Finding]) -> Sequence[Finding]:
    """A single line for a group whose findings are all unknown, for the same reason."""
    reasons = {(finding.mark, finding.verdict.found) for finding in findings}
    if len(findings) > 1 and len(reasons) == 1 and findings[0].mark is Mark.UNKNOWN:
        return [findings[0]._replace(title=f"all {len(findings)}")]
    return findings
