"""From facts to the report: every finding there is, in the order in which it is shown.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from uffdaemon.check import abilities, mends, opening
from uffdaemon.check.facts import Facts, NotKnownError
from uffdaemon.check.findings import CORE, Finding, Group, Mark, Report, Verdict
from uffdaemon.uapi.features import SINCE, Features

Judge: TypeAlias = Callable[[Facts], Verdict]


class _Question(NamedTuple):
    key: str
    group: Group
    title: str
    judge: Judge


_QUESTIONS: Final = (
    _Question(CORE, Group.CORE, "open, fault, copy", opening.core),
    _Question("open.syscall", Group.OPEN, "system call", opening.by_system_call),
    _Question("open.user_mode", Group.OPEN, "system call, USER_MODE_ONLY", opening.in_user_mode),
    _Question("open.device", Group.OPEN, "/dev/userfaultfd", opening.by_device),
    _Question("permission.sysctl", Group.PERMISSION, "vm.unprivileged_userfaultfd", opening.sysctl),
    _Question("permission.device", Group.PERMISSION, "/dev/userfaultfd", opening.device_node),
    _Question("permission.capability", Group.PERMISSION, "CAP_SYS_PTRACE", opening.capability),
    _Question("permission.seccomp", Group.PERMISSION, "container seccomp", opening.seccomp),
    _Question("permission.event_fork", Group.PERMISSION, "EVENT_FORK", opening.event_fork),
    _Question("operation.move", Group.OPERATION, "UFFDIO_MOVE", abilities.move),
    _Question("operation.pagemap_scan", Group.OPERATION, "PAGEMAP_SCAN", abilities.pagemap_scan),
    _Question("operation.pidfd_getfd", Group.OPERATION, "pidfd_getfd", abilities.pidfd_getfd),
    _Question("memory.hugetlb", Group.MEMORY, "hugetlb", abilities.hugetlb),
    _Question("memory.thp", Group.MEMORY, "THP", abilities.transparent_huge_pages),
    _Question("memory.thp_shmem", Group.MEMORY, "THP of shmem", abilities.shmem_huge_pages),
    _Question("memory.ksm", Group.MEMORY, "KSM", abilities.ksm),
    _Question("memory.overcommit", Group.MEMORY, "vm.overcommit_memory", abilities.overcommit),
    _Question("memory.swap", Group.MEMORY, "swap", abilities.swap),
)


def judge(facts: Facts, uffdaemon: str) -> Report:
    """Draw every finding from `facts`; `uffdaemon` is the library's version."""
    questions = sorted((*_QUESTIONS, *_features(facts)), key=_order)
    findings = tuple(
        Finding(question.key, question.group, question.title, _answer(question.judge, facts))
        for question in questions
    )
    return Report(uffdaemon, facts, findings)


def _order(question: _Question) -> int:
    return list(Group).index(question.group)


def _features(facts: Facts) -> Iterator[_Question]:
    known = list(SINCE)
    extra = facts.features.unknown if facts.features is not None else 0
    known += (Features(1 << bit) for bit in range(extra.bit_length()) if extra >> bit & 1)
    for which in known:
        [name] = which.names
        key = f"feature.{name.replace(' ', '_')}"
        yield _Question(key, Group.FEATURE, name, partial(abilities.feature, which=which))


def _answer(judge_one: Judge, facts: Facts) -> Verdict:
    """Never raises: what cannot be found out, or makes no sense, is a finding like any other."""
    try:
        return judge_one(facts)
    except NotKnownError as error:
        return Verdict(Mark.UNKNOWN, f"not known: {error}")
    except Exception as error:  # noqa: BLE001
        return Verdict(Mark.UNKNOWN, f"not known: {type(error).__name__}: {error}", mends.REPORT)
