from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.check import machines
from uffdaemon.check.facts import FILES, HUGETLB, KSM_RUN, SYSCTL, Facts, NotKnownError
from uffdaemon.check.machine import collect

if TYPE_CHECKING:
    from pathlib import Path

ATTEMPTS = machines.everything().attempts


def put(root: Path, path: str, content: bytes) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


def look(root: Path) -> Facts:
    return collect(root, ATTEMPTS)


def test_an_empty_machine(tmp_path: Path) -> None:
    facts = look(tmp_path)
    assert all(facts.read(path) is None for path in FILES)
    assert not facts.device.exists
    assert facts.container == ""
    assert facts.attempts == ATTEMPTS
    assert facts.uid == os.geteuid()


def test_files_are_read(tmp_path: Path) -> None:
    put(tmp_path, SYSCTL, b"1\n")
    put(tmp_path, f"{HUGETLB}/hugepages-2048kB/nr_hugepages", b"7\n")
    facts = look(tmp_path)
    assert facts.read(SYSCTL) == "1"
    assert facts.read(f"{HUGETLB}/hugepages-2048kB/nr_hugepages") == "7"
    assert facts.read(f"{HUGETLB}/hugepages-2048kB/free_hugepages") is None


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, SYSCTL, b"\xff\xfe")
    (tmp_path / KSM_RUN).mkdir(parents=True)
    facts = look(tmp_path)
    with pytest.raises(NotKnownError, match=SYSCTL):
        facts.read(SYSCTL)
    with pytest.raises(NotKnownError, match="Is a directory"):
        facts.read(KSM_RUN)


def test_a_device_that_is_a_file(tmp_path: Path) -> None:
    put(tmp_path, "dev/userfaultfd", b"")
    (tmp_path / "dev/userfaultfd").chmod(0o640)
    device = look(tmp_path).device
    assert device.exists
    assert not device.is_device
    assert device.mode == 0o640
    assert device.accessible


def test_a_device_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "dev", b"")
    assert "Not a directory" in look(tmp_path).device.error


@pytest.mark.parametrize(
    ("trace", "read_only", "container"),
    [
        ("run/.containerenv", True, "podman"),
        (".dockerenv", True, "docker"),
        ("nothing", True, ""),
        # A virtual machine made from a Docker image.
        (".dockerenv", False, ""),
    ],
)
def test_containers_leave_traces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trace: str,
    read_only: bool,
    container: str,
) -> None:
    flags = SimpleNamespace(f_flag=os.ST_RDONLY if read_only else 0)
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    monkeypatch.delenv("container", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    put(tmp_path, trace, b"")
    assert look(tmp_path).container == container
    if read_only:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        assert look(tmp_path).container == "kubernetes"


def test_users_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    monkeypatch.setattr(os, "getegid", lambda: 4_000_000_001)
    facts = look(tmp_path)
    assert (facts.user, facts.group) == ("4000000000", "4000000001")
