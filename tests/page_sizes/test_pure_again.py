"""The pure tests hold with pages of 16 and 64 KiB, as kernels for arm64 can have them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from uffdaemon.ranges import PAGE_SIZE

# mmap has the size that Python was told by the kernel; uffdaemon takes it from there.
OTHER_SIZE = """
import mmap, sys

mmap.PAGESIZE = int(sys.argv[1])

import pytest

class FewExamples:
    @pytest.hookimpl(trylast=True)
    def pytest_configure(self):
        from hypothesis import settings
        settings.register_profile("few", settings.default, max_examples=10)
        settings.load_profile("few")

    def pytest_report_header(self):
        from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
        return f"pages: {PAGE_SIZE} {HUGE_PAGE_SIZE} bytes"

sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]], plugins=[FewExamples()]))
"""


NO_SIZES = ("ledger_model", "pages_model", "regions_model", "page_size")
"""What counts pages, and would take its time over it; and what compares with the kernel."""


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [size for size in (4096, 16384, 65536) if size != PAGE_SIZE])
def test_with_pages_of(page_size: int) -> None:
    ignored = [f"--ignore=tests/pure/test_{name}.py" for name in NO_SIZES]
    ended = subprocess.run(
        [sys.executable, "-c", OTHER_SIZE, str(page_size), "tests/pure", *ignored],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert f"pages: {page_size} {page_size * page_size // 8} bytes" in ended.stdout
