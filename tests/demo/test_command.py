"""The whole command: its report is true, and it exits cleanly."""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.demo.harness import WORKER, demo
from tests.support.paths import ROOT
from tests.support.requirements import require
from uffdaemon.demo.command import QUERIES
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.features import Features

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _userfaultfd() -> None:
    require(Features(0), user_mode_only=True)


@pytest.mark.smoke
def test_json(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    arguments = ("--json", "--size", "8M", "--rounds", "2", "--keep", "--directory", str(kept))
    with demo(tmp_path, *arguments) as running:
        assert running.end() == 0
        assert running.errors == []
        assert running.leavings() == []
        report: dict[str, Any] = json.loads(running.report())
    assert report["ok"] is True
    pages = report["image_pages"]
    assert report["image_bytes"] == pages * PAGE_SIZE >= 8 << 20

    rows = {(row["mode"], row["temperature"]): row for row in report["rows"]}
    temperatures = {"cold", "warm"} if report["cache"]["cold"] else {"warm"}
    assert set(rows) == {(mode, t) for mode in ("eager", "lazy") for t in temperatures}
    for (mode, temperature), row in rows.items():
        assert row["rounds"] == 2
        assert 0 < row["open_seconds"] < row["first_answer_seconds"] < row["all_answers_seconds"]
        if temperature == "cold":
            assert row["cached_fraction"] <= 0.01
        else:
            assert row["cached_fraction"] == 1.0
        if mode == "eager":
            assert row["faults"] == {}
            assert row["first_answer_pages"] == row["all_answers_pages"] == pages
        else:
            assert set(row["faults"]) <= {"copied", "already_present"}
            # Each fault copies one window, and each window is in memory.
            assert 1 <= row["faults"]["copied"] <= row["all_answers_pages"]
            assert row["all_answers_pages"] <= 16 * sum(row["faults"].values())
            assert row["first_answer_pages"] <= row["all_answers_pages"] < pages / 2
            assert row["first_answer_bytes"] == row["first_answer_pages"] * PAGE_SIZE

    fill, proof = report["fill"], report["proof"]
    assert fill["bytes"] == report["image_bytes"]
    assert fill["reads"] >= 1
    assert proof["file_sha256"] == proof["memory_sha256"]
    assert proof["differing_pages"] == proof["faults"] == 0

    path = Path(report["image_path"])
    assert path.parent.parent == kept
    with closing(sqlite3.connect(path)) as database:
        for answer, query in zip(report["answers"], QUERIES, strict=True):
            [count] = database.execute(
                "SELECT count(*) FROM search WHERE search MATCH ?", (query,)
            ).fetchone()
            assert (answer["query"], answer["matches"]) == (query, count)
        assert report["answers"][0]["matches"] > 0
        assert re.search(r"\[\w+\]", report["answers"][0]["snippet"])


def test_text(tmp_path: Path) -> None:
    with demo(tmp_path, "--size", "2M", "--rounds", "1", "--query", "abstract") as running:
        assert running.end() == 0
        assert running.leavings() == []
        text = running.report()
    assert "query    abstract: " in text
    assert "the restored memory equals the file" in text
    assert "0 of 5" in text
    assert "warm  lazy" in text
    text = "\n".join(running.errors)
    assert "building the image: 2.0 MiB of 2.0 MiB" in text
    assert len([line for line in running.errors if line.startswith("filling: ")]) == 5
    assert WORKER.search(text)


def test_a_kept_image_is_restored_again(tmp_path: Path) -> None:
    with demo(tmp_path, "--size", "1M", "--rounds", "1", "--keep") as running:
        kept = Path(running.wait_for("keeping the image in (.*)")[1])
        assert running.end() == 0
        assert f"kept: {kept}" in running.report()
        assert [path.name for path in running.folder.iterdir()] == [kept.parent.name]
    (tmp_path / "again").mkdir()
    arguments = ("--image", str(kept), "--rounds", "1", "--json", "--fault-around", "1")
    with demo(tmp_path / "again", *arguments) as running:
        assert running.end() == 0
        report = json.loads(running.report())
    assert report["ok"] is True
    assert report["build_seconds"] is None
    assert kept.is_file()
    for row in report["rows"]:
        if row["mode"] == "lazy":
            assert row["all_answers_pages"] == row["faults"]["copied"]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with (
        subprocess.Popen(
            [sys.executable, "-m", "uffdaemon", "demo", "--size", "1M", "--rounds", "1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        ) as process,
        os.fdopen(ours, "rb", buffering=0) as terminal,
    ):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while data := terminal.read(4096):
                shown += data
        assert process.wait() == 0
    text = shown.decode()
    assert f"filling [{'█' * 30}] 100 %" in text
    assert text.endswith("\r\x1b[K")
