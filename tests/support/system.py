"""Settings of the machine that tests change for a while, and put back."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.requirements import unavailable
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_PAGES = 48
"""How many the tests ask for; one test uses less than half, and two runs may overlap."""

_POOL = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_SIZE >> 10}kB")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SHMEM_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_KSM = Path("/sys/kernel/mm/ksm")
_DISK = "/var/tmp"  # noqa: S108  # a disk, where /tmp may be memory; the file's name is random
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


@contextmanager
def huge_pages(count: int = HUGE_PAGES) -> Iterator[None]:
    """Reserve `count` huge pages more.  Runs side by side add up, and each takes back its own."""
    if not _POOL.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    number = _POOL / "nr_hugepages"
    try:
        with _locked("huge"):
            before = int(number.read_text())
            number.write_text(str(before + count))
            got = int(number.read_text()) - before
    except PermissionError:
        if int((_POOL / "free_hugepages").read_text()) < count:
            advice = f"as root: sysctl vm.nr_hugepages={count}"
            unavailable(f"fewer than {count} huge pages are free", advice)
        yield
        return
    try:
        if got < count:
            unavailable(f"only {got} of {count} huge pages could be had", "free some memory")
        yield
    finally:
        with _locked("huge"):
            number.write_text(str(max(0, int(number.read_text()) - got)))


@contextmanager
def transparent_huge_pages() -> Iterator[None]:
    """See to it that MADV_HUGEPAGE is listened to."""
    if not _THP.exists():
        pytest.skip("this kernel has no transparent huge pages")
    with ExitStack() as stack:
        if "[never]" in _THP.read_text():
            stack.enter_context(_set(_THP, "madvise", "never"))
        yield


@contextmanager
def shmem_huge_pages() -> Iterator[None]:
    """Let shared memory have transparent huge pages wherever they fit."""
    if not _SHMEM_THP.exists():
        pytest.skip("this kernel has no transparent huge pages")
    before = _SHMEM_THP.read_text().partition("[")[2].partition("]")[0]
    with _locked("shmem_thp"), _set(_SHMEM_THP, "always", before):
        yield


@contextmanager
def ksm() -> Iterator[None]:
    """Let KSM merge at once what is MADV_MERGEABLE."""
    if not _KSM.exists():
        pytest.skip("this kernel has no KSM")
    with _locked("ksm"), ExitStack() as stack:
        for name, value in (("sleep_millisecs", "5"), ("pages_to_scan", "2000"), ("run", "1")):
            path = _KSM / name
            stack.enter_context(_set(path, value, path.read_text().strip()))
        yield


@contextmanager
def swap(length: int = 64 << 20) -> Iterator[None]:
    """A file to swap to, for as long as it takes.  Where there is swap already, that is used."""
    # Locked before looking: what is there may be another run's, and go with it.
    with _locked("swap"), ExitStack() as stack:
        with open("/proc/swaps", encoding="ascii") as swaps:
            there = len(swaps.readlines()) > 1
        if not there:
            stack.enter_context(_swap_file(length))
        yield


@contextmanager
def _swap_file(length: int) -> Iterator[None]:
    environment = os.environ | {"PATH": _SBIN}
    # Not in memory: a file of tmpfs cannot be swapped to.
    with tempfile.NamedTemporaryFile(dir=_DISK) as file:
        os.posix_fallocate(file.fileno(), 0, length)
        os.fsync(file.fileno())
        for command in ("mkswap", "swapon"):
            done = subprocess.run(
                [command, file.name], capture_output=True, check=False, env=environment
            )
            if done.returncode:
                unavailable(f"{command}: {done.stderr.decode().strip()}", "swapon takes root")
        try:
            yield
        finally:
            subprocess.run(["swapoff", file.name], check=True, env=environment)


@contextmanager
def _set(path: Path, value: str, before: str) -> Iterator[None]:
    try:
        path.write_text(value)
    except PermissionError:
        unavailable(f"{path} may not be changed", f"as root: echo {value} > {path}")
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def _locked(what: str) -> Iterator[None]:
    """Keep other runs of these tests away; every user has locks of their own."""
    path = Path(tempfile.gettempdir()) / f"uffdaemon-tests-{what}-{os.getuid()}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
