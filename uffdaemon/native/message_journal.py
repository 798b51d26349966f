"""The journal of one userfaultfd in C: a ring of messages in a part of a memory file."""

from __future__ import annotations

import os
from typing import Any, Final

from uffdaemon.native._native import ffi, lib

SLOTS: Final = 2048
"""Messages in the ring."""
WINDOW: Final = 128
"""The slots from `kept` on where messages lie that were read, and perhaps not applied."""
RING: Final = 512
"""Bytes before the ring.  The first eight are how many messages were kept; the rest is free."""
MESSAGE: Final = 32
SIZE: Final = RING + SLOTS * MESSAGE


class MessageJournal:
    """The journal at `offset` of a memory file, which has `SIZE` bytes for it there.

    `number` identifies the userfaultfd.  Descriptors of forked children are sent to the socket
    `keeper` (-1: none) as soon as they are read.  What a predecessor had read counts as kept.
    Raises OSError.
    """

    def __init__(self, file: int, offset: int, number: int, keeper: int) -> None:
        error = ffi.new("int *")
        made = lib.uffdaemon_journal_open(file, offset, number, keeper, error)
        if made == ffi.NULL:
            raise OSError(int(error[0]), os.strerror(int(error[0])))
        self._journal: Any = ffi.gc(made, lib.uffdaemon_journal_close)

    @property
    def pointer(self) -> Any:  # noqa: ANN401  # cffi's, for `Port`
        """The C object, for cffi."""
        return self._journal

    @property
    def kept(self) -> int:
        """How many messages have been kept since the journal was begun."""
        return int(self._journal.kept[0])
