"""The memory image of the demonstration: a SQLite database with a full-text index.

The text is the Python standard library's own sources, which every machine with Python has, cut
into passages of forty lines and entered again and again until the image is large enough.  The
index is SQLite's FTS5.  The file's bytes, page by page, are the memory that is restored later:
SQLite's pages of 4096 bytes are the kernel's.
"""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
import sysconfig
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from uffdaemon.demo.errors import DemoError, FullDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["PAGE_SIZE", "Image", "build_image", "find_sources", "open_image"]

PAGE_SIZE: Final = 4096
PASSAGE_LINES: Final = 40
_INSTRUCTIONS: Final = 100_000  # of SQLite's machine, from one look at `progress` to the next
_BREATH: Final = 256  # passages from one call of `progress` to the next: milliseconds

# Test suites are the larger half of the sources and read like it; packages are somebody else's.
_NOT_TEXT: Final = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
# What a building needs is speed, not durability: a half-made image is removed, never recovered.
_PRAGMAS: Final = (
    f"PRAGMA page_size = {PAGE_SIZE}",
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA cache_size = -65536",
)
_SCHEMA: Final = """
CREATE TABLE passages(
    id INTEGER PRIMARY KEY, copy INTEGER NOT NULL,
    path TEXT NOT NULL, line INTEGER NOT NULL, text TEXT NOT NULL);
CREATE VIRTUAL TABLE search USING fts5(text, content = 'passages', content_rowid = 'id');
"""


@dataclass(frozen=True, slots=True)
class Image:
    """A database file whose bytes are a memory image; `size` is in bytes, of whole pages."""

    path: Path
    size: int
    passages: int
    copies: int

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Passage:
    path: str
    line: int
    text: str


def find_sources() -> Path:
    """Where the standard library's sources are; `DemoError` when only compiled code is there."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DemoError(f"the sources of Python's standard library are not in {root}")
    return root


def passages(root: Path) -> Iterator[Passage]:
    """Every source below `root`, always in the same order, in pieces of `PASSAGE_LINES` lines."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_TEXT)
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            source = Path(folder, name)
            where = source.relative_to(root).as_posix()
            lines = source.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            for start in range(0, len(lines), PASSAGE_LINES):
                text = "".join(lines[start : start + PASSAGE_LINES])
                yield Passage(where, start + 1, text)


def build_image(
    path: Path,
    size: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    root: Path | None = None,
) -> Image:
    """Build an image of at least `size` bytes at `path`, which must not exist yet.

    `progress` is called with `size` and how much of it is done, often; what it raises ends the
    building.  Raises `FullDisk` when the file system has no room left (twice the size is needed
    for a moment), `DemoError` when this SQLite has no FTS5, and leaves no file behind then.
    """
    path.open("xb").close()
    draft = path.with_name(f"{path.name}.draft")
    watch = _Watch(progress, size)
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as database:
            # Long statements have to be interruptible too.
            database.set_progress_handler(watch.interrupts, _INSTRUCTIONS)
            _create(database)
            copies, count = _fill(database, size, root or find_sources(), watch)
            # Each table's pages lie together then, as in a database that is looked after.
            database.execute("VACUUM INTO ?", (str(path),))
        # The page cache can only be dropped of pages that are on the disk.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        watch.advance(size)
        return Image(path, path.stat().st_size, count, copies)
    except BaseException as error:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        if watch.error is not None and error is not watch.error:
            raise watch.error from None
        if _is_full(error):
            raise FullDisk(path.parent) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def open_image(path: Path) -> Image:
    """An image that was built, and kept, before; `DemoError` when `path` is no such thing."""
    if not path.is_file():
        raise DemoError(f"{path} is not a file")
    try:
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            page_size = _number(database, "PRAGMA page_size")
            count = _number(database, "SELECT count(*) FROM search_docsize")
            copies = _number(database, "SELECT max(copy) FROM passages")
    except sqlite3.DatabaseError as error:
        raise DemoError(f"{path} is not an image of this demo: {error}") from error
    size = path.stat().st_size
    if not count:
        raise DemoError(f"{path} holds no text")
    if page_size != PAGE_SIZE or size % PAGE_SIZE:
        raise DemoError(f"{path} does not consist of pages of {PAGE_SIZE} bytes")
    return Image(path, size, count, copies)


class _Watch:
    """Calls `progress`, also from inside of SQLite, which can carry no exception out."""

    def __init__(self, progress: Callable[[int, int], None] | None, size: int) -> None:
        self.error: BaseException | None = None
        self._progress = progress
        self._size = size
        self._done = 0

    def advance(self, done: int) -> None:
        self._done = min(done, self._size)
        if self._progress is not None:
            self._progress(self._done, self._size)

    def interrupts(self) -> bool:
        """Whether the statement that runs has to end."""
        try:
            self.advance(self._done)
        except BaseException as error:  # noqa: BLE001  # raised again by `build_image`
            self.error = error
        return self.error is not None


def _create(database: sqlite3.Connection) -> None:
    for pragma in _PRAGMAS:
        database.execute(pragma)
    try:
        database.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        if "fts5" not in str(error):
            raise
        raise DemoError(
            f"this Python's SQLite {sqlite3.sqlite_version} was built without FTS5"
        ) from error


def _fill(database: sqlite3.Connection, size: int, root: Path, watch: _Watch) -> tuple[int, int]:
    """Enter the text again and again until it takes `size` bytes: (copies, passages)."""
    copies = count = used = 0
    # Tidying up frees some pages again, and is not something to do twice.
    goal = size + size // 32
    text = _endless(root)
    while used < size:
        step = min(max(size // 64, 64 << 10), 32 << 20)
        while used < goal:
            database.execute("BEGIN")
            pending = 0
            while pending < step:
                copies, passage = next(text)
                count += 1
                _enter(database, count, copies, passage)
                pending += len(passage.text)
                if count % _BREATH == 0:
                    watch.advance(used * 3 // 4)  # tidying up is about a quarter of the work
            # FTS5 keeps what was entered in memory until now: only here is the size known.
            database.execute("COMMIT")
            used = _used(database)
        # A single segment, whose pages lie together, is what lets a query touch few of them.
        database.execute("INSERT INTO search(search) VALUES ('optimize')")
        used = _used(database)
    return copies, count


def _endless(root: Path) -> Iterator[tuple[int, Passage]]:
    """The passages over and over, each with the number of the copy."""
    for copy in itertools.count(1):
        empty = True
        for passage in passages(root):
            empty = False
            yield copy, passage
        if empty:
            raise DemoError(f"there is not one Python source below {root}")


def _used(database: sqlite3.Connection) -> int:
    pages = _number(database, "PRAGMA page_count") - _number(database, "PRAGMA freelist_count")
    return pages * PAGE_SIZE


def _enter(database: sqlite3.Connection, number: int, copy: int, passage: Passage) -> None:
    database.execute(
        "INSERT INTO passages VALUES (?, ?, ?, ?, ?)",
        (number, copy, passage.path, passage.line, passage.text),
    )
    database.execute("INSERT INTO search(rowid, text) VALUES (?, ?)", (number, passage.text))


def _number(database: sqlite3.Connection, statement: str) -> int:
    row: tuple[int] = database.execute(statement).fetchone()
    return row[0]


def _is_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
