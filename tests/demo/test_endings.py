"""However the demo ends, it prints the reason in one line, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.demo.harness import WORKER, demo, wait_for_end
from tests.support.requirements import require
from uffdaemon.demo import main
from uffdaemon.uapi.features import Features

if TYPE_CHECKING:
    from pathlib import Path

ENDLESS = ("--size", "1M", "--rounds", "1000000")
BUILDING = ("--size", "100G")


@pytest.fixture
def _userfaultfd() -> None:
    require(Features(0), user_mode_only=True)


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        pytest.param(BUILDING, "building the image", id="building"),
        pytest.param(ENDLESS, "eager.*worker", id="eager"),
        pytest.param(ENDLESS, "lazy.*worker", id="lazy"),
    ],
)
def test_a_signal(
    tmp_path: Path, number: signal.Signals, arguments: tuple[str, ...], moment: str
) -> None:
    with demo(tmp_path, *arguments) as running:
        running.wait_for(moment)
        running.process.send_signal(number)
        assert running.end() == 128 + number
        why = "interrupted" if number is signal.SIGINT else f"ended by {number.name}"
        assert running.errors[-1] == f"uffdaemon demo: {why}"
        assert "Traceback" not in "\n".join(running.errors)
        assert running.report() == ""
        assert running.leavings() == []


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
def test_ctrl_c_in_a_terminal_reaches_all_processes_at_once(tmp_path: Path) -> None:
    with demo(tmp_path, *ENDLESS) as running:
        running.wait_for("lazy.*worker")
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.end() == 128 + signal.SIGINT
        assert running.errors[-1] == "uffdaemon demo: interrupted"
        assert "Traceback" not in "\n".join(running.errors)
        assert running.leavings() == []


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_a_killed_worker(tmp_path: Path, mode: str) -> None:
    with demo(tmp_path, *ENDLESS) as running:
        # One that has sent its answers is not needed any more: then the next one is killed.
        for line in running.lines():
            found = WORKER.search(line)
            if found and found["name"] == mode:
                try:
                    os.kill(int(found["pid"]), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        assert running.end() == 1
        last = running.errors[-1]
        assert last.startswith(f"uffdaemon demo: the worker ({mode}, ")
        assert last.endswith("was killed by SIGKILL")
        assert "Traceback" not in "\n".join(running.errors)
        assert running.leavings() == []


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
def test_the_worker_exits_when_the_daemon_is_killed(tmp_path: Path) -> None:
    with demo(tmp_path, *ENDLESS) as running:
        worker = int(running.wait_for(r"lazy.*worker (\d+)")[1])
        # The stopped daemon resolves nothing: the worker waits for it, or for a page.
        running.process.send_signal(signal.SIGSTOP)
        pidfd = os.pidfd_open(worker)
        try:
            running.process.kill()
            wait_for_end(pidfd)
        finally:
            os.close(pidfd)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    private = _private_mounts()
    # The mount is in a namespace of its own, and ends with the last process in it.
    script = f'mount -t tmpfs -o size=4m none {disk} && "$@"; s=$?; ls -A {disk}; exit $s'
    command = [*private, "sh", "-c", script, "sh"]
    with demo(tmp_path, "--directory", str(disk), command=command) as running:
        assert running.end() == 1
        assert running.errors[-1].startswith(f"uffdaemon demo: no room for the image in {disk}/")
        assert "Traceback" not in "\n".join(running.errors)
        assert running.report() == "", "files are left"
        assert running.leavings() == []


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
def test_a_userfaultfd_that_is_refused(tmp_path: Path) -> None:
    # As in a container: the system call is blocked, and the device cannot be opened.
    device = "/dev/userfaultfd"
    script = f'[ ! -e {device} ] || mount --bind /dev/null {device} && exec "$@"'
    command = [*_private_mounts(), "sh", "-c", script, "sh"]
    module = ["tests.support.confined", "--refuse", "EPERM", "--"]
    with demo(tmp_path, "--size", "1M", command=command, module=module) as running:
        assert running.end() == 1
        assert re.fullmatch(
            r"uffdaemon demo: the worker \(lazy, \w+\): userfaultfd: EPERM .* \[.*\]",
            running.errors[-1],
        )
        assert "Traceback" not in "\n".join(running.errors)
        assert running.leavings() == []


def _private_mounts() -> list[str]:
    """The prefix of a command that runs another one in its own mount namespace."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare; on Debian: apt install util-linux")
    for command in ([unshare, "--mount"], [unshare, "--map-root-user", "--mount"]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("a private tmpfs needs root, or sysctl kernel.unprivileged_userns_clone=1")


@pytest.mark.kernel
@pytest.mark.usefixtures("_userfaultfd")
def test_a_query_that_sqlite_does_not_understand(tmp_path: Path) -> None:
    with demo(tmp_path, "--size", "1M", "--query", '"') as running:
        assert running.end() == 1
        assert "SQLite: unterminated string" in running.errors[-1]
        assert running.leavings() == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "0"], "'0' is not a size such as 64M or 2G"),
        (
            ["--size", "-5M"],
            "argument --size: ",
        ),  # whether it looks like an option depends on Python
        (["--size", "much"], "'much' is not a size"),
        (["--size", "1e400"], "'1e400' is not a size"),
        (["--size", "nan"], "'nan' is not a size"),
        (["--size", ""], "'' is not a size"),
        (["--rounds", "0"], "'0' is not a positive number"),
        (["--fault-around", "some"], "'some' is not a positive number"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--json", "--size", "--directory", "--keep", "--image", "--query", "--rounds"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--directory", "absent"], "No such file or directory"),
        (["--image", "absent"], "absent is not a file"),
        (["--image", __file__], "is not an image of this demo"),
    ],
)
def test_missing_files(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    with demo(tmp_path, *arguments) as running:
        assert running.end() == 1
        assert complaint in running.errors[-1]
        assert len(running.errors) == 1
        assert running.leavings() == []
