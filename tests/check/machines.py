"""Facts of imaginary machines, as input for the checks."""

from __future__ import annotations

import errno
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from uffdaemon.check.checklist import run
from uffdaemon.check.facts import (
    HUGETLB,
    KSM_RUN,
    MISC_DEVICE,
    OVERCOMMIT,
    STATUS,
    SWAPS,
    SYSCTL,
    THP,
    UID_MAP,
    Attempt,
    Device,
    Facts,
    Reading,
)
from uffdaemon.uapi.features import SINCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdaemon.check.findings import Finding, Mark, Report

ALL_BITS = sum(int(feature) for feature in SINCE)
PTRACE = 1 << 19
WORKED = Attempt(worked=True)
NO_FILES: Mapping[str, str | None] = {}


def report_on(facts: Facts) -> Report:
    return run(facts, "1.0")


def marks(report: Report, mark: Mark) -> set[str]:
    return {finding.key for finding in report.findings if finding.mark is mark}


def finding(facts: Facts, key: str) -> Finding:
    return report_on(facts)[key]


def refused(name: str) -> Attempt:
    if name == "SIGSYS":
        return Attempt(text="killed by SIGSYS", signal=signal.SIGSYS)
    return Attempt(number=getattr(errno, name), text=f"userfaultfd: {name}")


def status(capabilities: int = 0, seccomp: int = 0) -> str:
    return f"Name:\tpython\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\n"


def with_files(facts: Facts, files: Mapping[str, str | None]) -> Facts:
    readings = {path: Reading(text) for path, text in files.items()}
    return replace(facts, files={**facts.files, **readings})


def with_attempts(facts: Facts, **attempts: Attempt) -> Facts:
    return replace(facts, attempts={**facts.attempts, **attempts})


def everything() -> Facts:
    """Root on a new kernel that has everything."""
    sizes = {"2048": ("8", "6", "1", "0"), "1048576": ("1", "1", "0", "0")}
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages")
    facts = Facts(
        release="7.3.0-1-amd64",
        machine="x86_64",
        uid=0,
        user="root",
        group="root",
        interpreter="/usr/bin/python3.11",
        device=Device(
            exists=True, is_device=True, mode=0o600, owner="root", group="root", accessible=True
        ),
        attempts={
            "syscall": WORKED,
            "user_mode": WORKED,
            "device": WORKED,
            "features": Attempt(worked=True, details={"bits": ALL_BITS}),
            "event_fork": WORKED,
            "core": Attempt(worked=True, details={"how": "syscall", "kernel_faults": True}),
            "move": WORKED,
            "pagemap_scan": WORKED,
            "pidfd_getfd": Attempt(worked=True, details={"other_process": ""}),
        },
    )
    return with_files(
        facts,
        {
            SYSCTL: "0\n",
            STATUS: status(PTRACE),
            UID_MAP: "         0          0 4294967295\n",
            OVERCOMMIT: "0\n",
            SWAPS: "Filename Type Size Used Priority\n/dev/vda2 partition 2097148 0 -2\n",
            MISC_DEVICE: "10:126\n",
            f"{THP}/enabled": "always [madvise] never\n",
            f"{THP}/defrag": "always defer defer+madvise [madvise] never\n",
            f"{THP}/shmem_enabled": "always within_size [advise] never deny force\n",
            KSM_RUN: "0\n",
            **{
                f"{HUGETLB}/hugepages-{size}kB/{name}": count
                for size, counts in sizes.items()
                for name, count in zip(names, counts, strict=True)
            },
        },
    )


def unprivileged() -> Facts:
    """An ordinary user on an ordinary machine."""
    facts = replace(everything(), uid=1000, user="ann", group="ann")
    facts = replace(facts, device=replace(facts.device, accessible=False))
    facts = with_files(facts, {STATUS: status()})
    return with_attempts(
        facts,
        syscall=refused("EPERM"),
        device=refused("EACCES"),
        event_fork=refused("EPERM"),
        core=Attempt(worked=True, details={"how": "syscall", "kernel_faults": False}),
    )


def filtered(answer: str, *, device: bool) -> Facts:
    """Behind a seccomp filter that fails the system call with `answer`."""
    facts = with_files(everything(), {STATUS: status(PTRACE, seccomp=2)})
    facts = with_attempts(facts, syscall=refused(answer), user_mode=refused(answer))
    if device:
        core = Attempt(worked=True, details={"how": "device", "kernel_faults": True})
        return with_attempts(facts, core=core)
    return with_attempts(
        replace(facts, device=Device()),
        device=refused("ENOENT"),
        **dict.fromkeys(("features", "event_fork", "core", "move"), refused(answer)),
    )


def nothing() -> Facts:
    """An old kernel without userfaultfd and everything else that is checked."""
    facts = Facts(
        release="4.2.0", machine="x86_64", uid=1000, user="ann", group="ann", interpreter="/python"
    )
    facts = with_files(facts, {STATUS: status(), OVERCOMMIT: "2\n"})
    return with_attempts(
        facts,
        **dict.fromkeys(
            ("syscall", "user_mode", "features", "event_fork", "core", "move"), refused("ENOSYS")
        ),
        device=refused("ENOENT"),
        pagemap_scan=refused("ENOTTY"),
        pidfd_getfd=refused("ENOSYS"),
    )
