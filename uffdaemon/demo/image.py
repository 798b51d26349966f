"""The memory image of the demo: a SQLite database with a full-text index.

The text is the source code of Python's standard library, in passages of forty lines, repeated
until the image is large enough.  The index is SQLite's FTS5.  The file is the memory image: its
pages, as large as the kernel's, become the pages of the restored memory.
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
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Image", "build_image", "find_sources", "open_image"]

PASSAGE_LINES: Final = 40
_OPCODES_PER_CALL: Final = 100_000  # of SQLite's virtual machine, between calls of `progress`
_PASSAGES_PER_CALL: Final = 256  # inserted between calls of `progress`: a few milliseconds

# Tests would be more than half of the text; installed packages differ from machine to machine.
_SKIPPED: Final = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
# Building needs no durability: an unfinished image is removed, not recovered.
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
    """The directory of the standard library's sources.  Raises `DemoError` if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DemoError(f"the sources of Python's standard library are not in {root}")
    return root


def passages(root: Path) -> Iterator[Passage]:
    """Split every source below `root` into passages of `PASSAGE_LINES` lines, in a fixed order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
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

    `progress` is called often with the bytes done and `size`; an exception that it raises aborts
    the build.  Raises `FullDisk` if the file system is full (building needs twice the size), and
    `DemoError` if this SQLite has no FTS5.  A failed build leaves no file behind.
    """
    path.open("xb").close()
    draft = path.with_name(f"{path.name}.draft")
    handler = _ProgressHandler(progress, size)
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as database:
            # Makes long statements interruptible, too.
            database.set_progress_handler(handler.interrupts, _OPCODES_PER_CALL)
            _create(database)
            copies, count = _fill(database, size, root or find_sources(), handler)
            # VACUUM puts the pages of each table together, as in a well-kept database.
            database.execute("VACUUM INTO ?", (str(path),))
        # Only clean pages can be dropped from the page cache.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        handler.advance(size)
        return Image(path, path.stat().st_size, count, copies)
    except BaseException as error:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        if handler.error is not None and error is not handler.error:
            raise handler.error from None
        if _is_full(error):
            raise FullDisk(path.parent) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def open_image(path: Path) -> Image:
    """Open an image from an earlier build.  Raises `DemoError` if `path` is not one."""
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
        raise DemoError(f"{path} contains no text")
    if page_size != PAGE_SIZE or size % PAGE_SIZE:
        raise DemoError(f"{path} does not consist of pages of {PAGE_SIZE} bytes")
    return Image(path, size, count, copies)


class _ProgressHandler:
    """Calls `progress`, also as SQLite's progress handler, through which no exception can pass."""

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
        """Whether SQLite is to abort the running statement."""
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


def _fill(
    database: sqlite3.Connection, size: int, root: Path, handler: _ProgressHandler
) -> tuple[int, int]:
    """Insert the text repeatedly until it takes `size` bytes.  Returns (copies, passages)."""
    copies = count = used = 0
    # 'optimize' frees some pages again.  The margin makes one pass enough.
    goal = size + size // 32
    text = _repeated(root)
    while used < size:
        step = min(max(size // 64, 64 << 10), 32 << 20)
        while used < goal:
            database.execute("BEGIN")
            pending = 0
            while pending < step:
                copies, passage = next(text)
                count += 1
                _insert(database, count, copies, passage)
                pending += len(passage.text)
                if count % _PASSAGES_PER_CALL == 0:
                    handler.advance(used * 3 // 4)  # 'optimize' is about a quarter of the work
            # FTS5 writes its pages at COMMIT: the size is known only after it.
            database.execute("COMMIT")
            used = _used(database)
        # Merge the index into one segment, so that a query touches few pages.
        database.execute("INSERT INTO search(search) VALUES ('optimize')")
        used = _used(database)
    return copies, count


def _repeated(root: Path) -> Iterator[tuple[int, Passage]]:
    """The passages over and over, each with the number of its repetition, from 1."""
    for copy in itertools.count(1):
        empty = True
        for passage in passages(root):
            empty = False
            yield copy, passage
        if empty:
            raise DemoError(f"no Python source below {root}")


def _used(database: sqlite3.Connection) -> int:
    pages = _number(database, "PRAGMA page_count") - _number(database, "PRAGMA freelist_count")
    return pages * PAGE_SIZE


def _insert(database: sqlite3.Connection, number: int, copy: int, passage: Passage) -> None:
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
