"""Descriptors of userfaultfds: opening, receiving and checking them, and explaining refusals."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeAlias, get_args

from uffdaemon import errors, native
from uffdaemon.arguments import check_choice
from uffdaemon.uapi.features import Features

if TYPE_CHECKING:
    from collections.abc import Generator

How: TypeAlias = Literal["auto", "syscall", "device"]

_CLOEXEC: Final = 0x40000000  # MSG_CMSG_CLOEXEC, unnamed in socket before 3.13
_INITIALIZED: Final = 1 << 31  # UFFD_FEATURE_INITIALIZED: the kernel's own mark in fdinfo
_ADVICE: Final = (
    "as root: sysctl vm.unprivileged_userfaultfd=1, or chmod 666 /dev/userfaultfd, or "
    "setcap cap_sys_ptrace+ep on the interpreter; or pass user_mode_only=True"
)
_DEVICE: Final = "as root: chmod 666 /dev/userfaultfd, or open by system call"
_FILTERED: Final = (
    "the kernel lacks userfaultfd, or a seccomp filter or security module refuses it, as in "
    "containers: `uffdaemon check` tells which"
)


@contextmanager
def closed_on_error(*fds: int) -> Generator[None]:
    """Close the descriptors if the block raises."""
    try:
        yield
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def is_userfaultfd(fd: int) -> bool:
    """Whether an open descriptor is a userfaultfd."""
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[userfaultfd]"


def check_descriptor(fd: int) -> None:
    """Raise `ClosedDescriptor`, `NotAUserfaultfd` or `BlockingDescriptor` unless `fd` can serve."""
    try:
        target = str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:
        raise errors.ClosedDescriptor(f"descriptor {fd} is not open") from None
    if target != "anon_inode:[userfaultfd]":
        raise errors.NotAUserfaultfd(f"descriptor {fd} is not a userfaultfd but {target}")
    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK:
        raise errors.BlockingDescriptor(
            f"userfaultfd {fd} lacks O_NONBLOCK, so it cannot be polled: "
            f"os.set_blocking({fd}, False) fixes it for all processes that share it"
        )


def supported_features(*, user_mode_only: bool = True) -> Features:
    """The features of this kernel, from a handshake on a temporary descriptor.

    By default the descriptor is opened for user faults only, which needs no privilege.  Raises
    `PermissionRefused` and `OpenRefused`.
    """
    fd = open_descriptor(user_mode_only=user_mode_only, how="auto")
    try:
        number, features, _ = native.handshake(fd, 0)
    finally:
        os.close(fd)
    if number < 0:
        raise errors.OpenRefused(-number, "UFFDIO_API")
    return Features(features)


def open_descriptor(*, user_mode_only: bool, how: How) -> int:
    """Open a userfaultfd that the caller owns.  Raises `PermissionRefused` and `OpenRefused`."""
    check_choice("how", how, get_args(How))
    number = -errno.EINVAL
    if how in ("auto", "syscall"):
        number = native.open_syscall(user_mode_only=user_mode_only)
    if how == "device" or (how == "auto" and number in (-errno.EPERM, -errno.ENOSYS)):
        opened = native.open_device(user_mode_only=user_mode_only)
        if opened >= 0 or how == "device":
            number = opened
    if number >= 0:
        return number
    what = "/dev/userfaultfd" if how == "device" else "userfaultfd"
    if number in (-errno.EPERM, -errno.EACCES):
        # User faults need no privilege, so here a filter refuses.
        advice = _DEVICE if how == "device" else _FILTERED if user_mode_only else _ADVICE
        raise errors.PermissionRefused(-number, what, advice=advice)
    raise errors.OpenRefused(-number, what, advice=_FILTERED if number == -errno.ENOSYS else "")


def explain_handshake(number: int, asked: Features) -> NoReturn:
    """Raise the error for a handshake that failed with errno `number`."""
    # As integers: inverting a flag drops the bits without a name.
    missing = Features(int(asked) & ~int(supported_features()))
    if missing:
        raise errors.FeatureMissing("UFFDIO_API", ", ".join(missing.names), missing)
    reason = ""
    if number == errno.EPERM and asked & Features.EVENT_FORK:
        raise errors.PermissionRefused(
            number, "UFFDIO_API", reason="EVENT_FORK", advice="it needs CAP_SYS_PTRACE"
        )
    raise errors.OpenRefused(number, "UFFDIO_API", reason=reason)


def features_of(fd: int) -> Features:
    """The features that an adopted descriptor has, from its fdinfo (``fs/userfaultfd.c``)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("API:"):
                bits = int(line.split(":")[2], 16)
                if not bits & _INITIALIZED:
                    raise errors.NotAUserfaultfd(
                        f"userfaultfd {fd} has had no handshake: its owner must do UFFDIO_API"
                    )
                return Features(bits & ~_INITIALIZED)
    return Features(0)


def registration_error(
    operation: str, number: int, start: int, length: int
) -> errors.RegistrationRefused:
    """The error for a UFFDIO_REGISTER or UFFDIO_UNREGISTER that was refused with errno `number`."""
    reasons = {
        errno.EBUSY: "a part of the range is registered with another userfaultfd",
        errno.EINVAL: "a part of the range is not mapped, is of a type that cannot be registered "
        "in this mode, or is not aligned to its huge pages",
        errno.ENOMEM: "the range is not mapped, or its process is gone",
        errno.EPERM: "a part of the range is a file that may not be written",
    }
    kind = errors.RangeBusy if number == errno.EBUSY else errors.RegistrationRefused
    return kind(number, operation, address=start, length=length, reason=reasons.get(number, ""))


def receive_descriptors(sock: socket.socket, max_message: int) -> tuple[int, list[int], bytes]:
    """Read one message of at most `max_message` bytes, with the userfaultfd that came with it.

    Returns the userfaultfd, further descriptors in their order, and the message.  Raises EOFError,
    `NotAUserfaultfd` for no userfaultfd or several (all descriptors are closed), and OSError.
    """
    # socket.recv_fds() drops the flags that it is given.
    message, control, flags, _ = sock.recvmsg(max_message, socket.CMSG_SPACE(64), _CLOEXEC)
    fds = [
        fd
        for level, kind, data in control
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("=i", data)
    ]
    userfaultfds = fds if len(fds) == 1 else [fd for fd in fds if is_userfaultfd(fd)]
    if len(userfaultfds) == 1 and not flags & socket.MSG_CTRUNC:
        [fd] = userfaultfds
        return fd, [other for other in fds if other != fd], message
    for fd in fds:
        os.close(fd)
    if not message and not fds:
        raise EOFError("the peer closed the socket before it sent a userfaultfd")
    raise errors.NotAUserfaultfd(
        f"the message carries {len(fds)} descriptors instead of one userfaultfd"
    )
