"""`uffdaemon check`: what this kernel and this user can do, and what mends what is missing.

`gather` reads files and tries things in child processes (`probes`, `isolation`); everything after
it is pure: `facts` go through `judging` (with `opening`, `abilities`, `mends`) into a `Report` of
`findings`, which `text` renders for a person and `Report.to_json` for a machine.  Nothing on the
machine is changed, and whatever goes wrong is a finding.
"""

from __future__ import annotations

from uffdaemon import __version__
from uffdaemon.check.findings import Finding, Group, Mark, Report, Verdict
from uffdaemon.check.gather import gather
from uffdaemon.check.judging import judge
from uffdaemon.check.text import render

__all__ = ["Finding", "Group", "Mark", "Report", "Verdict", "examine", "render"]


def examine() -> Report:
    """Look at this machine and this user.  Takes well under a second; raises nothing."""
    return judge(gather(), __version__)
