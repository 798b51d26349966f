"""The example runs, and restores what it is given."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT
from tests.support.requirements import require
from uffdaemon.uapi.features import Features

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kernel
EXAMPLE = ROOT / "examples" / "lazy_restore.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    require(Features(0), user_mode_only=True)
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.mark.smoke
def test_it_restores_a_database_that_sqlite_queries() -> None:
    ended = run()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "client: SQLite finds ['weakref.py']" in ended.stdout
    assert "the restored memory equals" in ended.stdout
    [touched] = [line for line in ended.stdout.splitlines() if line.startswith("daemon: ")]
    copied, _, total = touched.split()[1:4]
    assert 0 < int(copied) < int(total) / 2


@pytest.mark.parametrize("size", [1, 4096, 1_000_001])
def test_it_restores_any_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(number * number % 251 for number in range(size)))
    ended = run(str(path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"the restored memory equals {path}" in ended.stdout
