"""What the facts say about opening a userfaultfd, and what stands in the way.  Pure.

Source: ``fs/userfaultfd.c`` (userfaultfd_syscall_allowed, the handshake), userfaultfd(2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.check import mends
from uffdaemon.check.facts import SYSCTL, Attempt, NotKnownError
from uffdaemon.check.findings import Mark, Verdict

if TYPE_CHECKING:
    from uffdaemon.check.facts import Facts, Json

_SEE_MANUAL = "man 2 userfaultfd says what the error means"


def core(facts: Facts) -> Verdict:
    """Whether a fault was read and answered."""
    attempt = facts.attempt("core")
    if not attempt.worked:
        return Verdict(Mark.MISSING, attempt.text, core_mend(facts), {"error": attempt.refused})
    how = "the system call" if attempt.details.get("how") == "syscall" else mends.DEVICE
    found = f"a fault was read and answered with a copied page, through {how}"
    if attempt.details.get("kernel_faults"):
        return Verdict(Mark.OK, found, details=attempt.details)
    return Verdict(
        Mark.LIMITED, f"{found}; user faults only", mends.kernel_faults(facts), attempt.details
    )


def core_mend(facts: Facts) -> str:
    """The first thing to do where no userfaultfd can be opened."""
    if facts.opens:
        return mends.REPORT
    if not facts.kernel_has_userfaultfd:
        return mends.kernel_option("CONFIG_USERFAULTFD")
    if facts.syscall_blocked:
        return mends.seccomp(facts)
    return mends.kernel_faults(facts)


def by_system_call(facts: Facts) -> Verdict:
    """The system call, with the faults of other system calls."""
    attempt = facts.answer("syscall")
    if attempt.worked:
        return Verdict(Mark.OK, "kernel faults and user faults")
    if attempt.refused == "EPERM" and not facts.syscall_blocked:
        found = "EPERM: takes CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1"
        return Verdict(Mark.MISSING, found, mends.kernel_faults(facts), {"error": "EPERM"})
    return _refused(facts, attempt)


def in_user_mode(facts: Facts) -> Verdict:
    """The system call with UFFD_USER_MODE_ONLY."""
    attempt = facts.answer("user_mode")
    if attempt.worked:
        return Verdict(Mark.OK, "user faults; a system call on a missing page fails with EFAULT")
    if attempt.refused == "EINVAL":
        found = "EINVAL: this kernel does not have it"
        return Verdict(Mark.MISSING, found, mends.kernel("5.11"), {"error": "EINVAL"})
    return _refused(facts, attempt)


def _refused(facts: Facts, attempt: Attempt) -> Verdict:
    details = {"error": attempt.refused}
    if facts.syscall_blocked:
        by = "a seccomp filter" if facts.seccomp_filtered else "a security module or a sandbox"
        found = f"{attempt.refused}: the system call is refused by {by}"
        return Verdict(Mark.MISSING, found, mends.seccomp(facts), details)
    if not facts.kernel_has_userfaultfd:
        mend = mends.kernel_option("CONFIG_USERFAULTFD")
        return Verdict(Mark.MISSING, "this kernel has no userfaultfd", mend, details)
    return Verdict(Mark.MISSING, attempt.text, _SEE_MANUAL, details)


def by_device(facts: Facts) -> Verdict:
    """USERFAULTFD_IOC_NEW on /dev/userfaultfd."""
    attempt = facts.answer("device")
    if attempt.worked:
        return Verdict(Mark.OK, "kernel faults and user faults")
    details = {"error": attempt.refused}
    match attempt.refused:
        case "ENOENT":
            found = "ENOENT: there is no such device"
        case "EACCES":
            found = "EACCES: its owner, group and mode keep this user out"
        case "EPERM" if facts.container:
            found = "EPERM: the container was not given the device"
            mend = mends.run_container(facts, f"--device={mends.DEVICE}")
            return Verdict(Mark.MISSING, found, mend, details)
        case name:
            found = f"{name}: it cannot be opened, or gives no userfaultfd"
    return Verdict(Mark.MISSING, found, mends.device(facts), details)


def sysctl(facts: Facts) -> Verdict:
    """vm.unprivileged_userfaultfd."""
    value = facts.read(SYSCTL)
    details = {"value": value}
    if value is None:
        if facts.kernel_has_userfaultfd and facts.older_than("5.2"):
            return Verdict(Mark.OK, "not in this kernel, where anybody may", details=details)
        mend = mends.kernel_option("CONFIG_USERFAULTFD")
        return Verdict(Mark.MISSING, "not in this kernel", mend, details)
    if value == "1":
        return Verdict(Mark.OK, "1: anybody may have kernel faults", details=details)
    if facts.may_ptrace:
        found = f"{value}: kernel faults take CAP_SYS_PTRACE, which this user has"
        return Verdict(Mark.OK, found, details=details)
    found = f"{value}: kernel faults take CAP_SYS_PTRACE or {mends.DEVICE}"
    return Verdict(Mark.LIMITED, found, mends.kernel_faults(facts), details)


def device_node(facts: Facts) -> Verdict:
    """The owner and mode of /dev/userfaultfd."""
    device = facts.device
    if device.trouble:
        raise NotKnownError(device.trouble)
    if not device.exists:
        return Verdict(Mark.MISSING, "does not exist", mends.device(facts), {"exists": False})
    details: dict[str, Json] = {
        "exists": True,
        "owner": device.owner,
        "group": device.group,
        "mode": f"{device.mode:04o}",
        "accessible": device.accessible,
    }
    found = f"{device.owner}:{device.group}, mode {device.mode:04o}"
    if not device.is_device:
        mend = mends.as_root(facts, f"rm {mends.DEVICE}")
        return Verdict(Mark.MISSING, f"{found}: no device, but a file of that name", mend, details)
    if not device.accessible:
        found += ", not for this user"
        return Verdict(Mark.MISSING, found, mends.device(facts), details)
    return Verdict(Mark.OK, found, details=details)


def capability(facts: Facts) -> Verdict:
    """CAP_SYS_PTRACE, which userfaultfd wants in the initial user namespace."""
    details = {
        "effective": facts.has_ptrace_bit,
        "initial_user_namespace": facts.in_initial_user_namespace,
    }
    if facts.may_ptrace:
        return Verdict(Mark.OK, "effective", details=details)
    if facts.has_ptrace_bit:
        found = "effective, but does not count: this is not the initial user namespace"
        return Verdict(Mark.LIMITED, found, mends.capability(facts), details)
    return Verdict(Mark.MISSING, "not effective", mends.capability(facts), details)


def seccomp(facts: Facts) -> Verdict:
    """Whether a filter, as containers and systemd units have them, lets the system call through."""
    filtered = facts.seccomp_filtered
    details = {"filtered": filtered, "blocks_userfaultfd": facts.syscall_blocked}
    if facts.syscall_blocked:
        refused = facts.attempt("user_mode").refused
        who = "a seccomp filter" if filtered else "no seccomp filter, but something else,"
        found = f"{who} refuses the system call userfaultfd ({refused})"
        mark = Mark.MISSING
        if facts.attempt("device").worked:
            found += f"; {mends.DEVICE} gets past it"
            if refused == "SIGSYS":
                found += ', with how="device": to try the system call is to be killed'
            mark = Mark.LIMITED
        return Verdict(mark, found, mends.seccomp(facts), details)
    if filtered:
        return Verdict(Mark.OK, "a filter that lets userfaultfd through", details=details)
    return Verdict(Mark.OK, "no filter", details=details)


def event_fork(facts: Facts) -> Verdict:
    """The permission for UFFD_FEATURE_EVENT_FORK."""
    if not facts.opens:
        return Verdict(Mark.MISSING, "no userfaultfd can be opened", core_mend(facts))
    attempt = facts.answer("event_fork")
    if attempt.worked:
        return Verdict(Mark.OK, "granted")
    details = {"error": attempt.refused}
    if attempt.refused == "EPERM":
        found = "EPERM: takes CAP_SYS_PTRACE, however the userfaultfd was opened"
        return Verdict(Mark.MISSING, found, mends.capability(facts), details)
    return Verdict(Mark.MISSING, attempt.text, _SEE_MANUAL, details)
