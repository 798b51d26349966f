"""The guarded region: access to its memory as a buffer or an array, and without the GIL."""

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


@dataclass(eq=False, slots=True, repr=False)
class GuardedRegion(Region):
    """A region of memory of this process; returned by `Daemon.guard`."""

    memory: Memory = field(kw_only=True)
    """The guarded memory."""
    placement: Placement = field(kw_only=True, default=Placement.NATIVE)
    """What resolves its faults."""
    why_unsafe: Callable[[], str] = field(kw_only=True, default=str)
    """Returns the reason why plain accesses could hang, or "" if they are safe."""

    def __repr__(self) -> str:
        # A dataclass with slots has no super() before Python 3.14.
        return f"{Region.__repr__(self)[:-1]}, placement {self.placement.value}>"

    def buffer(self, *, readonly: bool = False) -> memoryview:
        """The memory itself as a buffer, for anything that takes one.

        The memory stays mapped for as long as the buffer, or anything made from it, is alive.
        Raises `PlacementRefused`, with the reason, if a thread that holds the GIL could hang.
        """
        reason = self.why_unsafe()
        if reason:
            raise errors.PlacementRefused(
                f"no buffer of {self.label}: {reason}.  A thread that holds the GIL while it waits "
                "would wait forever.  Use read_into, write_from, touch and prefault, or another "
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
        """The memory as a numpy array that begins at its start.

        By default the array has one dimension and as many elements as fit.  Raises what `buffer`
        and numpy raise.
        """
        import numpy as np  # noqa: PLC0415  # optional

        kind = np.dtype(dtype)
        count = self.length // kind.itemsize
        if shape is not None:
            count = int(np.prod(shape))
        flat = np.frombuffer(self.buffer(readonly=readonly), kind, count)
        return flat if shape is None else flat.reshape(shape)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Copy bytes from `offset` into a writable buffer, as many as it has; returns how many.

        Blocks only the calling thread while pages are missing.  Raises `InvalidRange`, and
        `PlacementRefused` in the thread that runs trio if that would have to resolve the faults.
        """
        return self.memory.read_into(offset, buffer)

    def write_from(self, offset: int, data: Buffer) -> None:
        """Copy bytes to `offset`.  Blocks, and raises, like `read_into`."""
        self.memory.write(offset, data)

    def touch(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> None:
        """Access one byte of each page, for reading or (without changing it) for writing.

        `offset` and `length` are in bytes.  Blocks, and raises, like `read_into`.
        """
        self.memory.touch(offset, length, write=write)

    def prefault(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> None:
        """Fill pages in advance, for instance before a system call: see `Resolver.IN_THREAD`.

        `offset` and `length` are in bytes.  Blocks, and raises, like `read_into`.
        """
        self.memory.touch(offset, length, write=write)
