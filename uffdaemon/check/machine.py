"""Collects the facts about this machine: reads files, and runs the probes."""

from __future__ import annotations

import grp
import os
import platform
import pwd
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from uffdaemon.check.facts import FILES, HUGETLB, Attempt, Device, Facts, Reading
from uffdaemon.check.isolation import attempt
from uffdaemon.check.probes import run_all

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROOT: Final = Path("/")
_HUGETLB_FILES: Final = (
    "nr_hugepages",
    "free_hugepages",
    "resv_hugepages",
    "nr_overcommit_hugepages",
)


def collect(root: Path = _ROOT, attempts: Mapping[str, Attempt] | None = None) -> Facts:
    """Collect the facts.  `root` is the directory that holds proc, sys and dev; the probes are run
    unless their results are given as `attempts`."""
    return Facts(
        release=platform.release(),
        machine=platform.machine(),
        uid=os.geteuid(),
        user=_user_name(os.geteuid()),
        group=_group_name(os.getegid()),
        interpreter=os.path.realpath(sys.executable),
        container=_container(root),
        files=_files(root),
        device=_device(root / "dev/userfaultfd"),
        attempts=run_all(attempt) if attempts is None else attempts,
    )


def _files(root: Path) -> dict[str, Reading]:
    found = {path: _read(root / path) for path in FILES}
    for size in sorted((root / HUGETLB).glob("hugepages-*kB")):
        for name in _HUGETLB_FILES:
            found[f"{HUGETLB}/{size.name}/{name}"] = _read(size / name)
    return found


def _read(path: Path) -> Reading:
    try:
        return Reading(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Reading()
    except (OSError, UnicodeError) as error:
        return Reading(error=str(error))


def _device(path: Path) -> Device:
    try:
        status = path.stat()
        accessible = os.access(path, os.R_OK | os.W_OK, effective_ids=True)
    except FileNotFoundError:
        return Device()
    except OSError as error:
        return Device(error=str(error))
    return Device(
        exists=True,
        is_device=stat.S_ISCHR(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        owner=_user_name(status.st_uid),
        group=_group_name(status.st_gid),
        accessible=accessible,
    )


def _container(root: Path) -> str:
    """The engine of the container, by the file or environment variable that each engine leaves.

    A virtual machine made from a container image has those files too.  But only a container that
    is confined has /proc/sys mounted read-only.
    """
    try:
        if not os.statvfs(root / "proc/sys").f_flag & os.ST_RDONLY:
            return ""
    except OSError:
        return ""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    for path, engine in (("run/.containerenv", "podman"), (".dockerenv", "docker")):
        # Not Path.exists(), which raises if a parent directory may not be searched.
        if os.path.exists(root / path):  # noqa: PTH110
            return engine
    return os.environ.get("container", "")  # noqa: SIM112  # systemd's and podman's own spelling


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
