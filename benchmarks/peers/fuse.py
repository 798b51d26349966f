"""A filesystem with one file, the image, in pyfuse3: lazy memory by mmap instead of userfaultfd.

Mounted at ``--mount``; writes "ready" once the file can be opened, and ends with its standard
input.  Each page that the toucher touches in its mapping is a request to this process, since
MADV_RANDOM keeps the kernel from reading ahead.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import mmap
import os
import stat
import sys
from typing import Any, cast

import trio

NAME = b"image"
INODE = 2


class Image:
    """The operations that a mapping needs, as pyfuse3 calls them."""

    def __init__(self, fuse: Any, image: mmap.mmap) -> None:  # noqa: ANN401
        super().__init__()
        self._fuse = fuse
        self._image = image

    async def getattr(self, inode: int, ctx: object = None) -> object:
        """What the directory and the file are like."""
        del ctx
        entry = self._fuse.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        if inode == INODE:
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_size = len(self._image)
        elif inode == self._fuse.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o555
        else:
            raise self._fuse.FUSEError(errno.ENOENT)
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> object:
        """Find the file."""
        del parent
        if name != NAME:
            raise self._fuse.FUSEError(errno.ENOENT)
        return await self.getattr(INODE, ctx)

    async def open(self, inode: int, flags: int, ctx: object) -> object:
        """Open it."""
        del flags, ctx
        return self._fuse.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """A page, as a rule."""
        del fh
        return self._image[off : off + size]


def operations(fuse: Any, image: mmap.mmap) -> object:  # noqa: ANN401
    """`Image`, as pyfuse3 wants it."""
    # Its base class is only known once it has been found.
    made = type("Served", (Image, fuse.Operations), {})
    return cast("object", made(fuse, image))


async def serve(fuse: Any) -> None:  # noqa: ANN401
    """Serve until standard input ends."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fuse.main)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await trio.lowlevel.wait_readable(sys.stdin)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--mount", required=True, metavar="DIRECTORY")
    parser.add_argument("--cpu", type=int, metavar="CORE")
    options = parser.parse_args()
    # A name for the type checkers would need it installed where they run.
    fuse: Any = importlib.import_module("pyfuse3")
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    with open(options.image, "rb") as file:
        image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    fuse.init(operations(fuse, image), options.mount, {*fuse.default_options, "fsname=benchmark"})
    try:
        trio.run(serve, fuse)
    finally:
        fuse.close(unmount=True)


if __name__ == "__main__":
    main()
