"""The numbers of pages in the page cache and in memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from uffdaemon.demo import residency
from uffdaemon.demo.residency import cached_pages, drop_from_cache, present_pages
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PAGE = PAGE_SIZE


def test_a_file_that_was_just_written_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * PAGE + 1))
    assert cached_pages(path) == 11
    monkeypatch.setattr(residency, "_WINDOW", 4 * PAGE)
    assert cached_pages(path) == 11


def test_what_dropping_has_done_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE))
    drop_from_cache(path)
    assert cached_pages(path) in {0, 64}, "a disk forgets all of it, a tmpfs nothing"
    assert path.read_bytes() == bytes(64 * PAGE)
    assert cached_pages(path) == 64


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_pages(tmp_path / "empty") == 0


def test_pages_of_this_process_are_counted() -> None:
    memory = mmap.mmap(-1, 64 * PAGE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    first = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(first)
    del first
    assert present_pages(start, 64 * PAGE) == 0
    for page in (0, 5, 63):
        memory[page * PAGE] = 1
    assert present_pages(start, 64 * PAGE) == 3
    assert present_pages(start + PAGE, 62 * PAGE) == 1
    memory.close()
