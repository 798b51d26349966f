"""Which threads of this process have a signal blocked.

Source: ``SigBlk`` of ``/proc/self/task/TID/status``, proc_pid_status(5).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_OURS = "uffd-"
"""The names of this library's own threads, which touch no guarded memory."""


def threads_that_block(number: int) -> dict[int, str]:
    """The threads that have a signal blocked, by their ids, with their names; not this library's
    own.  Threads that have just begun or ended may be missing."""
    found: dict[int, str] = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = (task / "status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            blocked, name = int(fields["SigBlk"], 16), fields["Name"]
            if blocked >> (number - 1) & 1 and not name.startswith(_OURS):
                found[int(task.name)] = name
    return found
