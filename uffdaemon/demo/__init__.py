"""`uffdaemon demo`: restore a real memory image lazily, and compare with an eager restore.

`image` builds the memory image, `worker` is the process that queries it, `runs` is the daemon's
side, and `command` is the command line.  Imports public names only, like an application.
"""

from __future__ import annotations

from uffdaemon.demo.command import main

__all__ = ["main"]
