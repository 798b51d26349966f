"""How to get what is missing: one line each, a command if there is one.  Pure.

Commands for root start with ``sudo`` if this user is not root.  In a container the line says how to
start the container, or what to run on its host.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final

from uffdaemon.check.facts import MISC_DEVICE

if TYPE_CHECKING:
    from uffdaemon.check.facts import Facts

DEVICE: Final = "/dev/userfaultfd"
REPORT: Final = "report this as a bug, with the output of: uffdaemon check --json"
_ENGINES: Final = ("docker", "podman")


def as_root(facts: Facts, command: str) -> str:
    """A command for root, outside of any container."""
    if facts.container:
        return f"on the host, as root: {command}"
    return command if facts.uid == 0 else f"sudo {command}"


def write(facts: Facts, path: str, value: str) -> str:
    """Write to a file in /proc or /sys."""
    if facts.uid == 0 and not facts.container:
        return f"echo {value} > /{path}"
    return as_root(facts, f"sh -c 'echo {value} > /{path}'")


def sysctl(facts: Facts, setting: str) -> str:
    """Set a sysctl until the next boot."""
    return as_root(facts, f"sysctl -w {setting}")


def run_container(facts: Facts, option: str) -> str:
    """Start the container with one more option."""
    engine = facts.container if facts.container in _ENGINES else "docker"
    return f"{engine} run {option} ..."


def kernel_faults(facts: Facts) -> str:
    """Allow this user kernel faults through the system call."""
    return sysctl(facts, "vm.unprivileged_userfaultfd=1")


def kernel(version: str) -> str:
    """Boot a newer kernel."""
    return f"boot Linux {version} or later"


def kernel_option(option: str) -> str:
    """Boot a kernel with another configuration."""
    return f"boot a kernel built with {option}=y"


def device(facts: Facts) -> str:
    """Allow this user to open /dev/userfaultfd."""
    if facts.container and not facts.device.exists:
        return run_container(facts, f"--device={DEVICE}")
    numbers = re.fullmatch(r"(\d+):(\d+)", (facts.read(MISC_DEVICE) or "").strip())
    if not facts.device.exists and numbers is not None:
        return as_root(facts, f"mknod -m 600 {DEVICE} c {numbers[1]} {numbers[2]}")
    if not facts.device.exists:
        return kernel("6.1")
    if facts.container:
        return f"as root of the container: chmod 666 {DEVICE}"
    group = shlex.quote(facts.group)
    return as_root(facts, f"chgrp {group} {DEVICE} && {as_root(facts, f'chmod 660 {DEVICE}')}")


def capability(facts: Facts) -> str:
    """Grant CAP_SYS_PTRACE."""
    if not facts.in_initial_user_namespace:
        return f"run outside of this user namespace, or pass {DEVICE} in"
    if facts.container:
        return run_container(facts, "--cap-add=SYS_PTRACE")
    if facts.uid == 0:
        return "in the systemd unit that dropped it: CapabilityBoundingSet=CAP_SYS_PTRACE"
    return as_root(facts, f"setcap cap_sys_ptrace+ep {shlex.quote(facts.interpreter)}")


def seccomp(facts: Facts) -> str:
    """Get past a seccomp filter that blocks the system call."""
    if facts.container == "kubernetes":
        return (
            "give the pod a securityContext.seccompProfile of type Localhost that allows "
            "userfaultfd"
        )
    if facts.container:
        # The device needs only ioctl(2), which every profile allows.
        return run_container(facts, f"--device={DEVICE}")
    return (
        f"SystemCallFilter=userfaultfd in the systemd unit, or --device={DEVICE} for the container"
    )


def ptrace_scope(facts: Facts) -> str:
    """Allow processes of the same user to trace each other."""
    return sysctl(facts, "kernel.yama.ptrace_scope=0")
