"""Policies that answer from a process of their own: nothing that the owner does can stop them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.daemon.external_policies import DATA, PAGES
from tests.daemon.support import PAGE, Recorder, open_descriptors
from tests.kernel.clib import Helpers
from tests.kernel.harness import kernel_test
from tests.kernel.support import Barrier, in_thread, wait_readable
from tests.paths import ROOT
from uffdaemon import (
    Advice,
    Daemon,
    FaultKind,
    Features,
    Hooks,
    Memory,
    Outcome,
    Region,
    RegisterMode,
    RemoveEvent,
    Shutdown,
    Userfaultfd,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.external import ExternalServer
from uffdaemon.plans import ExternalOptions, ExternalPolicy

POLICIES = "tests.daemon.external_policies:"


def read_with_gil(memory: Memory, offset: int = 0, length: int | None = None) -> bytes:
    """A plain access of Python's: nobody else in this interpreter runs until it is answered."""
    length = memory.length - offset if length is None else length
    return bytes((ctypes.c_char * length).from_address(memory.start + offset).raw)


def server_of(daemon: Daemon, region: Region) -> ExternalServer:
    return daemon.external[region]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # of other processes nothing tells
        await trio.sleep(0.001)


async def has_noted(daemon: Daemon, server: ExternalServer, events: dict[str, int]) -> None:
    """Wait until the worker has seen to events, which it has counted before."""
    while daemon.statistics().events != events:
        await server.refresh()
    await server.refresh()


async def has_ended(pid: int) -> None:
    """Wait until a process that need not be our child is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


# -- answering ---------------------------------------------------------------------------------


@pytest.mark.smoke
@kernel_test()
async def test_plain_accesses_with_the_gil_held() -> None:
    recorder = Recorder()
    with Memory.map(len(DATA)) as memory:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = daemon.guard(memory, POLICIES + "copied", placement="external", name="image")
            # At once, in trio's own thread, before anything of trio's has run.
            assert read_with_gil(memory, 0, PAGE) == DATA[:PAGE]

            def elsewhere() -> tuple[int, bytes]:
                return threading.get_native_id(), read_with_gil(memory, PAGE)

            thread, found = await trio.to_thread.run_sync(elsewhere)
            assert found == DATA[PAGE:]
            server = server_of(daemon, region)
            await server.ready()
            await server.refresh()
            counted = daemon.statistics()
            assert counted.faults == {(FaultKind.MISSING, Outcome.COPIED): PAGES}
            assert counted.bytes_done == {Outcome.COPIED: len(DATA)}
            assert daemon.open_faults() == []
            seen = await recorder.resolutions(PAGES)
            assert [each.fault.page for each in seen] == list(range(PAGES))
            threads = [each.fault.thread for each in seen]
            assert threads == [threading.get_native_id()] + [thread] * (PAGES - 1)
            assert {each.outcome for each in seen} == {Outcome.COPIED}
            assert {each.done for each in seen} == {PAGE}
            assert {each.fault.region for each in seen} == {region}
        assert daemon.statistics().resolved == PAGES


@kernel_test()
async def test_an_owner_that_reads_no_reports_is_answered_all_the_same() -> None:
    """More endings than a socket holds, while the owner's interpreter stands still."""
    recorder = Recorder()
    pages = 16384
    with Memory.map(pages * PAGE) as memory:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.guard(memory, POLICIES + "missing_only", placement="external")
            assert read_with_gil(memory) == bytes(memory.length)
            await recorder.resolutions(pages)
    assert sorted(each.fault.page for each in recorder.resolved) == list(range(pages))


@pytest.mark.parametrize("name", ["make()", "Shop()", "Shop.made"])
@kernel_test()
async def test_what_a_policy_can_be(name: str) -> None:
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, POLICIES + name, placement="external")
            await server_of(daemon, region).ready()
            expected = DATA[:PAGE] if name == "make()" else bytes(PAGE)
            assert read_with_gil(memory) == expected


@kernel_test(features=Features.EVENT_FORK)
async def test_children_of_the_owner_are_served() -> None:
    """os.fork keeps the GIL until the event has been read."""
    features = Features.THREAD_ID | Features.EVENT_FORK
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            server = server_of(daemon, region)
            await server.ready()
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writing, b"right" if read_with_gil(memory) == DATA else b"wrong")
                os._exit(0)
            await trio.to_thread.run_sync(os.waitpid, child, 0)
            assert os.read(reading, 5) == b"right"
            assert read_with_gil(memory) == DATA
            await server.refresh()
            counted = daemon.statistics()
            assert counted.events == {"fork": 1}
            assert counted.faults == {(FaultKind.MISSING, Outcome.COPIED): 2 * PAGES}


@kernel_test(features=Features.EVENT_REMOVE)
async def test_hooks_hear_of_events_and_failures() -> None:
    recorder = Recorder()
    features = Features.THREAD_ID | Features.EVENT_REMOVE
    with Memory.map(2 * PAGE) as memory, capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = daemon.guard(
                memory, POLICIES + "broken", placement="external", features=features
            )
            memory.advise(Advice.DONTNEED, PAGE, PAGE)
            await recorder.until(lambda: recorder.events)
            assert recorder.events == [RemoveEvent(memory.start + PAGE, memory.end)]

            reader = threading.Thread(target=memory.touch, args=(0, PAGE), daemon=True)
            reader.start()
            [(fault, error)] = await recorder.failures(1)
            assert isinstance(error, errors.PolicyRaised)
            assert "no such page" in str(error)
            assert (fault.page, fault.region) == (0, region)
            await server_of(daemon, region).refresh()
            [held] = daemon.open_faults()
            assert held.threads == (reader.native_id,)
            assert "no such page" in held.reason
            assert held.age > 0
            daemon.remove_region(region, missing="release")
            await trio.to_thread.run_sync(reader.join)
    [line] = [line for line in logs if line["event"] == "fault failed"]
    assert (line["log_level"], line["then"], line["policy"]) == ("error", "hold", "broken")
    assert "LookupError" in line["exception"]


# -- policies that cannot be had ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("no colon", "named 'package.module:object'"),
        ("package.module:", "named 'package.module:object'"),
        ("package..module:name", "named 'package.module:object'"),
        ("package:name(1)", "named 'package.module:object'"),
        ("7up:drink", "named 'package.module:object'"),
        ("__main__:policy", "run it once more"),
        ("no_such_package.module:policy", "no module named 'no_such_package'"),
        (actions.Zero, "imported by another process"),
    ],
)
@kernel_test()
async def test_what_is_no_name_is_refused_at_once(policy: str, reason: str) -> None:
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            with pytest.raises(errors.PlacementRefused, match=reason):
                daemon.guard(memory, policy, placement="external")


@kernel_test()
async def test_what_cannot_travel_is_refused_at_once() -> None:
    name = POLICIES + "copied"
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            with pytest.raises(errors.PlacementRefused, match="cannot be asked by another one"):
                daemon.guard(
                    memory,
                    name,
                    placement="external",
                    on_failure=lambda fault, error: actions.Zero(),
                )
        async with open_daemon(hooks=[Hooks(before=lambda fault, action: None)]) as daemon:
            with pytest.raises(errors.PlacementRefused, match="before hook"):
                daemon.guard(memory, name, placement="external")
        async with open_daemon(on_fork=lambda event: "adopt") as daemon:
            with pytest.raises(errors.PlacementRefused, match="on_fork"):
                daemon.guard(memory, name, placement="external")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("tests.no_such_module:policy", "ModuleNotFoundError: No module named"),
        (POLICIES + "absent", "AttributeError: .* has no attribute 'absent'"),
        (POLICIES + "number", "TypeError: a policy is a callable that takes a fault, not 7"),
        (POLICIES + "Shop", r"with '\(\)' at its end, it is called to make one"),
        (POLICIES + "number()", "TypeError: 7 cannot be called"),
        (POLICIES + "make_nonsense()", "TypeError: a policy is a callable"),
        (POLICIES + "make_trouble()", "LookupError: the image is not there"),
        (POLICIES + "leave()", "SystemExit: enough"),
        (POLICIES + "moved", "moves pages"),
    ],
)
@kernel_test()
async def test_what_the_worker_cannot_load_is_said_here(policy: str, reason: str) -> None:
    with Memory.map(PAGE) as memory, capture_logs() as logs:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, policy, placement="external")
            reader = threading.Thread(target=memory.touch, daemon=True)
            reader.start()
            server = server_of(daemon, region)
            for _ in range(2):
                with pytest.raises(errors.PolicyNotLoaded, match=reason) as caught:
                    await server.ready()
                assert caught.value.policy == policy
            # Whoever waits is listed with the reason, and the failure is logged.
            await until(lambda: any(line["event"] == "fault failed" for line in logs))
            await server.refresh()
            [held] = daemon.open_faults()
            assert "PolicyNotLoaded" in held.reason
            [line] = [line for line in logs if line["event"] == "external policy refused"]
            assert (line["policy"], line["log_level"]) == (policy, "error")
            daemon.remove_region(region, missing="release")
            await trio.to_thread.run_sync(reader.join)


# -- other processes' ends ---------------------------------------------------------------------


@kernel_test(deadline=60)
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


@kernel_test(deadline=60)
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
async def test_a_policy_whose_workers_die_is_given_up() -> None:
    with (
        Userfaultfd.open(Features.THREAD_ID) as uffd,
        Memory.map(PAGE) as memory,
        capture_logs() as logs,
    ):
        policy = ExternalPolicy(POLICIES + "deadly")
        server = ExternalServer(
            uffd,
            Region(memory.start, PAGE, policy),
            log=structlog.stdlib.get_logger(),
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
import os, sys, threading
import trio
from uffdaemon import Memory, open_daemon

async def main():
    with Memory.map(4096) as memory:
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
        owner.kill()
        for pidfd in pidfds:
            wait_readable(pidfd)


PARENT = """
import ctypes, os, sys
import trio
from uffdaemon import Features, Memory, open_daemon

async def main():
    with Memory.map(4096) as memory:
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
        "policy = CopyFrom(BytesSource(b'besides!'.ljust(4096)))\n"
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
        assert b"the process whose memory it is does not listen" in said[0]
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


@kernel_test(features=Features.EVENT_FORK | Features.EVENT_REMOVE)
async def test_what_children_discard_comes_back_as_zeros() -> None:
    """Their notes move to where a successor finds them, while they are served already."""
    features = Features.THREAD_ID | Features.EVENT_FORK | Features.EVENT_REMOVE
    pages = range(1, 33)
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory, POLICIES + "copied", placement="external", features=features
            )
            await server_of(daemon, region).ready()
            reading, writing = os.pipe()
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    memory.read(0, PAGE)
                    for page in pages:
                        memory.advise(Advice.DONTNEED, page * PAGE, PAGE)
                        right = memory.read(page * PAGE, PAGE) == bytes(PAGE)
                        os.write(writing, b"y" if right else b"n")
                    os._exit(0)
                await trio.to_thread.run_sync(os.waitpid, child, 0)
            assert os.read(reading, 4096) == b"y" * 8 * len(pages)
