"""Fetching from a source: attempts, their deadline, and the resulting buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from uffdaemon import errors, native
from uffdaemon.names import shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from uffdaemon.actions import Copy
    from uffdaemon.model.region import Fault, Region, Retry


class FetchedSource:
    """Bytes that have been fetched: `size` bytes from `base` of the source they came from."""

    def __init__(self, data: Buffer, base: int) -> None:
        self._pinned = native.PinnedBuffer(data)
        self._base = base
        self.size: int = base + self._pinned.length

    def address(self, offset: int, length: int) -> int | None:
        """The address of the bytes.  Raises `SourceTooShort`."""
        if offset < self._base or offset + length > self.size:
            raise errors.SourceTooShort(f"{length} bytes at {offset:#x} were not fetched")
        return self._pinned.address + offset - self._base

    async def fetch(self, offset: int, length: int) -> Buffer:
        """Never called: `address` always returns an address."""
        raise NotImplementedError


@dataclass(eq=False, slots=True)
class PendingFetch:
    """A part of a region that is being fetched, and the faults that wait for it."""

    region: Region
    action: Copy
    start: int
    length: int
    faults: list[Fault]

    def covers(self, fault: Fault, action: Copy) -> bool:
        """Whether this brings what `action` wants for `fault`."""
        return (
            self.region is fault.region
            and self.start <= fault.address < self.start + self.length
            and self.action.source is action.source
            and self.action.offset == action.offset
        )


async def fetch_with_retry(action: Copy, offset: int, length: int, retry: Retry) -> Buffer:
    """Get exactly `length` bytes from `offset` of the action's source.

    Asks again as `retry` says.  Raises the last attempt's `SourceError`.
    """
    failures = 0
    while True:
        try:
            return await _fetch_once(action, offset, length, retry.timeout)
        except errors.SourceError:
            failures += 1
            if failures >= retry.attempts:
                raise
        await trio.sleep(retry.delay(failures))


async def _fetch_once(action: Copy, offset: int, length: int, patience: float) -> Buffer:
    source = action.source
    try:
        with trio.fail_after(patience):
            data = await source.fetch(offset, length)
        with memoryview(data) as view:
            given = view.nbytes
            if not view.c_contiguous:
                data = view.tobytes()
    except errors.SourceError:
        raise
    except trio.TooSlowError:
        raise errors.SourceTimedOut(f"{shown(source)} did not answer in {patience} s") from None
    except Exception as error:
        raise errors.SourceFailed(f"{shown(source)} raised {shown(error)}") from error
    if given != length:
        raise errors.SourceTooShort(
            f"{shown(source)} gave {given} bytes; {length} at {offset:#x} were asked for"
        )
    return data
