"""The command on this machine as it is, and confined."""

from __future__ import annotations

import grp
import json
import os
import platform
import pty
import pwd
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.check import children
from tests.check.children import check, run
from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT
from uffdaemon import cli
from uffdaemon.check.facts import FILES, SYSCTL
from uffdaemon.uapi.features import SINCE

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to drop privileges: sudo -E make test"
)


def found(report: dict[str, Any], key: str) -> dict[str, Any]:
    one = report["findings"][key]
    assert isinstance(one, dict)
    return one


# -- this machine --------------------------------------------------------------------------------


@pytest.mark.kernel
def test_this_machine() -> None:
    status, report = check()
    assert status == 0
    assert report["works"] is True
    assert report["format"] == 1
    assert report["kernel"]["release"] == platform.release()
    assert report["user"]["uid"] == os.geteuid()
    # No probe failed in an unexpected way.
    assert [key for key, one in report["findings"].items() if one["mark"] == "unknown"] == []
    for feature, since in SINCE.items():
        one = found(report, f"feature.{feature.name}")
        assert one["details"]["since"] == since
        assert one["details"]["available"] == (one["mark"] == "ok")


@pytest.mark.kernel
def test_this_machine_for_a_person() -> None:
    done = run("uffdaemon", "check")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "The core works" in done.stdout
    for feature in SINCE:
        assert re.search(
            rf"^  (ok|missing) +{feature.name} +since Linux", done.stdout, re.MULTILINE
        )


@pytest.mark.kernel
def test_nothing_is_changed() -> None:
    watched = [path for path in FILES if not path.startswith("proc/self")]
    watched += [f"sys/kernel/mm/hugepages/{size}/nr_hugepages" for size in huge_page_sizes()]
    before = {path: content(path) for path in watched}
    check()
    assert {path: content(path) for path in watched} == before


def huge_page_sizes() -> list[str]:
    directory = Path("/sys/kernel/mm/hugepages")
    return [size.name for size in directory.iterdir()] if directory.is_dir() else []


def content(path: str) -> str | None:
    file = Path("/", path)
    return file.read_text(encoding="utf-8") if file.is_file() else None


# -- confined ------------------------------------------------------------------------------------


@pytest.mark.kernel
@needs_root
def test_an_unprivileged_user() -> None:
    if content(SYSCTL) != "0\n":
        pytest.skip("everybody may have kernel faults: sysctl -w vm.unprivileged_userfaultfd=0")
    status, report = check("--user", "nobody")
    assert status == 0
    assert report["user"]["name"] == "nobody"
    assert found(report, "core")["mark"] == "limited"
    assert found(report, "core")["details"]["kernel_faults"] is False
    assert found(report, "open.user_mode")["mark"] == "ok"
    refused = found(report, "open.syscall")
    assert refused["mark"] == "missing"
    assert refused["details"] == {"error": "EPERM"}
    assert refused["mend"].endswith("sysctl -w vm.unprivileged_userfaultfd=1")
    assert found(report, "permission.capability")["mark"] == "missing"
    assert "cap" in found(report, "permission.event_fork")["mend"].lower()
    # What needs no privilege still works.
    assert found(report, "operation.pagemap_scan")["mark"] == "ok"


@needs_root
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "KILL"])
def test_behind_a_seccomp_filter(answer: str) -> None:
    status, report = check("--user", "nobody", "--refuse", answer)
    if found(report, "open.device")["mark"] == "ok":
        pytest.skip("everybody may open the device: chmod 600 /dev/userfaultfd")
    assert status == 1
    assert report["works"] is False
    seccomp = found(report, "permission.seccomp")
    assert seccomp["mark"] == "missing"
    assert "a seccomp filter blocks the system call" in seccomp["found"]
    assert seccomp["details"] == {"filtered": True, "blocks_userfaultfd": True}
    assert seccomp["mend"]
    assert "seccomp" in found(report, "open.syscall")["found"]


@pytest.mark.kernel
@needs_root
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "KILL"])
def test_the_device_gets_past_a_seccomp_filter(answer: str) -> None:
    if not Path("/dev/userfaultfd").exists():
        pytest.skip("this machine has no /dev/userfaultfd: boot Linux 6.1 or later")
    status, report = check("--refuse", answer)
    assert status == 0
    assert found(report, "core")["details"] == {"how": "device", "kernel_faults": True}
    assert found(report, "permission.seccomp")["mark"] == "limited"
    assert "seccomp" in found(report, "open.user_mode")["found"]


@pytest.mark.kernel
@needs_root
def test_behind_a_seccomp_filter_that_allows_userfaultfd() -> None:
    status, report = check("--refuse", "NOTHING")
    assert status == 0
    assert found(report, "permission.seccomp")["mark"] == "ok"
    assert found(report, "permission.seccomp")["details"]["filtered"] is True


@needs_root
def test_neither_system_call_nor_device() -> None:
    status, report = check("--refuse", "EPERM", "--hide-device")
    assert status == 1
    assert found(report, "core")["mark"] == "missing"
    assert found(report, "open.device")["details"] == {"error": "ENOENT"}


@pytest.mark.kernel
@needs_root
def test_without_the_device() -> None:
    status, report = check("--hide-device")
    assert status == 0
    assert found(report, "permission.device")["details"] == {"exists": False}
    device = found(report, "open.device")
    assert device["mark"] == "missing"
    assert "/dev/userfaultfd" in device["mend"] or "boot" in device["mend"]


@pytest.mark.kernel
@needs_root
def test_a_group_that_may_open_the_device_needs_no_capability_and_no_system_call() -> None:
    if not Path("/dev/userfaultfd").exists():
        pytest.skip("this machine has no /dev/userfaultfd: boot Linux 6.1 or later")
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    status, report = check("--give-device", group, "--user", "nobody", "--refuse", "EPERM")
    assert status == 0
    assert found(report, "core")["details"] == {"how": "device", "kernel_faults": True}
    assert found(report, "permission.device")["details"]["mode"] == "0660"
    assert found(report, "permission.event_fork")["mark"] == "missing"


@pytest.mark.kernel
@needs_root
def test_the_capability_is_enough_without_root() -> None:
    status, report = check("--user", "nobody", "--keep-ptrace")
    assert status == 0
    assert found(report, "core")["details"] == {"how": "syscall", "kernel_faults": True}
    assert found(report, "permission.event_fork")["mark"] == "ok"
    assert found(report, "permission.capability")["mark"] == "ok"


@pytest.mark.kernel
@needs_root
def test_the_capability_of_another_user_namespace_does_not_count() -> None:
    if content(SYSCTL) != "0\n":
        pytest.skip("everybody may have kernel faults: sysctl -w vm.unprivileged_userfaultfd=0")
    status, report = check("--user-namespace")
    assert status == 0
    assert report["user"]["uid"] == 0
    capability = found(report, "permission.capability")
    assert capability["mark"] == "limited"
    assert capability["details"] == {"effective": True, "initial_user_namespace": False}
    assert found(report, "open.syscall")["details"] == {"error": "EPERM"}
    assert found(report, "open.user_mode")["mark"] == "ok"
    assert found(report, "permission.seccomp")["mark"] == "ok"
    assert found(report, "permission.event_fork")["mark"] == "missing"


@needs_root
def test_in_something_like_a_container() -> None:
    _, report = check("--read-only-sysctl", environment={"container": "podman"})
    assert report["container"] in ("podman", "docker")
    fixes = [one["mend"] for one in report["findings"].values()]
    assert not [fix for fix in fixes if fix.startswith(("sudo", "echo", "sysctl"))]


# -- the command line ----------------------------------------------------------------------------


def test_version() -> None:
    done = run("uffdaemon", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("uffdaemon ")


def test_help_names_the_commands() -> None:
    done = run("uffdaemon", "--help")
    assert done.returncode == 0
    assert "check" in done.stdout
    assert "demo" in done.stdout
    help_of_check = run("uffdaemon", "check", "--help").stdout
    assert "--json" in help_of_check
    assert "Exit status" in help_of_check


@pytest.mark.parametrize("arguments", [(), ("chekc",), ("check", "--jsno")])
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    done = run("uffdaemon", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: uffdaemon")


def test_the_demo_parses_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    demo = ModuleType("uffdaemon.demo")
    demo.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uffdaemon.demo", demo)
    assert cli.main(["demo", "--size", "64", "--help"]) == 7
    assert seen == [["--size", "64", "--help"]]


def test_a_reader_that_closes_early() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "uffdaemon", "check"],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colour_on_a_terminal(environment: dict[str, str], coloured: bool) -> None:
    assert (b"\x1b[" in on_a_terminal(environment)) == coloured


def test_no_colour_elsewhere() -> None:
    assert "\x1b" not in run("uffdaemon", "check", environment={"TERM": "xterm"}).stdout


def test_no_colour_in_json() -> None:
    done = run("uffdaemon", "check", "--json", environment={"TERM": "xterm"})
    assert json.loads(done.stdout)["format"] == 1


def on_a_terminal(environment: dict[str, str]) -> bytes:
    ours, theirs = pty.openpty()
    inherited = {key: value for key, value in os.environ.items() if key not in children.PLAIN}
    with subprocess.Popen(
        [sys.executable, "-m", "uffdaemon", "check"],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=theirs,
        stdin=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        printed = b""
        try:
            while piece := os.read(ours, 65536):
                printed += piece
        except OSError:  # EIO: no process has the terminal open any more
            pass
        finally:
            os.close(ours)
            process.kill()
    return printed
