"""Runs a probe in a child process, since it may hang, or be killed by a seccomp filter."""

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
"""Tries one thing.  Returns details, or raises OSError if the kernel refuses.  Any other exception
is a bug, or an unexpected result."""

_READ_SIZE = 65536


def attempt(probe: Probe, deadline: float = 20.0) -> Attempt:
    """Run `probe` in a forked child, for at most `deadline` seconds.  Does not raise if it fails.

    The child does not exec, so it has exactly the privileges of this process.
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
            # The child must not return into the parent's code.
            os._exit(0)
    os.close(writing)
    try:
        output, at_end = _read_all(reading, time.monotonic() + deadline)
    finally:
        os.close(reading)
        # Harmless if the child has closed the pipe by exiting: its status is already set.
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if output:
        return _attempt_of(output)
    if at_end and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Attempt(text=f"killed by {signal.Signals(number).name}", signal=number)
    if at_end:
        return Attempt(text="exited without a result")
    return Attempt(text=f"no result within {deadline:g} seconds")


def _in_child(probe: Probe, writing: int) -> None:
    # A child that a filter kills must not leave a core file.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        output = json.dumps({"worked": True, "details": dict(probe())})
    except KernelRefusal as error:
        output = json.dumps({"number": error.number, "text": _reason(error)})
    except OSError as error:
        output = json.dumps({"number": error.errno or 0, "text": str(error)})
    except Exception as error:  # noqa: BLE001  # a probe's bug is a finding too
        output = json.dumps({"text": f"{type(error).__name__}: {error}"})
    with open(writing, "wb") as pipe:
        pipe.write(output.encode())


def _reason(error: KernelRefusal) -> str:
    # Without the advice: the finding has its own line with the fix.
    return str(error).removesuffix(f" [{error.advice}]")


def _read_all(reading: int, until: float) -> tuple[bytes, bool]:
    """Return the child's output, and whether it closed the pipe in time."""
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    output = b""
    while (left := until - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            chunk = os.read(reading, _READ_SIZE)
            if not chunk:
                return output, True
            output += chunk
    return output, False


def _attempt_of(output: bytes) -> Attempt:
    try:
        return Attempt(**json.loads(output))
    except (ValueError, TypeError) as error:
        return Attempt(text=f"malformed result: {error}")
