"""Guarded memory as people want it: a buffer, an array, and accesses that never hold the GIL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from uffdaemon import errors
from uffdaemon.model.region import Region
from uffdaemon.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    from uffdaemon.kernel.memory import Memory


@dataclass(eq=False, slots=True)
class GuardedRegion(Region):
    """A region of this process's own memory, made by `Daemon.guard`."""

    memory: Memory = field(kw_only=True)
    """The memory that it covers."""
    placement: Placement = field(kw_only=True, default=Placement.NATIVE)
    """Who answers its faults."""
    why_unsafe: Callable[[], str] = field(kw_only=True, repr=False, default=str)
    """Why plain accesses might never end; "" where they are safe."""

    def buffer(self, *, readonly: bool = False) -> memoryview:
        """The memory itself: whatever takes a buffer may use it, `numpy.frombuffer` say.

        The memory stays mapped as long as the buffer, or anything made from it, is alive.  Raises
        `PlacementRefused`, with the reason, where a thread that holds the GIL might wait for ever.
        """
        reason = self.why_unsafe()
        if reason:
            raise errors.PlacementRefused(
                f"no buffer of {self.label}: {reason}.  A thread that holds the GIL while it waits "
                "would wait for ever.  Use read_into, write_from, touch and prefault, or another "
                "placement"
            )
        view = self.memory.export()
        return view.toreadonly() if readonly else view

    def array(
        self,
        dtype: DTypeLike = "u1",
        shape: int | tuple[int, ...] | None = None,
        *,
        readonly: bool = False,
    ) -> NDArray[Any]:
        """The memory as a numpy array, which begins at its start; by default with one dimension
        and as long as fits.  Raises what `buffer` and numpy raise."""
        import numpy as np  # noqa: PLC0415  # for those who have it

        kind = np.dtype(dtype)
        count = self.length // kind.itemsize
        if shape is not None:
            count = int(np.prod(shape))
        flat = np.frombuffer(self.buffer(readonly=readonly), kind, count)
        return flat if shape is None else flat.reshape(shape)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Copy bytes out into a writable buffer, as many as it holds; returns how many.  Blocks
        this thread, and no other, while pages are missing."""
        return self.memory.read_into(offset, buffer)

    def write_from(self, offset: int, data: Buffer) -> None:
        """Copy bytes in.  Blocks this thread, and no other, while pages are missing."""
        self.memory.write(offset, data)

    def touch(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> None:
        """Access one byte a page, for reading or (changing nothing) for writing."""
        self.memory.touch(offset, length, write=write)

    def prefault(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> None:
        """Bring pages, so that system calls find them there: see `Resolver.IN_THREAD`."""
        self.memory.touch(offset, length, write=write)
