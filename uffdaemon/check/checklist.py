"""Every check, in the order in which the report shows it.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from uffdaemon.check import facilities, fixes, permissions
from uffdaemon.check.facts import Facts, NotKnownError
from uffdaemon.check.findings import CORE, Finding, Group, Mark, Report, Verdict
from uffdaemon.uapi.features import SINCE, Features

Check: TypeAlias = Callable[[Facts], Verdict]


class _Item(NamedTuple):
    key: str
    group: Group
    title: str
    check: Check


_ITEMS: Final = (
    _Item(CORE, Group.CORE, "open, fault, copy", permissions.core),
    _Item("open.syscall", Group.OPEN, "system call", permissions.by_system_call),
    _Item("open.user_mode", Group.OPEN, "system call, USER_MODE_ONLY", permissions.in_user_mode),
    _Item("open.device", Group.OPEN, "/dev/userfaultfd", permissions.by_device),
    _Item("permission.sysctl", Group.PERMISSION, "vm.unprivileged_userfaultfd", permissions.sysctl),
    _Item("permission.device", Group.PERMISSION, "/dev/userfaultfd", permissions.device_node),
    _Item("permission.capability", Group.PERMISSION, "CAP_SYS_PTRACE", permissions.capability),
    _Item("permission.seccomp", Group.PERMISSION, "container seccomp", permissions.seccomp),
    _Item("permission.event_fork", Group.PERMISSION, "EVENT_FORK", permissions.event_fork),
    _Item("operation.move", Group.OPERATION, "UFFDIO_MOVE", facilities.move),
    _Item("operation.pagemap_scan", Group.OPERATION, "PAGEMAP_SCAN", facilities.pagemap_scan),
    _Item("operation.pidfd_getfd", Group.OPERATION, "pidfd_getfd", facilities.pidfd_getfd),
    _Item("memory.hugetlb", Group.MEMORY, "hugetlb", facilities.hugetlb),
    _Item("memory.thp", Group.MEMORY, "THP", facilities.transparent_huge_pages),
    _Item("memory.thp_shmem", Group.MEMORY, "THP of shmem", facilities.shmem_huge_pages),
    _Item("memory.ksm", Group.MEMORY, "KSM", facilities.ksm),
    _Item("memory.overcommit", Group.MEMORY, "vm.overcommit_memory", facilities.overcommit),
    _Item("memory.swap", Group.MEMORY, "swap", facilities.swap),
)


def run(facts: Facts, uffdaemon: str) -> Report:
    """Run every check on `facts`; `uffdaemon` is the library's version."""
    items = sorted((*_ITEMS, *_features(facts)), key=_group_index)
    findings = tuple(
        Finding(item.key, item.group, item.title, _verdict(item.check, facts)) for item in items
    )
    return Report(uffdaemon, facts, findings)


def _group_index(item: _Item) -> int:
    return list(Group).index(item.group)


def _features(facts: Facts) -> Iterator[_Item]:
    known = list(SINCE)
    extra = facts.features.unknown if facts.features is not None else 0
    known += (Features(1 << bit) for bit in range(extra.bit_length()) if extra >> bit & 1)
    for which in known:
        [name] = which.names
        key = f"feature.{name.replace(' ', '_')}"
        yield _Item(key, Group.FEATURE, name, partial(facilities.feature, which=which))


def _verdict(check: Check, facts: Facts) -> Verdict:
    """Run one check.  Never raises: a check that fails is a finding with the mark UNKNOWN."""
    try:
        return check(facts)
    except NotKnownError as error:
        return Verdict(Mark.UNKNOWN, f"not known: {error}")
    except Exception as error:  # noqa: BLE001
        return Verdict(Mark.UNKNOWN, f"not known: {type(error).__name__}: {error}", fixes.REPORT)
