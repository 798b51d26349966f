"""The yardsticks of native/moves.c, called from the process that they are compared with."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from benchmarks.build import program

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator


@cache
def library() -> Any:  # noqa: ANN401  # ctypes has no other name for it
    """The compiled library; ctypes lets go of the GIL around its calls."""
    loaded = ctypes.CDLL(str(program("moves.so")))
    for name in ("each", "fill_by_copy", "fill_by_read", "touch"):
        getattr(loaded, f"moves_{name}").restype = ctypes.c_int64
    return loaded


def call(name: str, *arguments: object) -> int:
    """Nanoseconds that ``moves_NAME`` took.  Integers are passed as 64 bits.  Raises OSError."""
    # A small int in the place of a 64-bit argument would leave its upper half to chance.
    wide = [ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments]
    taken = int(getattr(library(), f"moves_{name}")(*wide))
    if taken < 0:
        raise OSError(-taken, f"moves_{name}: {os.strerror(-taken)}")
    return taken


def move_each(uffd: int, moves: array[int]) -> int:
    """Nanoseconds for one ioctl after the other; `moves` are flat (dst, src, length) triples."""
    return call("each", uffd, ctypes.c_void_p(moves.buffer_info()[0]), len(moves) // 3)


@contextmanager
def another_thread_running(core: int) -> Iterator[None]:
    """A thread of this process that runs on `core` without a pause."""
    stop = ctypes.c_int(0)
    run = library().moves_run
    thread = threading.Thread(target=run, args=(ctypes.byref(stop), core))
    thread.start()
    try:
        yield
    finally:
        stop.value = 1
        thread.join()


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
