"""The runs on the daemon's side, and what can interrupt them."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.deadline import DEADLINE
from tests.support.kernel_tests import kernel_test
from tests.support.paths import ROOT
from uffdaemon.demo.errors import DemoError, WorkerDied, WorkerFailed
from uffdaemon.demo.image import build_image
from uffdaemon.demo.process import start_worker
from uffdaemon.demo.protocol import LIMIT, decode, short_name
from uffdaemon.demo.runs import Setting, check_cold, eager_run, fill_and_verify, lazy_run
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = PAGE_SIZE


class Watcher:
    """A progress that kills the worker at a given moment."""

    def __init__(self, *, kill_at: str = "") -> None:
        self.kill_at = kill_at
        self.filled: list[tuple[int, int]] = []
        self.worker = 0

    def stage(self, text: str) -> None:
        if found := re.search(r"worker (\d+)", text):
            self.worker = int(found[1])
        self._kill(text)

    def advance(self, label: str, done: int, total: int) -> None:
        self.filled.append((done, total))
        self._kill(label)

    def close(self) -> None:
        pass

    def _kill(self, moment: str) -> None:
        if self.kill_at and self.kill_at in moment:
            self.kill_at = ""
            os.kill(self.worker, signal.SIGKILL)


@contextmanager
def prepared(watcher: Watcher, *, size: int = 2 << 20, around: int = 4) -> Iterator[Setting]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = build_image(folder / "image.db", size)
        yield Setting(image, ("abstract", "class"), around, folder, watcher)
        assert [path.name for path in folder.iterdir()] == ["image.db"], "sockets are left"


def only(group: BaseException) -> BaseException:
    """The single error inside of nested groups."""
    while isinstance(group, BaseExceptionGroup):
        assert len(group.exceptions) == 1, group
        group = group.exceptions[0]
    return group


@kernel_test(user_mode_only=True)
async def test_a_fill_is_complete_and_its_progress_exact() -> None:
    watcher = Watcher()
    with prepared(watcher) as setting:
        run, fill, proof = await fill_and_verify(setting, "warm")
        expected = hashlib.sha256(setting.image.path.read_bytes()).hexdigest()
        size = setting.image.size
    assert proof.equal
    assert proof.memory_sha256 == proof.file_sha256 == expected
    assert (proof.differing_pages, proof.faults) == (0, 0)
    assert run.all_answers_pages < size // PAGE
    assert fill.bytes == size
    dones = [done for done, _ in watcher.filled]
    assert dones == sorted(dones)
    assert watcher.filled[-1] == (size, size)


@kernel_test(user_mode_only=True)
async def test_eager_and_lazy_give_the_same_answers() -> None:
    with prepared(Watcher()) as setting:
        eager = await eager_run(setting, "warm")
        lazy = await lazy_run(setting, "warm")
    assert eager.answers == lazy.answers
    assert [answer.query for answer in lazy.answers] == ["abstract", "class"]
    assert eager.faults == {}
    assert sum(lazy.faults.values()) > 0
    assert eager.cached_fraction == lazy.cached_fraction == 1.0


@pytest.mark.parametrize("moment", ["worker", "filling", "comparing"])
@kernel_test(user_mode_only=True)
async def test_a_worker_that_is_killed(moment: str) -> None:
    watcher = Watcher(kill_at=moment)
    with prepared(watcher) as setting, pytest.raises(BaseException) as caught:
        await fill_and_verify(setting, "warm")
    error = only(caught.value)
    assert isinstance(error, WorkerDied), error
    assert str(error).endswith("was killed by SIGKILL")
    with pytest.raises(ProcessLookupError):
        os.kill(watcher.worker, 0)


@kernel_test(user_mode_only=True)
async def test_a_run_that_is_cancelled_leaves_no_worker() -> None:
    watcher = Watcher()
    with prepared(watcher) as setting, trio.CancelScope() as scope:
        advance = watcher.advance

        def cancel(label: str, done: int, total: int) -> None:
            advance(label, done, total)
            scope.cancel()

        watcher.advance = cancel  # type: ignore[method-assign]
        await fill_and_verify(setting, "warm")
    assert scope.cancelled_caught
    assert watcher.filled
    with pytest.raises(ProcessLookupError):
        os.kill(watcher.worker, 0)


@kernel_test(user_mode_only=True)
async def test_an_image_that_shrinks_is_an_error_of_the_worker() -> None:
    with prepared(Watcher()) as setting:
        os.truncate(setting.image.path, setting.image.size - PAGE)
        with pytest.raises(WorkerFailed, match=r"the worker \(eager, warm\): .* ends after"):
            await eager_run(setting, "warm")


def program(folder: Path, script: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@kernel_test(user_mode_only=True)
async def test_a_worker_that_cannot_start_reports_why() -> None:
    with tempfile.TemporaryDirectory() as name:
        sys.executable = program(Path(name), "echo first >&2; echo last words >&2; exit 7")
        with pytest.raises(WorkerDied, match=r"ended with status 7: last words$"):
            async with start_worker(Path(name), "broken"):
                raise AssertionError("it started")


def test_a_file_system_without_a_disk_is_never_cold() -> None:
    memory = Path("/dev/shm")  # noqa: S108  # the one tmpfs that is everywhere
    if not memory.is_mount():
        pytest.skip(f"{memory} is not a separate file system here")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        cache = check_cold(build_image(Path(name, "image.db"), 1 << 20))
    assert not cache.cold
    assert cache.cached_fraction == 1.0
    assert "100.0%" in cache.note


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b'{"kind": "verify"}', "instead of start"),
        (b'{"kind": "start", "mode": "lazy"}', "field 'image'"),
    ],
)
def test_a_worker_reports_a_malformed_message(tmp_path: Path, packet: bytes, reason: str) -> None:
    path = tmp_path / ("a directory with a rather long name" * 4) / "socket"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with short_name(str(path)) as name:
            listener.bind(name)
        listener.listen()
        listener.settimeout(DEADLINE)
        command = [sys.executable, "-m", "uffdaemon.demo.worker", str(path)]
        with subprocess.Popen(command, cwd=ROOT) as worker:
            sock, _ = listener.accept()
            with sock:
                assert decode(sock.recv(LIMIT)).integer("pid") == worker.pid
                sock.sendall(packet)
                message = decode(sock.recv(LIMIT))
                assert message.kind == "failed"
                assert reason in message.text("error")
                assert worker.wait(DEADLINE) == 1


def test_a_worker_exits_when_its_daemon_does(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(DEADLINE)
        command = [sys.executable, "-m", "uffdaemon.demo.worker", str(tmp_path / "s")]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as worker:
            sock, _ = listener.accept()
            sock.close()
            _, errors = worker.communicate(timeout=DEADLINE)
            assert errors == b""
            assert worker.returncode in {0, 3}


def test_another_process_in_the_place_of_the_worker_is_refused(tmp_path: Path) -> None:
    async def intrude() -> None:
        async with trio.open_nursery() as nursery:

            async def connect() -> None:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    while True:
                        try:
                            sock.connect(str(tmp_path / "daemon.socket"))
                        except (FileNotFoundError, ConnectionRefusedError):
                            await trio.lowlevel.checkpoint()
                        else:
                            break
                    await trio.sleep_forever()

            nursery.start_soon(connect)
            async with start_worker(tmp_path, "late"):
                raise AssertionError("it was let in")

    with pytest.raises(BaseException) as caught:
        trio.run(intrude)
    error = only(caught.value)
    assert isinstance(error, DemoError)
    assert "another process connected" in str(error)
