"""Errors of the demo that the user can do something about.  Each prints as one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DemoError", "FullDisk", "WorkerDied", "WorkerFailed"]


class DemoError(Exception):
    """The demo cannot continue; the text is one line for the user."""


class FullDisk(DemoError):
    """The file system of `folder` is full."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"no room for the image in {folder}: use --size for a smaller one, or --directory"
        )
        self.folder = folder


class WorkerDied(DemoError):
    """The worker process exited before it was done."""


class WorkerFailed(DemoError):
    """The worker process reported an error."""
