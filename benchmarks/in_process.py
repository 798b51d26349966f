"""Our side where one process both faults and answers: the toucher's loop is a library in C.

Takes the toucher's options, maps and guards memory whose pages are copied from a mapped image,
touches the same pages in the same order, and writes the same JSON.  ``--resolver`` chooses who
answers: "in-thread" the thread that faults, "thread" one beside it, started on ``--handler-cpu``.
``--rules`` divides the memory into so many ranges.

With ``--numpy`` the loop is Python's, under the GIL: ``array[index]`` for each page, with a clock
round each.  What the same takes where the page is there already is subtracted, and told.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import time
from array import array
from functools import cache
from typing import Any, Literal

import trio

from benchmarks.build import program
from benchmarks.handler import POPULATE_READ, divided
from benchmarks.turns import PAGE, Seen, parse_seen
from uffdaemon import Advice, BytesSource, GuardedRegion, Memory, open_daemon

CAPACITY = 4096
"""Bytes, more than what a toucher writes."""
WORD = 8


@cache
def library() -> Any:  # noqa: ANN401  # ctypes has no other name for it
    """The toucher, which is called without the GIL."""
    loaded = ctypes.CDLL(str(program("in_process.so")))
    loaded.in_process_touch.restype = ctypes.c_size_t
    loaded.in_process_order.restype = ctypes.c_size_t
    return loaded


class Words:
    """A command line as C gets it."""

    def __init__(self, words: list[str]) -> None:
        self.count = len(words) + 1
        encoded = [b"in_process", *(word.encode() for word in words)]
        self.values = (ctypes.c_char_p * (self.count + 1))(*encoded, None)


def touch(memory: Memory, words: list[str]) -> Seen:
    """Touch in C."""
    command = Words(words)
    text = ctypes.create_string_buffer(CAPACITY)
    start = ctypes.c_uint64(memory.start)
    library().in_process_touch(
        start, command.count, command.values, text, ctypes.c_size_t(CAPACITY)
    )
    return parse_seen(text.value)


def order(words: list[str], pages: int) -> list[int]:
    """The numbers of the pages in the toucher's order."""
    command = Words(words)
    numbers = array("Q", bytes(WORD * pages))
    address = ctypes.c_void_p(numbers.buffer_info()[0])
    count = library().in_process_order(command.count, command.values, address)
    return numbers.tolist()[:count]


def _timed(words: Any, indices: list[int]) -> list[int]:  # noqa: ANN401  # of a numpy array
    clock = time.perf_counter_ns
    taken: list[int] = []
    for index in indices:
        before = clock()
        words[index]
        taken.append(clock() - before)
    return taken


def _percentile(values: list[int], percent: int) -> float:
    """In µs, for nanoseconds."""
    return sorted(values)[round((len(values) - 1) * percent / 100)] / 1000


def touch_from_numpy(region: GuardedRegion, options: Options, words: list[str]) -> Seen:
    """Touch in Python, one element of an array after the other."""
    os.sched_setaffinity(0, {options.core})
    pages = order(words, options.pages)
    elements = region.array("u8", readonly=True)
    indices = [page * (PAGE // WORD) for page in pages]
    _timed(elements, indices[: options.warm])
    timed = indices[options.warm :]
    begun = time.perf_counter_ns()
    missing = _timed(elements, timed)
    wall = time.perf_counter_ns() - begun
    present = _timed(elements, timed)
    wrong = sum(int(elements[page * (PAGE // WORD)]) != page + 1 for page in pages)
    own = _percentile(present, 50)
    return {
        "pages": len(timed),
        "wrong": wrong,
        "mean_us": sum(missing) / len(timed) / 1000 - own,
        "p50_us": _percentile(missing, 50) - own,
        "p90_us": _percentile(missing, 90) - own,
        "p99_us": _percentile(missing, 99) - own,
        "wall_us_per_page": wall / len(timed) / 1000,
        "handler_cpu_us_per_page": 0.0,
        "present_us": own,
    }


class Options(argparse.Namespace):
    """What of the command line is ours; the rest is the toucher's."""

    resolver: Literal["thread", "in-thread"]
    numpy: bool
    image: str
    handler_cpu: int | None
    cpu: str
    pages: int
    warm: int
    rules: int

    @property
    def core(self) -> int:
        """The toucher's first core."""
        return int(self.cpu.split(",")[0])


def map_image(path: str, length: int) -> mmap.mmap:
    """The image, mapped and brought in."""
    with open(path, "rb") as file:
        image = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ)
    image.madvise(POPULATE_READ)
    return image


async def run(options: Options, words: list[str]) -> Seen:
    """Guard memory and touch it."""
    length = options.pages * PAGE
    with Memory.map(length) as memory:
        # The host finds its memory.
        memory.advise(Advice.POPULATE_WRITE)
        memory.advise(Advice.DONTNEED)
        sources = [BytesSource(map_image(options.image, length)) for _ in range(2)]
        policy = divided(sources, length, options.rules)
        if options.handler_cpu is not None:
            os.sched_setaffinity(0, {options.handler_cpu})
        async with open_daemon() as daemon:
            region = daemon.guard(memory, policy, placement="native", resolver=options.resolver)
            if options.numpy:
                return await trio.to_thread.run_sync(touch_from_numpy, region, options, words)
            return await trio.to_thread.run_sync(touch, memory, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolver", choices=("thread", "in-thread"), required=True)
    parser.add_argument("--numpy", action="store_true")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--handler-cpu", type=int, metavar="CORE")
    parser.add_argument("--cpu", required=True, metavar="CORE[,CORE]")
    parser.add_argument("--pages", type=int, required=True, metavar="PAGES")
    parser.add_argument("--warm", type=int, required=True, metavar="PAGES")
    parser.add_argument("--rules", type=int, default=1)
    options, rest = parser.parse_known_args(namespace=Options())
    words = ["--cpu", options.cpu, "--pages", str(options.pages), "--warm", str(options.warm)]
    json.dump(trio.run(run, options, [*words, *rest]), sys.stdout)


if __name__ == "__main__":
    main()
