"""Every code block of the README and the docs runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"", "console", "json"}  # pictures; commands that change the system; what is printed
RUN = {"python", "sh"}


def blocks() -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{page.name}:{line}", match[1], match[2]))
    return found


BLOCKS = blocks()


def test_every_block_says_what_it_is() -> None:
    assert {kind for _, kind, _ in BLOCKS} <= RUN | NOT_RUN
    assert sum(kind == "python" for _, kind, _ in BLOCKS) >= 5


def test_the_readme_begins_with_lines_that_run() -> None:
    name, kind, code = BLOCKS[0]
    assert name.startswith("README.md:")
    assert kind == "python"
    assert len(code.splitlines()) <= 15


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [pytest.param(*block, id=block[0]) for block in BLOCKS if block[1] in RUN],
)
def test_block(name: str, kind: str, code: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = (
        [sys.executable, "-X", "faulthandler", "-c", code]
        if kind == "python"
        else ["sh", "-ec", code]
    )
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, f"{name}\n{ended.stdout}\n{ended.stderr}"
