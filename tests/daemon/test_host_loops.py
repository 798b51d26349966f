"""trio as a guest of asyncio, in other threads, with asyncio beside it: no loop stands still."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import BytesSource, CopyFrom, Memory, actions, open_daemon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from outcome import Outcome

    from uffdaemon import Policy
    from uffdaemon.placement import PlacementName

DATA = content(8)
SOURCE = BytesSource(DATA)
POLICIES: dict[str, Policy] = {"rules": CopyFrom(SOURCE), "python": lambda _: actions.Copy(SOURCE)}

both_policies = pytest.mark.parametrize("policy", POLICIES)
both_placements = pytest.mark.parametrize("placement", ["native", "in_process"])


async def _read_in_thread(memory: Memory, page: int) -> bytes:
    return await trio.to_thread.run_sync(memory.read, page * PAGE, PAGE)


async def _serve(
    policy: str, placement: PlacementName, turn: Callable[[], Awaitable[None]]
) -> None:
    """Serve pages; between any two of them, `turn` has trio wait without a deadline."""
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            daemon.guard(memory, POLICIES[policy], placement=placement)
            for page in range(8):
                assert await _read_in_thread(memory, page) == DATA[page * PAGE :][:PAGE]
                await turn()


@both_policies
@both_placements
@kernel_test()
def test_as_a_guest_it_leaves_the_sleep_to_its_host(policy: str, placement: PlacementName) -> None:
    async def host() -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def done(outcome: Outcome[None]) -> None:
            loop.call_soon(lambda: outcome.unwrap() if ended.done() else ended.set_result(None))
            outcomes.append(outcome)

        async def turn() -> None:
            # trio waits without a deadline, and only the host can wake it.
            event = trio.Event()
            token = trio.lowlevel.current_trio_token()
            loop.call_later(0.001, token.run_sync_soon, event.set)
            await event.wait()

        outcomes: list[Outcome[None]] = []
        trio.lowlevel.start_guest_run(
            _serve,
            policy,
            placement,
            turn,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done,
        )
        await ended
        outcomes[0].unwrap()

    asyncio.run(host())


@both_policies
@both_placements
@kernel_test()
def test_asyncio_beside_it_goes_on(policy: str, placement: PlacementName) -> None:
    loop = asyncio.new_event_loop()
    beside = threading.Thread(target=loop.run_forever)
    beside.start()

    async def turn() -> None:
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def later() -> None:
            loop.call_later(0.001, token.run_sync_soon, event.set)

        loop.call_soon_threadsafe(later)
        await event.wait()

    try:
        trio.run(_serve, policy, placement, turn)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        beside.join()
        loop.close()


@both_policies
@both_placements
@kernel_test()
def test_it_serves_in_threads_other_than_the_main_one(
    policy: str, placement: PlacementName
) -> None:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            trio.run(_serve, policy, placement, trio.lowlevel.checkpoint)
        except BaseException as error:  # noqa: BLE001  # raised below
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
