"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from tests.support import clib
from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT
from tests.support.requirements import require
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.kernel


def run(name: str, *arguments: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout.splitlines()


def test_custom_policy() -> None:
    assert run("custom_policy.py") == ["page   42"]


def test_the_custom_policy_is_no_longer_than_promised() -> None:
    source = (EXAMPLES / "custom_policy.py").read_text()
    start = source.index("def page_numbers")
    policy = source[start : source.index("async def main")]
    assert len(policy.strip().splitlines()) <= 15


def test_access_trace_is_recorded_and_replayed_without_a_fault() -> None:
    recorded, replayed = run("access_trace.py")
    assert recorded == "recorded: 13 faults, pages 3 5 8 13 21 34 55 89 144 233 377 610 987"
    assert replayed == "replayed: 0 faults"


def test_service_answers_from_pages_that_it_fetched() -> None:
    *answers, statistics = run("service.py")
    assert answers == [
        "7 -> 7: record 7",
        "8 -> 8: record 8",
        "4095 -> 4095: record 4095",
        "oops -> error: no record 'oops'",
    ]
    figures = json.loads(statistics.removeprefix("statistics -> "))
    assert figures == {"faults": {"missing": {"copied": 2}}, "bytes": {"copied": 2 * 16384}}


def test_compaction_loses_nothing_and_gives_memory_back(tmp_path: Path) -> None:
    require(Features.MOVE | Features.PAGEFAULT_FLAG_WP)
    if clib.compiler() is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    report = tmp_path / "figures.json"
    *table, last = run("compaction.py", "--pages", "2048", "--window", "0.2", "--json", str(report))
    assert last == "nothing was lost"
    figures = {one["way"]: one for one in json.loads(report.read_text())}
    assert list(figures) == ["move", "copy", "exact copy", "stop the world"]
    for way, one in figures.items():
        assert one["wrong"] == 0
        assert one["operations"] > 1000
        assert sum(one["histogram"]) > 1000
        # As much garbage as there was of live pages is gone; nothing else grows by so much.
        assert one["resident_before"] - one["resident_after"] > 1024 * 4096, way
        assert any(line.startswith(way) for line in table)


def test_a_damaged_object_of_the_heap_is_noticed(tmp_path: Path) -> None:
    """Or else the test above could not fail."""
    found = clib.compiler()
    if found is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    library = tmp_path / "heap.so"
    source = EXAMPLES / "moving_heap" / "heap.c"
    subprocess.run([found, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    heap_c = ctypes.CDLL(str(library))
    heap_c.heap_new.restype = ctypes.c_void_p
    page = ctypes.create_string_buffer(4096)
    addresses = (ctypes.c_uint64 * 1)(ctypes.addressof(page))
    heap = ctypes.c_void_p(heap_c.heap_new(addresses, ctypes.c_uint64(1), 1, ctypes.c_uint64(1000)))
    assert heap_c.heap_wrong(heap) == 0
    for damaged in (0, 129):  # an object's number, and the second one's total
        page[damaged + 8] = bytes([page[damaged + 8][0] ^ 1])
    assert heap_c.heap_wrong(heap) == 2
    heap_c.heap_free(heap)


@pytest.mark.skipif(find_spec("numpy") is None, reason="no numpy; pip install numpy")
def test_of_an_array_only_what_is_looked_at_is_decoded() -> None:
    first, *found, last = run("numpy_lazy.py")
    assert first.startswith("4096 MiB, compressed to ")
    assert found == [
        "the sum of 16 rows is 8587837440",
        "32 elements from all over the array are right",
        "the largest element of 16 more rows is 4095",
    ]
    assert last == "64 of 4096 MiB were decoded"


def test_without_numpy_the_array_says_what_is_missing() -> None:
    path = str(EXAMPLES / "numpy_lazy.py")
    hidden = (
        "import runpy, sys; sys.modules['numpy'] = None; "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", hidden, path],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "this example computes with numpy, which is not installed: pip install numpy\n"
    )


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {
        "access_trace.py",
        "compaction.py",
        "custom_policy.py",
        "lazy_restore.py",
        "numpy_lazy.py",
        "service.py",
    }
