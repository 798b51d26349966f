"""Trying things in a child process: it may hang, or be killed by a seccomp filter."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from uffdaemon.check.facts import Attempt, Json
from uffdaemon.errors import KernelRefusal

Probe: TypeAlias = Callable[[], Mapping[str, Json]]
"""Tries one thing.  Returns details, or raises: OSError for a refusal, anything else for what
nobody expected."""

_PIECE = 65536


def attempt(probe: Probe, deadline: float = 20.0) -> Attempt:
    """Run `probe` in a forked child, for at most `deadline` seconds; never raises for its sake.

    A forked child has the very privileges of this process, which one that was executed might not.
    """
    try:
        reading, writing = os.pipe()
    except OSError as error:
        return Attempt(text=f"no pipe to a child process: {error}")
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        return Attempt(text=f"no child process: {error}")
    if pid == 0:
        try:
            os.close(reading)
            _in_child(probe, writing)
        finally:
            # Whatever happened, nothing of the parent's may run in the child.
            os._exit(0)
    os.close(writing)
    try:
        said, at_end = _read_all(reading, time.monotonic() + deadline)
    finally:
        os.close(reading)
        # No harm to one that is about to exit: how it ended has been settled by then.
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if said:
        return _attempt_of(said)
    if at_end and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Attempt(text=f"killed by {signal.Signals(number).name}", signal=number)
    if at_end:
        return Attempt(text="ended without an answer")
    return Attempt(text=f"no answer within {deadline:g} seconds")


def _in_child(probe: Probe, writing: int) -> None:
    # To be killed by a filter is an answer, not a crash to keep.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        said = json.dumps({"worked": True, "details": dict(probe())})
    except KernelRefusal as error:
        said = json.dumps({"number": error.number, "text": _reason(error)})
    except OSError as error:
        said = json.dumps({"number": error.errno or 0, "text": str(error)})
    except Exception as error:  # noqa: BLE001  # a probe's bug is a finding too
        said = json.dumps({"text": f"{type(error).__name__}: {error}"})
    with open(writing, "wb") as pipe:
        pipe.write(said.encode())


def _reason(error: KernelRefusal) -> str:
    # The advice is not for this place: the finding has a line of its own.
    return str(error).removesuffix(f" [{error.advice}]")


def _read_all(reading: int, until: float) -> tuple[bytes, bool]:
    """Return what the child said, and whether it said all of it in time."""
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    said = b""
    while (left := until - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            piece = os.read(reading, _PIECE)
            if not piece:
                return said, True
            said += piece
    return said, False


def _attempt_of(said: bytes) -> Attempt:
    try:
        return Attempt(**json.loads(said))
    except (ValueError, TypeError) as error:
        return Attempt(text=f"an answer that makes no sense: {error}")
