"""The image: a valid database, large enough, and never left unfinished."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from uffdaemon.demo import image as module
from uffdaemon.demo.errors import DemoError, FullDisk
from uffdaemon.demo.image import build_image, find_sources, open_image
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library: two modules, of 100 lines and of one, and tests, which are left out."""
    root = tmp_path_factory.mktemp("library")
    (root / "tests").mkdir()
    (root / "tests" / "left_out.py").write_text("assert walrus\n")
    (root / "long.py").write_text("".join(f"line {number} heron\n" for number in range(1, 101)))
    (root / "package").mkdir()
    (root / "package" / "short.py").write_text("egret = 'ébène'\n", encoding="latin-1")
    return root


@pytest.mark.parametrize("size", [1, PAGE_SIZE, (1 << 20) - 1, 1 << 20, 3_000_000])
def test_an_image_of_any_size(tmp_path: Path, size: int) -> None:
    image = build_image(tmp_path / "image.db", size)
    assert image.size == image.path.stat().st_size >= size
    assert image.size % PAGE_SIZE == 0
    assert image.pages * PAGE_SIZE == image.size
    assert list(tmp_path.iterdir()) == [image.path]
    with closing(sqlite3.connect(image.path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.execute("INSERT INTO search(search) VALUES ('integrity-check')")


def test_its_contents(tmp_path: Path, root: Path) -> None:
    image = build_image(tmp_path / "image.db", 400_000, root=root)
    with closing(sqlite3.connect(image.path)) as database:
        rows = database.execute(
            "SELECT path, line FROM passages WHERE copy = 2 ORDER BY id"
        ).fetchall()
        assert rows == [("long.py", 1), ("long.py", 41), ("long.py", 81), ("package/short.py", 1)]
        [herons] = database.execute(
            "SELECT count(*) FROM search WHERE search MATCH 'heron'"
        ).fetchone()
        assert image.copies * 3 - 3 < herons <= image.copies * 3
        for word, expected in (("egret", True), ("walrus", False)):
            found = database.execute("SELECT 1 FROM search WHERE search MATCH ?", (word,))
            assert bool(found.fetchone()) is expected


def test_a_kept_image_is_opened_again(tmp_path: Path, root: Path) -> None:
    image = build_image(tmp_path / "with space?.db", 300_000, root=root)
    assert open_image(image.path) == image


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 500])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DemoError, match="not an image of this demo"):
        open_image(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="is not a file"):
        open_image(tmp_path / "absent")


def test_progress_grows_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_image(tmp_path / "image.db", 2 << 20, progress=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {2 << 20}
    assert seen[-1] == (2 << 20, 2 << 20)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("when", [1, 3, 6])
def test_building_can_be_aborted_at_any_point(
    tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some of the calls come from inside of SQLite, through which no exception can pass.
    monkeypatch.setattr(module, "_OPCODES_PER_CALL", 1000)
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise Stop

    with pytest.raises(Stop):
        build_image(tmp_path / "image.db", 1 << 20, progress=progress)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "image.db"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        build_image(path, 1)
    assert path.read_text() == "precious"


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DemoError, match="no Python source"):
        build_image(tmp_path / "image.db", 1, root=tmp_path / "empty")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DemoError, match="the sources of Python's standard library are not in"):
        find_sources()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_only_at_fsync(
    tmp_path: Path, root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FullDisk, match="no room for the image in"):
        build_image(tmp_path / "image.db", 1, root=root)
    assert not list(tmp_path.iterdir())


def test_an_sqlite_without_fts5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCHEMA", "CREATE VIRTUAL TABLE search USING no_fts5(text)")
    with pytest.raises(DemoError, match="was built without FTS5"):
        build_image(tmp_path / "image.db", 1)
    assert not list(tmp_path.iterdir())
