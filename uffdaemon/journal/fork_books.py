"""The page books at the time of a fork, in a memory file that C has written."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from uffdaemon.model.page_map import PageMap
from uffdaemon.native.page_book import PageBook

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNT: Final = struct.Struct("=Q")
_BOOK: Final = struct.Struct("=QQQ")


def copier(fd: int | None) -> Callable[[PageMap], PageMap]:
    """How page maps of the journal are copied for a child whose books are in the file `fd`.

    None: there is no such file, since nothing was read after the FORK event; they are as they were.
    Raises OSError.
    """
    if fd is None:
        return PageMap.copy
    (count,) = _COUNT.unpack(os.pread(fd, _COUNT.size, 0))
    packed = os.pread(fd, count * _BOOK.size, _COUNT.size)
    books = {
        original: PageBook(pages, file=fd, offset=offset)
        for original, pages, offset in _BOOK.iter_unpack(packed)
    }

    def copy_of(pages: PageMap) -> PageMap:
        book = books.get(pages.book.offset)
        return pages.copy() if book is None else PageMap(book.pages, book=book)

    return copy_of
