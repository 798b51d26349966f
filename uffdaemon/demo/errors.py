"""What can go wrong in the demonstration and is the reader's to mend: one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DemoError", "FullDisk", "WorkerDied", "WorkerFailed"]


class DemoError(Exception):
    """The demonstration cannot go on; its text is one line for a person."""


class FullDisk(DemoError):
    """The file system of `folder` has no room for the image."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"no room for the image in {folder}: ask for less (--size) or elsewhere (--directory)"
        )
        self.folder = folder


class WorkerDied(DemoError):
    """The worker process ended in the middle of its work."""


class WorkerFailed(DemoError):
    """The worker process says that it could not do its work."""
