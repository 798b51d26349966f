"""Runs the body of a real-kernel test in a child process that can be killed.

A thread that waits for a page cannot be unwound, and may hold the GIL: such a test must not run
inside of pytest.  The child is a process in a session of its own, forked off an interpreter that
has done nothing yet (`tests.support.forkserver`); when its deadline is over it gets SIGABRT, on
which faulthandler says where every thread is, and then SIGKILL.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import pickle
import select
import signal
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal, ParamSpec, TypedDict

import pytest

from tests.support.deadline import DEADLINE
from tests.support.forkserver import fork_server
from tests.support.requirements import require, unavailable
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from collections.abc import Callable
P = ParamSpec("P")
NO_FEATURES = Features(0)
_DUMP_SECONDS = 30.0  # what faulthandler gets to write where every thread is


class Report(TypedDict):
    """What the child says of itself before it ends."""

    outcome: Literal["passed", "skipped", "failed", "refused"]
    text: str
    advice: str
    """What mends it, if permission was refused."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    report: Report | None
    status: int
    """What `subprocess.Popen.returncode` says: negative numbers are signals."""
    late: bool
    """Whether it had to be killed."""
    stdout: str
    stderr: str


def kernel_test(
    *,
    features: Features = NO_FEATURES,
    user_mode_only: bool = False,
) -> Callable[[Callable[P, object]], Callable[P, None]]:
    """Let the body of a test, sync or async, run in a child process.

    Arguments (parameters, and fixtures whose value can be pickled) are handed over.  The child has
    `DEADLINE` seconds.  Without permission to open a userfaultfd, or without `features`, the test
    is skipped: see `require`.
    """

    def decorate(body: Callable[P, object]) -> Callable[P, None]:
        @functools.wraps(body)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            require(features, user_mode_only=user_mode_only)
            arguments = inspect.signature(body).bind(*args, **kwargs).arguments
            ended = run_child(f"{body.__module__}:{body.__qualname__}", arguments)
            judge(ended, body.__qualname__)

        mark = pytest.mark.kernel(user_mode_only=user_mode_only)
        marked: Callable[P, None] = mark(run)
        return marked

    return decorate


def run_child(what: str, arguments: dict[str, object], deadline: float = DEADLINE) -> Ended:
    """Run ``module:function`` with `arguments` in a child, which is gone when this returns."""
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as report,
    ):
        stdin.write(pickle.dumps(arguments))
        stdin.seek(0)
        # Files instead of pipes: what a grandchild holds open cannot keep us waiting.
        files = [file.fileno() for file in (stdin, stdout, stderr, report)]
        child = fork_server().fork(what, deadline, files)
        late = True
        try:
            late = not _ends_within(child.pid, deadline)
            if late:
                os.kill(child.pid, signal.SIGABRT)
                _ends_within(child.pid, _DUMP_SECONDS)
        finally:
            # Not reaped yet: the number still is the child's, and so is its process group.
            os.killpg(child.pid, signal.SIGKILL)
            status = child.reap()
        written = _text(report)
        return Ended(
            report=json.loads(written) if written else None,
            status=status,
            late=late,
            stdout=_text(stdout),
            stderr=_text(stderr),
        )


def judge(ended: Ended, name: str, deadline: float = DEADLINE) -> None:
    """Pass, skip or fail the running test, as its child ended."""
    print(ended.stdout, end="")
    print(ended.stderr, end="", file=sys.stderr)
    report = ended.report
    if ended.late:
        why = f"did not end within {deadline:g} s, and was killed"
    elif report is None:
        why = f"ended with {_status(ended.status)}, and without a report"
    elif report["outcome"] == "skipped":
        pytest.skip(report["text"])
    elif report["outcome"] == "refused":
        unavailable(report["text"], report["advice"])
    elif report["outcome"] == "failed":
        why = f"failed in its child process:\n{report['text']}"
    elif ended.status != 0:
        why = f"passed, but ended with {_status(ended.status)}"
    else:
        return
    if report is None or ended.late:
        why += f"; its standard error:\n{ended.stderr}"
    pytest.fail(f"{name} {why}", pytrace=False)


def _ends_within(pid: int, seconds: float) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
