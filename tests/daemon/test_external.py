"""Policies that answer from a process of their own: nothing that the owner does can stop them."""

from __future__ import annotations

import os
import threading

import pytest
import trio
from structlog.testing import capture_logs

from tests.daemon.external import POLICIES, read_with_gil, server_of, until
from tests.daemon.external_policies import DATA, PAGES
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE
from uffdaemon import Advice, FaultKind, Hooks, Memory, Outcome, actions, errors, open_daemon
from uffdaemon.lowlevel import Features, RemoveEvent

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
async def test_an_owner_that_reads_no_reports_is_still_served() -> None:
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


# -- policies that cannot be loaded -------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("no colon", "name of an external policy is 'package.module:object'"),
        ("package.module:", "name of an external policy is 'package.module:object'"),
        ("package..module:name", "name of an external policy is 'package.module:object'"),
        ("package:name(1)", "name of an external policy is 'package.module:object'"),
        ("7up:drink", "name of an external policy is 'package.module:object'"),
        ("__main__:policy", "run it again"),
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
            with pytest.raises(
                errors.PlacementRefused, match="cannot call a function of this process"
            ):
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
        (POLICIES + "Shop", r"add '\(\)' to its name to have it called"),
        (POLICIES + "number()", "TypeError: the name ends with .*, but 7 is not callable"),
        (POLICIES + "make_nonsense()", "TypeError: a policy is a callable"),
        (POLICIES + "make_trouble()", "LookupError: the image is not there"),
        (POLICIES + "leave()", "SystemExit: enough"),
        (POLICIES + "moved", "moves pages"),
    ],
)
@kernel_test()
async def test_a_policy_that_the_worker_cannot_load_is_reported_to_the_owner(
    policy: str, reason: str
) -> None:
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
            [line] = [line for line in logs if line["event"] == "external policy not loaded"]
            assert (line["policy"], line["log_level"]) == (policy, "error")
            daemon.remove_region(region, missing="release")
            await trio.to_thread.run_sync(reader.join)
