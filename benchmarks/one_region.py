"""What one region costs where nothing faults: memory, and processor time while idle.

Runs as a process of its own and writes a line of JSON, for benchmarks/resting.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from pathlib import Path

import trio

from uffdaemon import Advice, FaultAround, Memory, ZeroPage, open_daemon
from uffdaemon.lowlevel import Features

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory, without page tables: proc_pid_statm(5)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def weigh(length: int) -> dict[str, float]:
    """Touch all of a region of `length` bytes, of zeros that take no memory, and discard it again:
    then the daemon knows two things of every page."""
    policy = FaultAround(ZeroPage(), pages=512)
    features = Features.EVENT_REMOVE
    with Memory.map(MIB) as first, Memory.map(length) as memory:
        async with open_daemon() as daemon:
            # Everything that is allocated once is allocated by a first region.
            before = 0
            for part in (first, memory):
                gc.collect()
                before = resident()
                daemon.guard(part, policy, features=features)
                await trio.to_thread.run_sync(part.touch)
                await trio.to_thread.run_sync(part.advise, Advice.DONTNEED)
            gc.collect()
            grown = resident() - before
            served = sum(daemon.statistics().bytes_done.values())
    if served != MIB + length:
        raise RuntimeError(f"{served} bytes were served, not {MIB + length}")
    return {"resident": grown}


async def idle(seconds: float) -> dict[str, float]:
    """Processor seconds that a daemon with a guarded region uses in `seconds` without a fault."""
    with Memory.map(MIB) as memory:
        async with open_daemon() as daemon:
            daemon.guard(memory, ZeroPage())
            # Faults just before, so that whatever re-reading is going on has to end by itself.
            await trio.to_thread.run_sync(memory.touch)
            before = time.process_time()
            await trio.sleep(seconds)
            return {"cpu_s": time.process_time() - before}


async def asleep(seconds: float) -> dict[str, float]:
    """What trio alone is charged, in a process that has imported and touched the same."""
    with Memory.map(MIB) as memory:
        await trio.to_thread.run_sync(memory.touch)
        before = time.process_time()
        await trio.sleep(seconds)
        return {"cpu_s": time.process_time() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weigh", type=int, metavar="BYTES")
    parser.add_argument("--idle", type=float, metavar="SECONDS")
    parser.add_argument("--sleep", type=float, metavar="SECONDS")
    options = parser.parse_args()
    if options.weigh is not None:
        print(json.dumps(trio.run(weigh, options.weigh)))
    if options.idle is not None:
        print(json.dumps(trio.run(idle, options.idle)))
    if options.sleep is not None:
        print(json.dumps(trio.run(asleep, options.sleep)))


if __name__ == "__main__":
    main()
