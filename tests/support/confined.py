"""Runs `uffdaemon ARGS` with less than this user has.

``python -m tests.support.confined OPTIONS -- ARGS``.

Privileges are dropped inside of the process, after everything is imported: the other user may not
be allowed to read the interpreter's files.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import grp
import locale
import os
import platform
import pwd
import stat
import struct
import sys
from pathlib import Path

from uffdaemon import cli

_PRELOADED = (locale,)  # argparse imports it when in need

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 8, 22, 38
_CAPABILITY_VERSION_3, _CAP_SYS_PTRACE = 0x20080522, 19
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW, _RET_ERRNO, _RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

CANNOT = 77
"""The exit status when this place does not let itself be confined so, as a chroot does not."""

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="confined")
    parser.add_argument("--hide-device", action="store_true")
    parser.add_argument("--read-only-sysctl", action="store_true")
    parser.add_argument("--give-device", help="a /dev/userfaultfd that only this group may open")
    parser.add_argument("--user-namespace", action="store_true")
    parser.add_argument("--keep-ptrace", action="store_true")
    parser.add_argument("--refuse", choices=("EPERM", "ENOSYS", "KILL", "NOTHING"))
    parser.add_argument("--user")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args(argv)
    if options.hide_device or options.give_device or options.read_only_sysctl:
        _enter_mount_namespace()
    if options.hide_device or options.give_device:
        number = Path("/dev/userfaultfd").stat().st_rdev if options.give_device else 0
        _mount("tmpfs", "/dev", "tmpfs", 0)
        if options.give_device:
            _make_device(number, options.give_device)
    if options.read_only_sysctl:
        _mount("/proc/sys", "/proc/sys", "", _MS_BIND)
        _mount("/proc/sys", "/proc/sys", "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    if options.user_namespace:
        # Root there is root here, yet what it may do counts for the namespace alone.
        _check(_libc.unshare(_CLONE_NEWUSER), "unshare")
        Path("/proc/self/uid_map").write_text("0 0 1", encoding="ascii")
    if options.user:
        _become(options.user, keep_ptrace=options.keep_ptrace)
    if options.refuse:
        _filter(options.refuse)
    return cli.main(options.arguments)


def _enter_mount_namespace() -> None:
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None
    )
    _check(result, f"mount {target}")


def _make_device(number: int, group: str) -> None:
    os.mknod("/dev/userfaultfd", stat.S_IFCHR, number)
    os.chown("/dev/userfaultfd", 0, grp.getgrnam(group).gr_gid)
    Path("/dev/userfaultfd").chmod(0o660)


def _become(user: str, *, keep_ptrace: bool) -> None:
    entry = pwd.getpwnam(user)
    if keep_ptrace:
        _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    if keep_ptrace:
        header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
        bit = 1 << _CAP_SYS_PTRACE
        sets = ctypes.create_string_buffer(struct.pack("=6I", bit, bit, 0, 0, 0, 0))
        _check(_libc.capset(header, sets), "capset")
    # As after an exec: otherwise the process's own files in /proc belong to root.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "PR_SET_DUMPABLE")


def _filter(answer: str) -> None:
    """Answer the system call userfaultfd as `answer` says, and let every other one through."""
    action = {
        "EPERM": _RET_ERRNO | errno.EPERM,
        "ENOSYS": _RET_ERRNO | errno.ENOSYS,
        "KILL": _RET_KILL_PROCESS,
        "NOTHING": _RET_ALLOW,
    }[answer]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number of the system call
            (0x15, 0, 1, _USERFAULTFD[platform.machine()]),  # if it is another one, skip one
            (0x06, 0, 0, action),
            (0x06, 0, 0, _RET_ALLOW),
        )
    )
    text = ctypes.create_string_buffer(program, len(program))
    description = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
    )
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, description), "PR_SET_SECCOMP")


def _check(result: int, what: str) -> None:
    if result != 0:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(CANNOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
