"""What the kernel's uffd-stress does: counters that survive racing copies, bounce after bounce."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from typing import TYPE_CHECKING

from tests.kernel.conformance import WP, Handler, conformance, map_area, page_offsets
from tests.support.calls import in_thread
from tests.support.clib import Helpers
from uffdaemon import FaultKind, Memory, MemoryType
from uffdaemon.lowlevel import RegisterMode, Result, Userfaultfd

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.uapi.events import PageFault

_BOUNCES = 4
_THREADS = 2
_ROUNDS = 20_000


def _counters(memory: Memory) -> list[int]:
    return [int.from_bytes(memory.read(at, 8), "little") for at in page_offsets(memory)]


def _bounce(source: Memory, memory: Memory, helpers: Helpers, *, write_protect: bool) -> None:
    """Copy `source` to `memory` while threads count in `memory`."""
    page = memory.page_size
    before = _counters(source)
    copied: Counter[int] = Counter()
    counting_copies = threading.Lock()
    with Userfaultfd.open(WP) as uffd:
        mode = RegisterMode.WP if write_protect else RegisterMode(0)
        uffd.register(memory.start, memory.length, RegisterMode.MISSING | mode)

        def copy(offset: int) -> None:
            result: Result = uffd.copy(
                memory.start + offset,
                source.start + offset,
                page,
                write_protect=write_protect,
                page_size=page,
            )
            assert result.complete
            assert result.progress == page
            with counting_copies:
                copied[offset] += result.done

        def answer(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            if fault.kind is FaultKind.WP:
                uffd.write_protect(memory.start + offset, page, protect=False)
            else:
                copy(offset)

        def copy_in_order() -> None:
            for offset in page_offsets(memory):
                copy(offset)

        handler = Handler(memory.start, page, answer)
        running = in_thread(handler.run, uffd)
        background = in_thread(copy_in_order)
        added = (ctypes.c_uint64 * len(before))()
        counting = [
            in_thread(helpers.increment, memory.start, page, _ROUNDS, seed, added)
            for seed in range(_THREADS)
        ]
        for call in (background, *counting):
            call.result()
        handler.stop.cross()
        running.result()
        assert sum(added) == _THREADS * _ROUNDS
        assert _counters(memory) == [old + new for old, new in zip(before, added, strict=True)]
        # Every page was copied by exactly one of those who tried.
        assert copied == dict.fromkeys(page_offsets(memory), page)


@conformance("uffd-stress", WP)
def test_stress(kind: MemoryType, helpers: Path) -> None:
    library = Helpers(helpers)
    source = map_area(kind)
    source.touch(write=True)
    for bounce in range(_BOUNCES):
        memory = map_area(kind)
        _bounce(source, memory, library, write_protect=bool(bounce % 2))
        source.close()
        source = memory
