"""What the tests of moves share: pages, what stands in their way, and a look between two steps."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import pytest

from tests.daemon.support import content
from tests.kernel.support import PAGE
from uffdaemon import Cause, Features, Memory, Moved, Operation, Outcome, Result, Userfaultfd
from uffdaemon.looking import look


class Watched(Userfaultfd):
    """Tells of the results of its operations: so that a test can act between two steps."""

    def __init__(self, fd: int, features: Features, *, same_process: bool) -> None:
        super().__init__(fd, features, same_process=same_process)
        self.tell: Callable[[Result], None] = lambda result: None

    def execute(self, operations: Sequence[Operation]) -> list[Result]:
        results = super().execute(operations)
        for result in results:
            self.tell(result)
        return results


@contextmanager
def two_sides(
    count: int, features: Features = Features.MOVE, *, dont_fork: bool = True
) -> Iterator[tuple[Watched, Memory, Memory]]:
    """A source full of pages that tell themselves apart, and an empty, guarded destination."""
    with (
        Watched.open(features) as uffd,
        Memory.map(count * PAGE, dont_fork=dont_fork) as source,
        Memory.map(count * PAGE) as target,
    ):
        uffd.register(target.start, target.length)
        source.write(0, content(count))
        yield uffd, source, target


def there(memory: Memory) -> list[int]:
    """The pages that are there, by number."""
    return [n for n, page in enumerate(look(memory.start, memory.length)) if page.there]


def fates(moved: Moved) -> list[tuple[int, Outcome, Cause | None]]:
    """Pages, outcome and cause of each run."""
    return [(run.length // PAGE, run.outcome, run.cause) for run in moved.runs]


_PAGEOUT = 21
_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)


def page_out(start: int, length: int) -> None:
    """Have pages of our own swapped out, all of them."""
    while any(page.present for page in look(start, length)):
        # The kernel passes over what it is busy with; the deadline is the limit.
        number = _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)
        assert number == 0, os.strerror(ctypes.get_errno())
    assert all(page.there for page in look(start, length))


class Pins:
    """Pages that are pinned for I/O, as registered buffers of an io_uring."""

    def __init__(self, addresses: list[int]) -> None:
        self._ring = -1
        if not addresses:
            return
        self._ring = int(_libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(120)))
        if self._ring < 0:
            pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
        buffers = b"".join(struct.pack("=QQ", start, PAGE) for start in addresses)
        self._register(_REGISTER_BUFFERS, buffers, len(addresses))

    def _register(self, what: int, buffers: bytes | None, count: int) -> None:
        number = _libc.syscall(_IO_URING_REGISTER, self._ring, what, buffers, count)
        assert number == 0, os.strerror(ctypes.get_errno())

    def release(self) -> None:
        """Let go of the pages; again is nothing."""
        if self._ring >= 0:
            # Closing alone would let go of them some time later.
            self._register(_UNREGISTER_BUFFERS, None, 0)
            os.close(self._ring)
            self._ring = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
