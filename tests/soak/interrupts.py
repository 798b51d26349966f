"""Programs that get Ctrl-C, once or several times within milliseconds, at moments out of a seed.

Each has to end with KeyboardInterrupt and nothing else: ``python -m tests.soak.interrupts 1000 7``
runs a thousand with seed 7.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Final

PROGRAM: Final = """
import os, signal, sys, threading
import structlog, trio
from uffdaemon import *
from uffdaemon import actions
from uffdaemon.lowlevel import Features

signal.signal(signal.SIGINT, signal.default_int_handler)
structlog.configure(processors=[lambda *_: (_ for _ in ()).throw(structlog.DropEvent)])
PAGE, PAGES = os.sysconf("SC_PAGESIZE"), 2000
DATA = b"x" * PAGES * PAGE
IMAGE = BytesSource(DATA)

async def fetch(offset, length):
    await trio.sleep(0.0005)
    return DATA[offset : offset + length]

def work(memory):
    for number in range(1 << 40):
        assert memory.read(number % PAGES * PAGE, 1) in (b"x", bytes(1))
        if number % 50 == 0:
            memory.advise(Advice.DONTNEED, number % PAGES * PAGE, PAGE)

POLICIES = {
    "rules": CopyFrom(IMAGE),
    "python": lambda fault: actions.Copy(IMAGE),
    "async": CopyFrom(AsyncSource(fetch, PAGES * PAGE)),
}

async def main(how):
    memory = Memory.map(PAGES * PAGE)
    async with open_daemon(hooks=[Hooks(after=lambda resolved: None)]) as daemon:
        features = Features.THREAD_ID | Features.EVENT_REMOVE
        placement = "in_process" if how == "in_process" else "native"
        policy = POLICIES.get(how, POLICIES["python"])
        daemon.guard(memory, policy, features=features, placement=placement)
        for _ in range(2):
            threading.Thread(target=work, args=(memory,), daemon=True).start()
        print("go", flush=True)
        while True:
            await trio.sleep(0.0003)
            daemon.open_faults()
            daemon.statistics()

try:
    trio.run(main, sys.argv[1])
except KeyboardInterrupt:
    os.write(1, b"interrupted")
    os._exit(0)
"""

HOW: Final = ("rules", "python", "async", "in_process")
_DEADLINE: Final = 60.0
"""Seconds after which a program hangs."""


def interrupted(how: str, delays: list[float]) -> str:
    """How a program ended that was sent SIGINT after each of the delays, in seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        for delay in delays:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
        try:
            out, errors = process.communicate(timeout=_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            return "hung"
    return out if process.returncode == 0 else f"{process.returncode}: {errors[-2000:]}"


def run(count: int, seed: int) -> Counter[str]:
    """How so many programs ended, and how often each."""
    moments = random.Random(seed)  # no secret
    ends: Counter[str] = Counter()
    for number in range(count):
        first, more = moments.random() * 0.03, moments.choice([1, 1, 2])
        delays = [first, *(moments.random() * 0.001 for _ in range(more))]
        ends[interrupted(HOW[number % len(HOW)], delays)] += 1
    return ends


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2])))  # the result
