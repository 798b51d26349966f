"""What is known about this machine and this user before anything is concluded from it.  Pure."""

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
"""Read from below the root directory.  The files of hugetlb come on top, by their sizes."""

_CAP_SYS_PTRACE: Final = 19
_FILTER: Final = 2  # SECCOMP_MODE_FILTER
_INITIAL_USER_NAMESPACE: Final = ["0", "0", "4294967295"]


class NotKnownError(Exception):
    """Something could not be found out; the message says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A small file: its text, or None where there is no such file, or why it cannot be read."""

    text: str | None = None
    trouble: str = ""


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
    """Whether its mode lets this user open it."""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of trying something in a child process."""

    worked: bool = False
    number: int = 0
    """The errno that refused it, 0 where it was no refusal."""
    text: str = ""
    """Why it did not work."""
    signal: int = 0
    """The signal that ended the child."""
    details: Mapping[str, Json] = field(default_factory=dict[str, Json])

    @property
    def refused(self) -> str:
        """The refusal in one word: an errno's name, or SIGSYS; "" if it was none."""
        if self.signal == signal.SIGSYS:
            return "SIGSYS"
        return errno.errorcode.get(self.number, str(self.number)) if self.number else ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the findings are drawn from."""

    release: str
    machine: str
    uid: int
    user: str
    group: str
    """The name of the user's primary group."""
    interpreter: str
    """The path of the running Python, symbolic links resolved."""
    container: str = ""
    """Who runs the container that this is in: docker, podman, kubernetes; "" outside of one, and
    in one that may change the machine's settings."""
    files: Mapping[str, Reading] = field(default_factory=dict[str, Reading])
    """By path, without the leading slash."""
    device: Device = field(default_factory=Device)
    attempts: Mapping[str, Attempt] = field(default_factory=dict[str, Attempt])
    """By the names that `uffdaemon.check.probes.try_all` gives them."""

    def read(self, path: str) -> str | None:
        """The text of a file, None where there is none.  Raises `NotKnownError`."""
        reading = self.files.get(path, Reading())
        if reading.trouble:
            raise NotKnownError(f"/{path}: {reading.trouble}")
        return None if reading.text is None else reading.text.strip()

    def attempt(self, name: str) -> Attempt:
        """What came of a probe; one that was not made did not work."""
        return self.attempts.get(name, Attempt(text="it was not tried"))

    def answer(self, name: str) -> Attempt:
        """The same, if it worked or was refused.  Raises `NotKnownError` if it broke."""
        attempt = self.attempt(name)
        if not (attempt.worked or attempt.refused):
            raise NotKnownError(attempt.text)
        return attempt

    @property
    def version(self) -> tuple[int, int]:
        """The kernel's version, (0, 0) where the release does not start with one."""
        return version_of(self.release)

    def older_than(self, version: str) -> bool:
        """Whether the kernel says that it is older; distributions can have added parts of it."""
        return self.version < version_of(version)

    def status(self, name: str) -> str:
        """A line of /proc/self/status.  Raises `NotKnownError`."""
        for line in (self.read(STATUS) or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        raise NotKnownError(f"/{STATUS} has no line {name}")

    @property
    def has_ptrace_bit(self) -> bool:
        """Whether CAP_SYS_PTRACE is effective, in whatever user namespace this is."""
        return bool(int(self.status("CapEff"), 16) >> _CAP_SYS_PTRACE & 1)

    @property
    def in_initial_user_namespace(self) -> bool:
        """Whether capabilities count for the whole machine, as userfaultfd asks of them."""
        text = self.read(UID_MAP)
        return text is None or text.split() == _INITIAL_USER_NAMESPACE

    @property
    def may_ptrace(self) -> bool:
        """Whether the kernel's capable(CAP_SYS_PTRACE) holds."""
        return self.has_ptrace_bit and self.in_initial_user_namespace

    @property
    def seccomp_filtered(self) -> bool:
        """Whether a seccomp filter stands before this process's system calls."""
        return int(self.status("Seccomp")) == _FILTER

    @property
    def opens(self) -> bool:
        """Whether a userfaultfd can be opened in any way."""
        return any(self.attempt(name).worked for name in ("syscall", "user_mode", "device"))

    @property
    def kernel_has_userfaultfd(self) -> bool:
        """Whether the kernel was built with userfaultfd, whoever may open one."""
        return (
            self.opens
            or self.read(SYSCTL) is not None
            or self.read(MISC_DEVICE) is not None
            or self.attempt("user_mode").refused not in ("ENOSYS", "")
        )

    @property
    def syscall_blocked(self) -> bool:
        """Whether something other than userfaultfd's own rules refuses the system call.

        Those rules never refuse USER_MODE_ONLY to anybody; kernels before 5.11 do not know it
        (EINVAL), and let whoever has CAP_SYS_PTRACE do without.
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
        """What the kernel has, None where no handshake could be made."""
        bits = self.attempt("features").details.get("bits")
        return Features(bits) if isinstance(bits, int) else None


def version_of(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel release, (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def chosen(setting: str) -> str:
    """The word in brackets: how the kernel shows which of several values is set."""
    found = re.search(r"\[(.+?)\]", setting)
    if found is None:
        raise NotKnownError(f"no value is marked in {setting!r}")
    return found[1]
