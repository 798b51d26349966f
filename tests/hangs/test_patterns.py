"""Every access pattern against every placement: what works, what hangs, and what is said then."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pytest
import trio

from tests.hangs import served
from tests.hangs.hung import InPython, Toucher, WaitsForEver
from tests.hangs.measuring import Measured, measure
from tests.hangs.pattern import Guarded, Pattern, map_memory, run_and_check
from tests.hangs.patterns import PATTERNS
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Daemon,
    FirstOf,
    GuardedRegion,
    Memory,
    Policy,
    Watchdog,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from uffdaemon.placement import PlacementName, ResolverName

Where: TypeAlias = Literal["loop", "worker"]

everywhere = pytest.mark.parametrize("where", ["loop", "worker"])
"""In the thread that runs trio, and in another."""


@kernel_test()
def test_the_table_is_what_is_measured() -> None:
    found = measure(list(PATTERNS))
    assert found == {name: Measured.expected(pattern) for name, pattern in PATTERNS.items()}
    assert len(PATTERNS) > 43


# -- native and external: everything works -----------------------------------------------------


@everywhere
@kernel_test()
async def test_native_thread(where: Where) -> None:
    async with open_daemon() as daemon:
        for pattern in PATTERNS.values():
            await _works(daemon, pattern, where)
        assert not daemon.open_faults()


@everywhere
@kernel_test(features=Features.SIGBUS)
async def test_native_in_thread(where: Where) -> None:
    async with open_daemon() as daemon:
        for pattern in PATTERNS.values():
            if not pattern.system_call:
                await _works(daemon, pattern, where, resolver="in-thread")
        assert not daemon.open_faults()


@kernel_test(features=Features.SIGBUS)
async def test_native_in_thread_and_system_calls() -> None:
    """The kernel does not wait in them; what is there already it takes."""
    async with open_daemon() as daemon:
        for pattern in PATTERNS.values():
            if pattern.system_call:
                guarded, region = _guard(daemon, pattern, resolver="in-thread")
                with pytest.raises(OSError, match="Bad address") as raised:
                    run_and_check(pattern, guarded)
                assert raised.value.errno == errno.EFAULT
                region.prefault()
                run_and_check(pattern, guarded)


@everywhere
@kernel_test()
async def test_external(where: Where) -> None:
    async with open_daemon() as daemon:
        mapping, memory = map_memory(served.LENGTH)
        region = daemon.guard(memory, "tests.hangs.served:together", placement="external")
        buffer = region.buffer()
        for pattern in served.TOGETHER:
            data = pattern.make_data()
            at = served.OFFSETS[pattern.name]
            part = Guarded(buffer[at : at + len(data)], data, memory.start + at, mapping)
            await _run_there(pattern, part, where)
        for pattern in served.ALONE:
            await _works(daemon, pattern, where, placement="external")
        assert not daemon.open_faults()


async def _works(daemon: Daemon, pattern: Pattern, where: Where, **options: str) -> None:
    guarded, _ = _guard(daemon, pattern, **options)
    await _run_there(pattern, guarded, where)


async def _run_there(pattern: Pattern, guarded: Guarded, where: Where) -> None:
    if where == "loop":
        run_and_check(pattern, guarded)
    else:
        await trio.to_thread.run_sync(run_and_check, pattern, guarded)


def _guard(daemon: Daemon, pattern: Pattern, **options: str) -> tuple[Guarded, GuardedRegion]:
    """Fresh memory for a pattern; it stays until the process ends."""
    data = pattern.make_data()
    mapping, memory = map_memory(len(data))
    policy: object = CopyFrom(BytesSource(data))
    if options.get("placement") == "external":
        policy = f"tests.hangs.served:{pattern.name}"
    region = daemon.guard(memory, policy, name=pattern.name, **options)  # type: ignore[arg-type]
    return Guarded(region.buffer(), data, memory.start, mapping), region


# -- in process: who waits while Python is at it -----------------------------------------------


@pytest.mark.parametrize("name", ["file_readinto", "numpy_copy"])
@kernel_test()
def test_a_policy_that_waits_is_reported(name: str) -> None:
    """Its fault has been taken in, and nobody would ever read of it again."""
    toucher = Toucher(name, Watchdog(then="exit"), WaitsForEver)
    toucher.touch()
    text = toucher.read_until("has dequeued the fault but not finished it")
    assert toucher.names_the_place(), text
    toucher.read_all()
    assert toucher.status() == Watchdog.STATUS


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["buffer", "array"])
@kernel_test()
async def test_no_plain_access_where_only_python_resolves_faults(what: str) -> None:
    data = content(2)
    async with open_daemon() as daemon:
        python, partly = InPython(data), FirstOf(InPython(data), CopyFrom(BytesSource(data)))
        refused: list[tuple[Policy, PlacementName, str]] = [
            (CopyFrom(BytesSource(data)), "in_process", "in_process"),
            (python, "in_process", "in_process"),
            (python, "native", "cannot be lowered to a rule"),
            (partly, "native", "cannot be lowered to a rule"),
        ]
        for policy, placement, reason in refused:
            region = daemon.guard(Memory.map(len(data)), policy, placement=placement)
            with pytest.raises(errors.PlacementRefused, match=reason):
                getattr(region, what)()
            # What needs no GIL is there all the same.
            found = bytearray(10)
            await trio.to_thread.run_sync(region.read_into, PAGE, found)
            assert found == data[PAGE : PAGE + 10]


@pytest.mark.parametrize("resolver", ["thread", "in-thread"])
@kernel_test(features=Features.SIGBUS)
async def test_buffers_and_arrays_show_the_memory(resolver: ResolverName) -> None:
    data = content(4)
    async with open_daemon() as daemon:
        region = daemon.guard(Memory.map(len(data)), CopyFrom(BytesSource(data)), resolver=resolver)
        plain = region.array()
        shaped = region.array("<u4", (4, PAGE // 4), readonly=True)
        assert shaped[3].tobytes() == data[3 * PAGE :]
        assert np.array_equal(plain, np.frombuffer(data, "u1"))
        plain[PAGE] ^= 0xFF
        assert region.buffer(readonly=True)[PAGE] == data[PAGE] ^ 0xFF
        with pytest.raises(ValueError, match="read-only"):
            shaped[0, 0] = 1
        with pytest.raises(TypeError, match="read-only"):
            region.buffer(readonly=True)[0] = 1
