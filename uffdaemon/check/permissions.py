"""Verdicts on the ways to open a userfaultfd, and on the permissions that they need.  Pure.

Source: ``fs/userfaultfd.c`` (userfaultfd_syscall_allowed, the handshake), userfaultfd(2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.check import fixes
from uffdaemon.check.facts import SYSCTL, Attempt, NotKnownError
from uffdaemon.check.findings import Mark, Verdict

if TYPE_CHECKING:
    from uffdaemon.check.facts import Facts, Json

_SEE_MANUAL = "see the errors in userfaultfd(2)"


def core(facts: Facts) -> Verdict:
    """Open a userfaultfd, read a fault, resolve it."""
    attempt = facts.attempt("core")
    if not attempt.worked:
        return Verdict(Mark.MISSING, attempt.text, core_fix(facts), {"error": attempt.refused})
    how = "the system call" if attempt.details.get("how") == "syscall" else fixes.DEVICE
    found = f"a fault was resolved by copying a page, through {how}"
    if attempt.details.get("kernel_faults"):
        return Verdict(Mark.OK, found, details=attempt.details)
    return Verdict(
        Mark.LIMITED, f"{found}; user faults only", fixes.kernel_faults(facts), attempt.details
    )


def core_fix(facts: Facts) -> str:
    """The first thing to do if no userfaultfd can be opened."""
    if facts.opens:
        return fixes.REPORT
    if not facts.kernel_has_userfaultfd:
        return fixes.kernel_option("CONFIG_USERFAULTFD")
    if facts.syscall_blocked:
        return fixes.seccomp(facts)
    return fixes.kernel_faults(facts)


def by_system_call(facts: Facts) -> Verdict:
    """The system call, with kernel faults."""
    attempt = facts.conclusive("syscall")
    if attempt.worked:
        return Verdict(Mark.OK, "kernel faults and user faults")
    if attempt.refused == "EPERM" and not facts.syscall_blocked:
        found = "EPERM: needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1"
        return Verdict(Mark.MISSING, found, fixes.kernel_faults(facts), {"error": "EPERM"})
    return _refused(facts, attempt)


def in_user_mode(facts: Facts) -> Verdict:
    """The system call with UFFD_USER_MODE_ONLY."""
    attempt = facts.conclusive("user_mode")
    if attempt.worked:
        return Verdict(Mark.OK, "user faults; a system call on a missing page fails with EFAULT")
    if attempt.refused == "EINVAL":
        found = "EINVAL: this kernel does not have it"
        return Verdict(Mark.MISSING, found, fixes.kernel("5.11"), {"error": "EINVAL"})
    return _refused(facts, attempt)


def _refused(facts: Facts, attempt: Attempt) -> Verdict:
    details = {"error": attempt.refused}
    if facts.syscall_blocked:
        by = "a seccomp filter" if facts.seccomp_filtered else "a security module or a sandbox"
        found = f"{attempt.refused}: the system call is blocked by {by}"
        return Verdict(Mark.MISSING, found, fixes.seccomp(facts), details)
    if not facts.kernel_has_userfaultfd:
        fix = fixes.kernel_option("CONFIG_USERFAULTFD")
        return Verdict(Mark.MISSING, "this kernel has no userfaultfd", fix, details)
    return Verdict(Mark.MISSING, attempt.text, _SEE_MANUAL, details)


def by_device(facts: Facts) -> Verdict:
    """USERFAULTFD_IOC_NEW on /dev/userfaultfd."""
    attempt = facts.conclusive("device")
    if attempt.worked:
        return Verdict(Mark.OK, "kernel faults and user faults")
    details = {"error": attempt.refused}
    match attempt.refused:
        case "ENOENT":
            found = "ENOENT: no such device"
        case "EACCES":
            found = "EACCES: its owner, group and mode do not allow this user"
        case "EPERM" if facts.container:
            found = "EPERM: the device was not passed to the container"
            fix = fixes.run_container(facts, f"--device={fixes.DEVICE}")
            return Verdict(Mark.MISSING, found, fix, details)
        case name:
            found = f"{name}: open(2) or USERFAULTFD_IOC_NEW failed"
    return Verdict(Mark.MISSING, found, fixes.device(facts), details)


def sysctl(facts: Facts) -> Verdict:
    """vm.unprivileged_userfaultfd."""
    value = facts.read(SYSCTL)
    details = {"value": value}
    if value is None:
        if facts.kernel_has_userfaultfd and facts.older_than("5.2"):
            return Verdict(Mark.OK, "not in this kernel, which allows everybody", details=details)
        fix = fixes.kernel_option("CONFIG_USERFAULTFD")
        return Verdict(Mark.MISSING, "not in this kernel", fix, details)
    if value == "1":
        return Verdict(Mark.OK, "1: everybody may have kernel faults", details=details)
    if facts.may_ptrace:
        found = f"{value}: kernel faults need CAP_SYS_PTRACE, which this user has"
        return Verdict(Mark.OK, found, details=details)
    found = f"{value}: kernel faults need CAP_SYS_PTRACE or {fixes.DEVICE}"
    return Verdict(Mark.LIMITED, found, fixes.kernel_faults(facts), details)


def device_node(facts: Facts) -> Verdict:
    """The owner and mode of /dev/userfaultfd."""
    device = facts.device
    if device.error:
        raise NotKnownError(device.error)
    if not device.exists:
        return Verdict(Mark.MISSING, "does not exist", fixes.device(facts), {"exists": False})
    details: dict[str, Json] = {
        "exists": True,
        "owner": device.owner,
        "group": device.group,
        "mode": f"{device.mode:04o}",
        "accessible": device.accessible,
    }
    found = f"{device.owner}:{device.group}, mode {device.mode:04o}"
    if not device.is_device:
        fix = fixes.as_root(facts, f"rm {fixes.DEVICE}")
        return Verdict(Mark.MISSING, f"{found}: a file, not a device", fix, details)
    if not device.accessible:
        found += ", not accessible to this user"
        return Verdict(Mark.MISSING, found, fixes.device(facts), details)
    return Verdict(Mark.OK, found, details=details)


def capability(facts: Facts) -> Verdict:
    """CAP_SYS_PTRACE, which userfaultfd requires in the initial user namespace."""
    details = {
        "effective": facts.has_ptrace_bit,
        "initial_user_namespace": facts.in_initial_user_namespace,
    }
    if facts.may_ptrace:
        return Verdict(Mark.OK, "effective", details=details)
    if facts.has_ptrace_bit:
        found = "effective, but does not count: this is not the initial user namespace"
        return Verdict(Mark.LIMITED, found, fixes.capability(facts), details)
    return Verdict(Mark.MISSING, "not effective", fixes.capability(facts), details)


def seccomp(facts: Facts) -> Verdict:
    """Whether a seccomp filter of a container or systemd unit allows the system call."""
    filtered = facts.seccomp_filtered
    details = {"filtered": filtered, "blocks_userfaultfd": facts.syscall_blocked}
    if facts.syscall_blocked:
        refused = facts.attempt("user_mode").refused
        who = "a seccomp filter" if filtered else "no seccomp filter, but something else,"
        found = f"{who} blocks the system call userfaultfd ({refused})"
        mark = Mark.MISSING
        if facts.attempt("device").worked:
            found += f"; {fixes.DEVICE} works"
            if refused == "SIGSYS":
                found += ', with how="device" (the system call kills the process)'
            mark = Mark.LIMITED
        return Verdict(mark, found, fixes.seccomp(facts), details)
    if filtered:
        return Verdict(Mark.OK, "the filter allows userfaultfd", details=details)
    return Verdict(Mark.OK, "no filter", details=details)


def event_fork(facts: Facts) -> Verdict:
    """The permission for UFFD_FEATURE_EVENT_FORK."""
    if not facts.opens:
        return Verdict(Mark.MISSING, "no userfaultfd can be opened", core_fix(facts))
    attempt = facts.conclusive("event_fork")
    if attempt.worked:
        return Verdict(Mark.OK, "granted")
    details = {"error": attempt.refused}
    if attempt.refused == "EPERM":
        found = "EPERM: needs CAP_SYS_PTRACE, whichever way the userfaultfd was opened"
        return Verdict(Mark.MISSING, found, fixes.capability(facts), details)
    return Verdict(Mark.MISSING, attempt.text, _SEE_MANUAL, details)
