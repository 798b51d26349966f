"""External policies whose workers, supervisors and owners end, and regions that do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.daemon.external import POLICIES, has_ended, has_noted, read_with_gil, server_of, until
from tests.daemon.external_policies import DATA, PAGES
from tests.support.calls import Barrier, in_thread
from tests.support.clib import Helpers
from tests.support.descriptors import open_descriptors, open_kept_descriptors
from tests.support.kernel_tests import kernel_test
from tests.support.messages import wait_readable
from tests.support.page_contents import PAGE
from tests.support.paths import ROOT
from uffdaemon import Advice, Memory, Region, Shutdown, errors, open_daemon
from uffdaemon.external.owner import ExternalServer
from uffdaemon.external.plan import ExternalOptions, ExternalPolicy
from uffdaemon.log import Log, LogThread
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd

# -- other processes' ends ---------------------------------------------------------------------


@kernel_test()
async def test_a_worker_that_dies_while_the_gil_is_held(tmp_path: Path) -> None:
    """The interpreter stands still from the first page to the last one; four workers die."""
    os.environ["MARKS"] = str(tmp_path)
    with Memory.map(len(DATA)) as memory, capture_logs() as logs:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, POLICIES + "dies_now_and_then", placement="external")
            assert read_with_gil(memory) == DATA
            await server_of(daemon, region).refresh()
            assert daemon.open_faults() == []
            assert len(os.listdir(tmp_path)) == PAGES // 64  # noqa: PTH208  # in memory, perhaps
    died = [line for line in logs if line["event"] == "external worker died"]
    assert [line["status"] for line in died] == ["the worker was killed by SIGKILL"] * 4
    assert died[0]["again_in"] == 0.0


@kernel_test()
async def test_workers_that_are_killed_under_load() -> None:
    pages = 8192
    with Memory.map(pages * PAGE) as memory:
        async with open_daemon() as daemon, trio.open_nursery() as nursery:
            region = daemon.guard(memory, POLICIES + "missing_only", placement="external")
            server = server_of(daemon, region)
            killed: list[int] = []
            left = 4

            async def touch(part: int) -> None:
                nonlocal left
                for page in range(part, pages, 4):
                    await trio.to_thread.run_sync(memory.write, page * PAGE, b"%d" % page)
                left -= 1

            async def kill() -> None:
                while len(killed) < 3:
                    await until(lambda: server.worker not in (None, *killed))
                    worker = server.worker
                    assert worker is not None
                    await server.refresh()
                    served = daemon.statistics().resolved
                    while left and daemon.statistics().resolved == served:
                        await server.refresh()
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)

            nursery.start_soon(kill)
            for part in range(4):
                nursery.start_soon(touch, part)
        for page in range(pages):
            data = b"%d" % page
            assert memory.read(page * PAGE, PAGE) == data + bytes(PAGE - len(data))
    assert len(killed) == 3


@kernel_test(features=Features.EVENT_REMOVE)
async def test_what_was_discarded_stays_discarded_for_the_next_worker() -> None:
    features = Features.THREAD_ID | Features.EVENT_REMOVE
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            server = server_of(daemon, region)
            await server.ready()
            memory.advise(Advice.DONTNEED, PAGE, PAGE)
            await has_noted(daemon, server, {"remove": 1})
            worker = server.worker
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            assert read_with_gil(memory) == DATA[:PAGE] + bytes(PAGE) + DATA[2 * PAGE :]


@kernel_test(features=Features.EVENT_FORK | Features.EVENT_REMOVE)
async def test_children_are_served_by_the_next_worker_as_well() -> None:
    """One that was born before, and its own child, which is born after; and what they discard."""
    features = Features.THREAD_ID | Features.EVENT_FORK | Features.EVENT_REMOVE
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            server = server_of(daemon, region)
            await server.ready()
            memory.advise(Advice.DONTNEED, 0, PAGE)
            born, go_on = Barrier(), Barrier()
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                memory.advise(Advice.DONTNEED, PAGE, PAGE)
                born.cross()
                go_on.wait()
                grandchild = os.fork()
                expected = bytes(2 * PAGE) + DATA[2 * PAGE :]
                right = read_with_gil(memory) == expected
                os.write(writing, b"y" if right else b"n")
                if grandchild:
                    os.waitpid(grandchild, 0)  # noqa: ASYNC222  # this is no trio program any more
                os._exit(0)
            await trio.to_thread.run_sync(born.wait)
            # Of what the parent discards now, the child knows nothing.
            memory.advise(Advice.DONTNEED, 2 * PAGE, PAGE)
            await has_noted(daemon, server, {"fork": 1, "remove": 3})
            worker = server.worker
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            go_on.cross()
            await trio.to_thread.run_sync(os.waitpid, child, 0)
            assert os.read(reading, 3) == b"yy"
            expected = DATA[PAGE : 2 * PAGE] + bytes(PAGE) + DATA[3 * PAGE :]
            assert read_with_gil(memory) == bytes(PAGE) + expected
            assert server.worker != worker


@kernel_test(features=Features.EVENT_REMAP | Features.EVENT_UNMAP)
async def test_memory_that_has_moved_is_found_by_the_next_worker() -> None:
    features = Features.THREAD_ID | Features.EVENT_REMAP | Features.EVENT_UNMAP
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            server = server_of(daemon, region)
            await server.ready()
            memory.remap()  # mremap(2) says of the old place that it is unmapped, too
            memory.unmap(8 * PAGE, PAGE)
            await has_noted(daemon, server, {"remap": 1, "unmap": 2})
            for _ in range(2):
                await until(lambda: server.worker is not None)
                worker = server.worker
                assert worker is not None
                os.kill(worker, signal.SIGKILL)
                await until(lambda: server.worker not in (None, worker))  # noqa: B023
            assert read_with_gil(memory, 0, 8 * PAGE) == DATA[: 8 * PAGE]
            assert read_with_gil(memory, 9 * PAGE) == DATA[9 * PAGE :]


@kernel_test()
async def test_a_policy_whose_workers_keep_dying_is_given_up() -> None:
    with (
        Userfaultfd.open(Features.THREAD_ID) as uffd,
        Memory.map(PAGE) as memory,
        capture_logs() as logs,
    ):
        policy = ExternalPolicy(POLICIES + "deadly")
        server = ExternalServer(
            uffd,
            Region(memory.start, PAGE, policy),
            log=Log(structlog.stdlib.get_logger(), LogThread()),
            options=ExternalOptions(restarts=2),
        )
        server.start(RegisterMode.MISSING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            try:
                reader = in_thread(memory.touch)
                await until(lambda: any(line["event"] == "fault failed" for line in logs))
                with pytest.raises(errors.PolicyNotLoaded, match=r"given up: .* died 3 times"):
                    await server.ready()
                await server.refresh()
                [held] = server.open_faults()
                assert "was killed by SIGKILL" in held.reason
                server.remove("release")
                await trio.to_thread.run_sync(reader.result)
            finally:
                await server.shut_down(Shutdown.HOLD, 1.0)
    died = [line["again_in"] for line in logs if line["event"] == "external worker died"]
    assert died == [0.0, 0.05, 0.1]


@kernel_test()
async def test_a_supervisor_that_is_killed_is_replaced() -> None:
    with Memory.map(len(DATA)) as memory, capture_logs() as logs:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, POLICIES + "copied", placement="external")
            server = server_of(daemon, region)
            await server.ready()
            supervisor, worker = server.supervisor, server.worker
            assert supervisor is not None
            assert worker is not None
            os.kill(supervisor, signal.SIGKILL)
            # While this interpreter cannot look after it, its worker answers still.
            assert read_with_gil(memory, 0, PAGE) == DATA[:PAGE]
            await has_ended(worker)
            await until(lambda: server.worker not in (None, worker))
            assert server.supervisor not in (None, supervisor)
            worker = server.worker
            assert worker is not None
            # The new one does what the old one did.
            os.kill(worker, signal.SIGKILL)
            assert read_with_gil(memory, PAGE) == DATA[PAGE:]
    [line] = [line for line in logs if line["event"] == "external supervisor died"]
    assert line["status"] == "was killed by signal 9"


OWNER = """
import mmap, sys
import trio
from uffdaemon import Memory, open_daemon

async def main():
    with Memory.map(mmap.PAGESIZE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, sys.argv[1], placement="external")
            server = daemon.external[region]
            if sys.argv[2] == "ready":
                await server.ready()
                print(server.supervisor, server.worker, flush=True)
                await trio.sleep_forever()
            import ctypes
            print((ctypes.c_char * 8).from_address(memory.start).raw, flush=True)

trio.run(main)
"""


@kernel_test()
def test_nothing_outlives_its_owner() -> None:
    command = [sys.executable, "-c", OWNER, POLICIES + "copied", "ready"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(pidfds) == 2, "the owner printed no supervisor and worker"
        owner.kill()
        for pidfd in pidfds:
            wait_readable(pidfd)


PARENT = """
import ctypes, mmap, os, sys
import trio
from uffdaemon import Memory, open_daemon
from uffdaemon.lowlevel import Features

async def main():
    with Memory.map(mmap.PAGESIZE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, sys.argv[1], placement="external", features=Features.EVENT_FORK
            )
            server = daemon.external[region]
            await server.ready()
            pids = server.supervisor, server.worker
            if os.fork() == 0:
                os.read(0, 1)  # until the parent is gone
                print((ctypes.c_char * 8).from_address(memory.start).raw.hex(), flush=True)
                os._exit(0)
            print(*pids, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


@kernel_test(features=Features.EVENT_FORK)
def test_children_that_outlive_the_owner_are_served_to_their_end() -> None:
    command = [sys.executable, "-c", PARENT, POLICIES + "copied"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(pidfds) == 2, "the owner printed no supervisor and worker"
        owner.kill()
        owner.wait()
        owner.stdin.close()
        assert bytes.fromhex(owner.stdout.readline().decode()) == DATA[:8]
        for pidfd in pidfds:
            wait_readable(pidfd)


@kernel_test()
def test_modules_are_found_where_the_owner_finds_them(tmp_path: Path) -> None:
    """Also beside a program that is no file."""
    Path(tmp_path, "beside.py").write_text(
        "from uffdaemon import BytesSource, CopyFrom\n"
        f"policy = CopyFrom(BytesSource(b'besides!'.ljust({PAGE})))\n"
    )
    command = [sys.executable, "-c", OWNER, "beside:policy", "touch"]
    found = subprocess.run(command, stdout=subprocess.PIPE, cwd=tmp_path, check=True)
    assert found.stdout == b"b'besides!'\n"


@kernel_test()
def test_a_hang_is_never_without_a_line() -> None:
    """The fault is held, and the interpreter of the owner with it: the worker prints."""
    command = [sys.executable, "-c", OWNER, POLICIES + "broken", "touch"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stderr is not None
        said: list[bytes] = []
        while not said or b"no such page" not in said[-1]:
            said.append(owner.stderr.readline())
            assert said[-1], said
        assert b"owner is not reading its reports" in said[0]
        owner.kill()
        # And nobody holds its standard error any longer.
        owner.stderr.read()


@kernel_test(features=Features.POISON)
def test_faults_of_a_policy_that_cannot_be_had_can_be_poisoned() -> None:
    program = OWNER.replace(
        'placement="external"',
        'placement="external", on_failure=__import__("uffdaemon").actions.Poison()',
    )
    command = [sys.executable, "-c", program, POLICIES + "make_trouble()", "touch"]
    found = subprocess.run(command, check=False, cwd=ROOT)
    assert found.returncode == -signal.SIGBUS


# -- its own end -------------------------------------------------------------------------------


@pytest.mark.parametrize("closed_first", [False, True], ids=["daemon-first", "memory-first"])
@kernel_test(features=Features.EVENT_UNMAP)
async def test_nothing_is_left_behind(closed_first: bool) -> None:
    features = Features.THREAD_ID | Features.EVENT_UNMAP
    await open_kept_descriptors()
    before = open_descriptors()
    with capture_logs() as logs:
        async with open_daemon() as daemon:
            memory = Memory.map(len(DATA))
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            server = server_of(daemon, region)
            await server.ready()
            pids = [pid for pid in (server.supervisor, server.worker) if pid is not None]
            assert len(pids) == 2
            if closed_first:
                memory.close()
                await server.ended.wait()
        memory.close()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222  # there is nobody to wait for
        assert open_descriptors() == before
        with pytest.raises(errors.DaemonClosed):
            await server.refresh()
    assert logs == []


@pytest.mark.parametrize("missing", [None, "hold", "poison", "release"])
@kernel_test(features=Features.POISON)
async def test_a_region_that_is_removed(missing: str | None, helpers: Path) -> None:
    with Memory.map(4 * PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, POLICIES + "copied", placement="external")
            server = server_of(daemon, region)
            assert read_with_gil(memory, PAGE, PAGE) == DATA[PAGE : 2 * PAGE]
            with pytest.raises(errors.RegionIncomplete, match="lacks 3 of 4 pages"):
                daemon.remove_region(region)
            assert read_with_gil(memory, 2 * PAGE, PAGE) == DATA[2 * PAGE : 3 * PAGE]
            if missing is None:
                assert read_with_gil(memory) == DATA[: memory.length]
            daemon.remove_region(region, missing=missing)  # type: ignore[arg-type]
            await server.ended.wait()
            kept = DATA[PAGE : 3 * PAGE]
            assert read_with_gil(memory, PAGE, 2 * PAGE) == kept
            if missing == "release":
                assert read_with_gil(memory) == bytes(PAGE) + kept + bytes(PAGE)
            elif missing == "poison":
                assert Helpers(helpers).touch(memory.start) != 0
            elif missing == "hold":
                # Whoever waits is served by whoever comes next.
                again = daemon.guard(memory, POLICIES + "copied", placement="external")
                assert read_with_gil(memory) == DATA[: memory.length]
                daemon.remove_region(again)


@pytest.mark.parametrize("how", list(Shutdown))
@kernel_test(features=Features.POISON)
async def test_open_faults_at_the_end(how: Shutdown, helpers: Path, tmp_path: Path) -> None:
    os.environ["MARKS"] = str(tmp_path)
    os.mkfifo(tmp_path / "gate")
    with Memory.map(PAGE) as memory, capture_logs() as logs:
        async with open_daemon(on_shutdown=how) as daemon:
            region = daemon.guard(memory, POLICIES + "gated", placement="external")
            reader = in_thread(Helpers(helpers).touch, memory.start)
            server = server_of(daemon, region)
            while not daemon.open_faults():
                await server.refresh()
            if how is Shutdown.RESOLVE:
                await trio.to_thread.run_sync(Path(tmp_path, "gate").write_bytes, b"")
        left = [line for line in logs if line["event"] == "thread left waiting"]
        assert len(left) == (how is Shutdown.HOLD)
        if how is Shutdown.HOLD:
            assert memory.userfaultfd is not None
            memory.userfaultfd.zeropage(memory.start, PAGE)
        # 0, or the code of a SIGBUS.
        assert (reader.result() != 0) == (how is Shutdown.POISON)
