"""`uffdaemon demo`: a lazy restore of something real, beside an eager one.

`image` builds the memory image, `worker` is the process that reads it, `runs` is the daemon's
side, `command` puts them together.
"""

from __future__ import annotations

from uffdaemon.demo.command import main

__all__ = ["main"]
