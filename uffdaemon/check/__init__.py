"""`uffdaemon check`: what this kernel and this user can do, and how to get what is missing.

`machine` collects the `facts`: it reads files, and runs `probes` in child processes (`isolation`).
The rest is pure.  `checklist` turns the facts into a `Report` of `findings`, with the verdicts of
`permissions` and `facilities` and the `fixes` that they suggest.  `text` renders the report for a
person, `Report.to_json` for a program.  The machine is not changed, and every error is a finding.

Imports `native`, `uapi`, `kernel`, `errors` and `ranges`; knows no daemon.
"""

from __future__ import annotations

from uffdaemon import __version__
from uffdaemon.check.checklist import run
from uffdaemon.check.findings import Finding, Group, Mark, Report, Verdict
from uffdaemon.check.machine import collect
from uffdaemon.check.text import render

__all__ = ["Finding", "Group", "Mark", "Report", "Verdict", "examine", "render"]


def examine() -> Report:
    """Check this machine and this user.  Takes well under a second, and never raises."""
    return run(collect(), __version__)
