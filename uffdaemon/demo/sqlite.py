"""Opens a SQLite database in memory without copying it, by `sqlite3_deserialize` in C.

`sqlite3.Connection.deserialize` of the standard library copies the bytes first, which would touch
every page of guarded memory.  The C function takes an address, and reads pages when a query needs
them: https://sqlite.org/c3ref/deserialize.html.  ctypes releases the GIL around each call, so that
a page fault blocks only the calling thread.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_uint, c_void_p
from typing import TYPE_CHECKING, Final, Self

from uffdaemon.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

__all__ = ["MemoryDatabase", "Value", "sqlite_version"]

Value = int | float | str | None

_OK: Final = 0
_ROW: Final = 100
_DONE: Final = 101
_OPEN_READWRITE: Final = 2
_OPEN_MEMORY: Final = 0x80
_DESERIALIZE_READONLY: Final = 4
_INTEGER: Final = 1
_FLOAT: Final = 2
_NULL: Final = 5
_TRANSIENT: Final = -1  # SQLITE_TRANSIENT: SQLite copies a bound text before the call returns


def _load() -> ctypes.CDLL:
    """Load the SQLite that Python's module is linked with, or else the system's.

    Raises `DemoError` if there is none.
    """
    for name in (getattr(_sqlite3, "__file__", None), "libsqlite3.so.0", "libsqlite3.so"):
        if name is None:
            continue
        try:
            library = ctypes.CDLL(os.fspath(name))
            library.sqlite3_deserialize  # noqa: B018  # raises AttributeError if there is no such symbol
        except (OSError, AttributeError):
            continue
        return library
    raise DemoError(
        "no SQLite library with sqlite3_deserialize (3.36 or later): install libsqlite3-0"
    )


class _Sqlite:
    """The functions of SQLite's C interface that reading needs, with their types."""

    def __init__(self) -> None:
        library = _load()
        for name, result, arguments in (
            ("libversion", c_char_p, []),
            ("open_v2", c_int, [c_char_p, POINTER(c_void_p), c_int, c_char_p]),
            ("close_v2", c_int, [c_void_p]),
            ("errmsg", c_char_p, [c_void_p]),
            (
                "deserialize",
                c_int,
                [c_void_p, c_char_p, c_void_p, c_int64, c_int64, c_uint],
            ),
            ("prepare_v2", c_int, [c_void_p, c_char_p, c_int, POINTER(c_void_p), c_void_p]),
            ("bind_text", c_int, [c_void_p, c_int, c_char_p, c_int, c_void_p]),
            ("bind_int64", c_int, [c_void_p, c_int, c_int64]),
            ("step", c_int, [c_void_p]),
            ("column_count", c_int, [c_void_p]),
            ("column_type", c_int, [c_void_p, c_int]),
            ("column_int64", c_int64, [c_void_p, c_int]),
            ("column_double", ctypes.c_double, [c_void_p, c_int]),
            ("column_text", c_char_p, [c_void_p, c_int]),
            ("finalize", c_int, [c_void_p]),
        ):
            function = getattr(library, f"sqlite3_{name}")
            function.restype = result
            function.argtypes = arguments
        self._library = library

    def status(self, name: str, *arguments: object) -> int:
        """Call a function whose result is an int."""
        return int(getattr(self._library, f"sqlite3_{name}")(*arguments))

    def real(self, name: str, *arguments: object) -> float:
        return float(getattr(self._library, f"sqlite3_{name}")(*arguments))

    def text(self, name: str, *arguments: object) -> str:
        value: bytes | None = getattr(self._library, f"sqlite3_{name}")(*arguments)
        return "" if value is None else value.decode("utf-8", errors="replace")


class MemoryDatabase:
    """A read-only database in the `size` bytes of memory at `address`.

    The caller keeps the memory mapped until after `close`.  Raises `DemoError` with SQLite's
    message.
    """

    def __init__(self, address: int, size: int) -> None:
        self._sqlite = _Sqlite()
        self._handle = c_void_p()
        flags = _OPEN_READWRITE | _OPEN_MEMORY
        status = self._sqlite.status("open_v2", b":memory:", byref(self._handle), flags, None)
        try:
            self._check(status, "open")
            self._check(
                self._sqlite.status(
                    "deserialize",
                    self._handle,
                    b"main",
                    address,
                    size,
                    size,
                    _DESERIALIZE_READONLY,
                ),
                "deserialize",
            )
            # Use the pages in place, without copying them into SQLite's cache.
            self.query(f"PRAGMA mmap_size = {size}")
        except BaseException:
            self.close()
            raise

    def query(self, statement: str, arguments: Sequence[str | int] = ()) -> list[tuple[Value, ...]]:
        """Run one statement and return its rows."""
        prepared = c_void_p()
        call = self._sqlite.status
        self._check(
            call("prepare_v2", self._handle, statement.encode(), -1, byref(prepared), None),
            statement,
        )
        try:
            for index, argument in enumerate(arguments, 1):
                if isinstance(argument, int):
                    status = call("bind_int64", prepared, index, argument)
                else:
                    data = argument.encode()
                    status = call("bind_text", prepared, index, data, len(data), _TRANSIENT)
                self._check(status, statement)
            return list(self._rows(prepared, statement))
        finally:
            call("finalize", prepared)

    def _rows(self, prepared: c_void_p, statement: str) -> Iterator[tuple[Value, ...]]:
        while (status := self._sqlite.status("step", prepared)) == _ROW:
            columns = self._sqlite.status("column_count", prepared)
            yield tuple(self._column(prepared, index) for index in range(columns))
        if status != _DONE:
            self._check(status, statement)

    def _column(self, prepared: c_void_p, index: int) -> Value:
        kind = self._sqlite.status("column_type", prepared, index)
        if kind == _NULL:
            return None
        if kind == _INTEGER:
            return self._sqlite.status("column_int64", prepared, index)
        if kind == _FLOAT:
            return self._sqlite.real("column_double", prepared, index)
        return self._sqlite.text("column_text", prepared, index)

    def _check(self, status: int, what: str) -> None:
        if status != _OK:
            reason = self._sqlite.text("errmsg", self._handle)
            raise DemoError(f"SQLite: {reason} ({what})")

    def close(self) -> None:
        handle, self._handle = self._handle, c_void_p()
        if handle:
            self._sqlite.status("close_v2", handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sqlite_version() -> str:
    """The version of the SQLite that reads the image."""
    return _Sqlite().text("libversion")
