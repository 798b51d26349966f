"""The page size is asked for, and no 4096 stands for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import uffdaemon
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE

PACKAGE = Path(uffdaemon.__file__).parent

LITERAL = re.compile(
    r"\b(?:4096|4095|0x1000|0xfff|4 << 10|4 \* 1024)u?\b|(?:<<|>>) ?12\b", re.IGNORECASE
)
NOT_A_PAGE = {
    "demo/command.py": "an example of a size",
    "demo/process.py": "bytes of standard error that are shown",
    "model/refaults.py": "faults that are remembered",
    "native/port.h": "bytes of the smallest pages, on one of which the hot fields lie",
    "native/stall.c": "bytes of a file in /proc",
    "native/uapi.h": "a flag",
    "uapi/features.py": "a flag",
}
"""By file: what one line of it has such a number for."""


def test_no_number_stands_for_the_page_size() -> None:
    found: dict[str, list[str]] = {}
    for path in (path for kind in ("py", "c", "h") for path in PACKAGE.rglob(f"*.{kind}")):
        if path.name != "_native.c":  # written by cffi
            lines = [line.strip() for line in path.read_text().splitlines() if LITERAL.search(line)]
            if lines:
                found[str(path.relative_to(PACKAGE))] = lines
    there = {name for name in NOT_A_PAGE if Path(PACKAGE, name).exists()}  # a wheel has no C
    assert {name: lines for name, lines in found.items() if name not in NOT_A_PAGE} == {}
    assert {name: len(found.get(name, ())) for name in there} == dict.fromkeys(there, 1)


def test_it_is_what_the_kernel_says() -> None:
    assert os.sysconf("SC_PAGESIZE") == PAGE_SIZE


def test_a_huge_page_is_as_large_as_the_kernel_says() -> None:
    path = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if not path.exists():
        pytest.skip("this kernel has no transparent huge pages")
    assert int(path.read_text()) == HUGE_PAGE_SIZE
