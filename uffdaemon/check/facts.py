"""The facts about this machine and this user, from which the checks draw their verdicts.  Pure."""

from __future__ import annotations

import errno
import re
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from uffdaemon.uapi.features import Features

if TYPE_CHECKING:
    from collections.abc import Mapping

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"

SYSCTL: Final = "proc/sys/vm/unprivileged_userfaultfd"
STATUS: Final = "proc/self/status"
UID_MAP: Final = "proc/self/uid_map"
YAMA: Final = "proc/sys/kernel/yama/ptrace_scope"
OVERCOMMIT: Final = "proc/sys/vm/overcommit_memory"
SWAPS: Final = "proc/swaps"
MISC_DEVICE: Final = "sys/class/misc/userfaultfd/dev"
THP: Final = "sys/kernel/mm/transparent_hugepage"
KSM_RUN: Final = "sys/kernel/mm/ksm/run"
HUGETLB: Final = "sys/kernel/mm/hugepages"

FILES: Final = (
    SYSCTL,
    STATUS,
    UID_MAP,
    YAMA,
    OVERCOMMIT,
    SWAPS,
    MISC_DEVICE,
    f"{THP}/enabled",
    f"{THP}/hugepages-2048kB/enabled",
    f"{THP}/defrag",
    f"{THP}/shmem_enabled",
    KSM_RUN,
)
"""Paths without the leading slash.  Besides these, the counters of each hugetlb size are read."""

_CAP_SYS_PTRACE: Final = 19
_FILTER: Final = 2  # SECCOMP_MODE_FILTER
_INITIAL_USER_NAMESPACE: Final = ["0", "0", "4294967295"]


class NotKnownError(Exception):
    """A fact is not known; the message says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A small file: its text (None if there is no such file), or why it cannot be read."""

    text: str | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """/dev/userfaultfd as stat(2) sees it."""

    exists: bool = False
    is_device: bool = False
    mode: int = 0
    """Permission bits."""
    owner: str = ""
    group: str = ""
    accessible: bool = False
    """Whether this user may open it for reading and writing."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of a probe in a child process."""

    worked: bool = False
    number: int = 0
    """The errno, 0 if the probe did not fail with one."""
    text: str = ""
    """Why it did not work."""
    signal: int = 0
    """The signal that killed the child, 0 if none did."""
    details: Mapping[str, Json] = field(default_factory=dict[str, Json])

    @property
    def refused(self) -> str:
        """How the kernel refused: the name of an errno, or SIGSYS; "" if it did not refuse."""
        if self.signal == signal.SIGSYS:
            return "SIGSYS"
        return errno.errorcode.get(self.number, str(self.number)) if self.number else ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the checks look at."""

    release: str
    machine: str
    uid: int
    user: str
    group: str
    """The name of the user's primary group."""
    interpreter: str
    """The path of the running Python, symbolic links resolved."""
    container: str = ""
    """The engine of the container that this process is in: docker, podman, kubernetes.  It is ""
    outside of a container, and in one that may change the machine's settings."""
    files: Mapping[str, Reading] = field(default_factory=dict[str, Reading])
    """By path, without the leading slash."""
    device: Device = field(default_factory=Device)
    attempts: Mapping[str, Attempt] = field(default_factory=dict[str, Attempt])
    """By the names that `uffdaemon.check.probes.run_all` uses."""

    def read(self, path: str) -> str | None:
        """The text of a file, None if there is no such file.  Raises `NotKnownError`."""
        reading = self.files.get(path, Reading())
        if reading.error:
            raise NotKnownError(f"/{path}: {reading.error}")
        return None if reading.text is None else reading.text.strip()

    def attempt(self, name: str) -> Attempt:
        """The result of a probe; one that was not run did not work."""
        return self.attempts.get(name, Attempt(text="not tried"))

    def conclusive(self, name: str) -> Attempt:
        """The same, if the probe worked or the kernel refused.  Raises `NotKnownError` if not."""
        attempt = self.attempt(name)
        if not (attempt.worked or attempt.refused):
            raise NotKnownError(attempt.text)
        return attempt

    @property
    def version(self) -> tuple[int, int]:
        """The kernel's version, (0, 0) if the release does not start with one."""
        return version_of(self.release)

    def older_than(self, version: str) -> bool:
        """Compare the kernel's version.  A distribution may have backported features to it."""
        return self.version < version_of(version)

    def status(self, name: str) -> str:
        """A field of /proc/self/status.  Raises `NotKnownError`."""
        for line in (self.read(STATUS) or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        raise NotKnownError(f"/{STATUS} has no line {name}")

    @property
    def has_ptrace_bit(self) -> bool:
        """Whether CAP_SYS_PTRACE is effective in this process's user namespace."""
        return bool(int(self.status("CapEff"), 16) >> _CAP_SYS_PTRACE & 1)

    @property
    def in_initial_user_namespace(self) -> bool:
        """Whether this is the initial user namespace.  Capabilities in others do not count."""
        text = self.read(UID_MAP)
        return text is None or text.split() == _INITIAL_USER_NAMESPACE

    @property
    def may_ptrace(self) -> bool:
        """Whether the kernel's capable(CAP_SYS_PTRACE) holds."""
        return self.has_ptrace_bit and self.in_initial_user_namespace

    @property
    def seccomp_filtered(self) -> bool:
        """Whether this process has a seccomp filter."""
        return int(self.status("Seccomp")) == _FILTER

    @property
    def opens(self) -> bool:
        """Whether at least one way to open a userfaultfd works."""
        return any(self.attempt(name).worked for name in ("syscall", "user_mode", "device"))

    @property
    def kernel_has_userfaultfd(self) -> bool:
        """Whether the kernel was built with userfaultfd, even if this user may not open one."""
        return (
            self.opens
            or self.read(SYSCTL) is not None
            or self.read(MISC_DEVICE) is not None
            or self.attempt("user_mode").refused not in ("ENOSYS", "")
        )

    @property
    def syscall_blocked(self) -> bool:
        """Whether something other than userfaultfd itself, such as seccomp, blocks the system call.

        userfaultfd allows USER_MODE_ONLY to everybody.  Kernels before 5.11 do not know that flag
        (EINVAL); there, CAP_SYS_PTRACE or the sysctl is enough without it.
        """
        if not self.kernel_has_userfaultfd:
            return False
        tried = self.attempt("user_mode")
        if tried.refused == "EINVAL":
            tried = self.attempt("syscall")
            if not (self.may_ptrace or self.read(SYSCTL) == "1"):
                return False
        return tried.refused in ("EPERM", "EACCES", "ENOSYS", "SIGSYS")

    @property
    def features(self) -> Features | None:
        """The features of the kernel, None if the handshake failed."""
        bits = self.attempt("features").details.get("bits")
        return Features(bits) if isinstance(bits, int) else None


def version_of(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel release, (0, 0) if there are none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def chosen(setting: str) -> str:
    """The word in brackets, by which a file in /sys marks the current one of several values."""
    found = re.search(r"\[(.+?)\]", setting)
    if found is None:
        raise NotKnownError(f"no value is marked in {setting!r}")
    return found[1]
