"""The inside of a real-kernel test, which `tests.support.forkserver` has forked off.

Reads pickled arguments from standard input, runs the body, writes a report to the descriptor, and
leaves without looking back: a thread may still be waiting for a page.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import json
import os
import pickle
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.support.requirements import explain_refusal
from uffdaemon import Memory
from uffdaemon.errors import PermissionRefused

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from tests.support.kernel_tests import Report

_TESTS = str(Path(__file__).parents[1])
_OUTLIVED = 30.0  # seconds after which a child whose parent died ends by itself


def main(what: str, report: int, deadline: float) -> NoReturn:
    """Run ``module:function`` within about `deadline` seconds, and report to a descriptor."""
    os.set_inheritable(report, False)
    # Whoever runs the tests in the background of a shell has it ignored, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.dump_traceback_later(deadline + _OUTLIVED, exit=True)
    _keep_memory_on_failure()
    arguments = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    written = json.dumps(run(what, arguments)).encode()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, written)
    os._exit(0)


def _keep_memory_on_failure() -> None:
    """Unmapping under threads that wait would end the process before it can say what failed."""
    leave = Memory.__exit__

    def leave_unless_failing(
        self: Memory,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception):
            leave(self, kind, error, trace)

    Memory.__exit__ = leave_unless_failing  # type: ignore[method-assign]


def run(what: str, arguments: dict[str, object]) -> Report:
    """Run ``module:function``, which the harness has decorated."""
    module, _, name = what.partition(":")
    try:
        body = inspect.unwrap(getattr(importlib.import_module(module), name))
        if inspect.iscoroutinefunction(body):
            import trio

            async def call() -> None:
                await body(**arguments)

            trio.run(call)
        else:
            body(**arguments)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent hears of it
        for leaf in _leaves(error):
            if isinstance(leaf, pytest.skip.Exception):
                return {"outcome": "skipped", "text": str(leaf), "advice": ""}
            if isinstance(leaf, PermissionRefused):
                text, advice = explain_refusal(leaf)
                return {"outcome": "refused", "text": text, "advice": advice}
        return {"outcome": "failed", "text": _explain(error), "advice": ""}
    return {"outcome": "passed", "text": "", "advice": ""}


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _explain(error: BaseException) -> str:
    """The traceback, and the variables of the innermost frame that belongs to the tests."""
    lines = traceback.format_exception(error)
    for leaf in _leaves(error):
        frame: FrameType | None = None
        for found, _ in traceback.walk_tb(leaf.__traceback__):
            if found.f_code.co_filename.startswith(_TESTS) and found.f_globals is not globals():
                frame = found
        if frame is not None:
            lines.append(f"where, in {frame.f_code.co_name}:\n")
            lines += (f"    {name} = {_short(value)}\n" for name, value in frame.f_locals.items())
    return "".join(lines)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a broken repr must not hide the failure
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
