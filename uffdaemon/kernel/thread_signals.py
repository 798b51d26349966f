"""Which threads of this process have a signal blocked.

Source: ``SigBlk`` of ``/proc/self/task/TID/status``, proc_pid_status(5).
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path


def threads_that_block(number: int) -> dict[int, str]:
    """The Python threads that have a signal blocked, by their ids, with their names.

    Threads of C code often block all signals and never touch the memory, such as faulthandler's.
    Threads that have just begun or ended may be missing.
    """
    found: dict[int, str] = {}
    known = {str(thread.native_id) for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = (task / "status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            blocked, name = int(fields["SigBlk"], 16), fields["Name"]
            if blocked >> (number - 1) & 1 and task.name in known:
                found[int(task.name)] = name
    return found
