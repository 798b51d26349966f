"""The page that holds the table of conformance.

``python -m tests.kernel.table`` runs the conformance suite and writes docs/conformance.md.
"""

from __future__ import annotations

import platform
import re
import sys
import textwrap

import pytest

from tests.support.conformance_table import Table
from tests.support.paths import ROOT
from uffdaemon.lowlevel import supported_features

DOCUMENT = ROOT / "docs" / "conformance.md"

_INTRODUCTION = """\
# Conformance

You want to know whether the library passes the kernel's own tests of userfaultfd. Linux has a
suite, `tools/testing/selftests/mm/uffd-unit-tests.c` and `uffd-stress.c`. The tests in
`tests/kernel/test_conformance_*.py` check the same through the public API of uffdaemon: each named
test, on each type of memory that the kernel's test covers (`-` marks the others), and
`mmap-changing` on all types. `UFFDIO_API` needs no memory and is tested for both ways of opening.

Left out: `rwp-*`, which comes with Linux 7.3, and `wp-fork-pin*`, which needs a kernel built with
`CONFIG_GUP_TEST`.
"""


def document(table: Table) -> str:
    """All of docs/conformance.md."""
    release = re.match(r"[\d.]+", platform.release())
    assert release is not None
    features = ", ".join(supported_features().names)
    machine = f"Run on Linux {release.group()} ({platform.machine()}), which has {features}."
    return (
        f"{_INTRODUCTION}\n{table.text()}\n\n{textwrap.fill(machine, 100)}\n\n"
        "The suite writes this page: `.venv/bin/python -m tests.kernel.table`.\n"
    )


def main() -> int:
    table = Table()
    status = pytest.main([str(ROOT / "tests/kernel"), "-q", "-m", "conformance"], plugins=[table])
    if table.results:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(table))
    return status


if __name__ == "__main__":
    sys.exit(main())
