"""Every code block of the README and the docs runs as it stands.

A Python block whose first line is a comment with a file name, such as ``# store.py``, is that file:
it is not run by itself, but lies in the folder in which all later blocks of the page run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"", "console", "json"}  # pictures; commands that change the system; what is printed
RUN = {"python", "sh"}
FILE = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block, and the files of its page that it may use."""

    name: str
    kind: str
    """What its fence says, or "file"."""
    code: str
    files: dict[str, str]

    @property
    def language(self) -> str:
        return "python" if self.kind == "file" else self.kind


def blocks() -> list[Block]:
    found: list[Block] = []
    for page in PAGES:
        text = page.read_text()
        files: dict[str, str] = {}
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            kind, code = match[1], match[2]
            file = FILE.match(code) if kind == "python" else None
            if file:
                files = {**files, file[1]: code}
                kind = "file"
            found.append(Block(f"{page.name}:{line}", kind, code, files))
    return found


BLOCKS = blocks()


def test_every_block_says_what_it_is() -> None:
    assert {block.kind for block in BLOCKS} <= RUN | NOT_RUN | {"file"}
    assert sum(block.kind == "python" for block in BLOCKS) >= 5


def test_a_file_is_run_by_what_follows_it() -> None:
    used = "\n".join(block.code for block in BLOCKS if block.kind in RUN)
    for block in BLOCKS:
        if block.kind == "file":
            *_, name = block.files
            assert name in used or re.search(rf"\b{name.removesuffix('.py')}\b", used), block.name


def test_the_readme_begins_with_lines_that_run() -> None:
    first = BLOCKS[0]
    assert first.name.startswith("README.md:")
    assert first.kind == "python"
    assert len(first.code.splitlines()) <= 15


@pytest.mark.kernel
@pytest.mark.parametrize(
    "block", [pytest.param(block, id=block.name) for block in BLOCKS if block.kind in RUN]
)
def test_block(block: Block, tmp_path: Path) -> None:
    for file, code in block.files.items():
        (tmp_path / file).write_text(code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = (
        [sys.executable, "-X", "faulthandler", "-c", block.code]
        if block.kind == "python"
        else ["sh", "-ec", block.code]
    )
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, f"{block.name}\n{ended.stdout}\n{ended.stderr}"
