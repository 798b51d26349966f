"""SQLite on memory: it reads what `sqlite3` reads from the file."""

from __future__ import annotations

import ctypes
import mmap
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.sqlite import MemoryDatabase, Value, sqlite_version
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS: list[tuple[Value, ...]] = [
    (1, "plain", 1.5, None),
    (2, "naïve ‰", -0.0, -(1 << 63)),
    (3, "", 1e300, (1 << 63) - 1),
]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("database") / "file.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE things(id INTEGER, name TEXT, size REAL, other)")
        database.executemany("INSERT INTO things VALUES (?, ?, ?, ?)", ROWS)
        database.commit()
    return path.read_bytes()


@pytest.fixture
def address(content: bytes) -> Iterator[int]:
    """The bytes in memory, at an address."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    first = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.addressof(first)
    finally:
        del first
        memory.close()


def test_every_type_of_value(address: int, content: bytes) -> None:
    with MemoryDatabase(address, len(content)) as database:
        assert database.query("SELECT * FROM things ORDER BY id") == ROWS
        assert database.query("SELECT 1 WHERE 0") == []


def test_arguments_are_bound(address: int, content: bytes) -> None:
    with MemoryDatabase(address, len(content)) as database:
        by_number = database.query("SELECT name FROM things WHERE id = ?", [2])
        by_text = database.query("SELECT id FROM things WHERE name = ? AND id > ?", ["naïve ‰", 1])
    assert by_number == [("naïve ‰",)]
    assert by_text == [(2,)]


def test_the_memory_is_read_in_place_and_never_written(address: int, content: bytes) -> None:
    with MemoryDatabase(address, len(content)) as database:
        with pytest.raises(DemoError, match="readonly database"):
            database.query("INSERT INTO things VALUES (4, '', 0, 0)")
        where = content.index(b"plain")
        ctypes.memmove(address + where, b"PLAIN", 5)
        assert database.query("SELECT name FROM things WHERE id = 1") == [("PLAIN",)]


@pytest.mark.parametrize(
    ("statement", "reason"),
    [("SELEC 1", "syntax error"), ("SELECT * FROM absent", "no such table: absent")],
)
def test_errors_have_the_message_of_sqlite(
    address: int, content: bytes, statement: str, reason: str
) -> None:
    with MemoryDatabase(address, len(content)) as database:
        with pytest.raises(DemoError, match=reason):
            database.query(statement)
        assert database.query("SELECT count(*) FROM things") == [(3,)]


def test_an_error_in_the_middle_of_the_rows(address: int, content: bytes) -> None:
    with (
        MemoryDatabase(address, len(content)) as database,
        pytest.raises(DemoError, match="integer overflow"),
    ):
        database.query("SELECT abs(other) FROM things ORDER BY id")


def test_memory_without_a_database(content: bytes) -> None:
    memory = ctypes.create_string_buffer(b"no database" * 1000)
    with pytest.raises(DemoError, match="not a database"):
        MemoryDatabase(ctypes.addressof(memory), 8192).query("SELECT * FROM sqlite_schema")


def test_closing_twice(address: int, content: bytes) -> None:
    database = MemoryDatabase(address, len(content))
    database.close()
    database.close()


def test_the_library_is_the_one_that_python_uses() -> None:
    assert sqlite_version() == sqlite3.sqlite_version


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(DemoError, match="install libsqlite3-0"):
        sqlite_version()


def test_a_size_that_is_too_small_is_noticed(address: int, content: bytes) -> None:
    with (
        MemoryDatabase(address, len(content) - PAGE_SIZE) as database,
        pytest.raises(DemoError, match="malformed"),
    ):
        database.query("SELECT * FROM things")
