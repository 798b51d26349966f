"""Programs that end while they guard memory, in one way or another: each does end, and says why
where that is not what it was meant to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.hangs.ending import PROGRAMS
from tests.kernel.harness import kernel_test
from uffdaemon import Watchdog

_LEFT_WAITING = "thread left waiting"
_NO_LINE = ""
_REFUSED_AND_TOLD = (
    r"(.*thread that runs trio.*\n){4}no buffer of ours.*\n"
    r"(.*\n)*.*in the_loops_thread_touches_what_it_answers_for"
)

_ENDINGS: dict[str, tuple[int, str]] = {
    "a_thread_ends_in_the_middle": (0, "LookupError: in the middle"),
    "the_block_raises_under_a_reader": (1, "read\n(.*\n)*.*LookupError: in the block"),
    "main_exits_in_the_middle": (3, _NO_LINE),
    "main_exits_with_a_daemon_thread_waiting": (3, _LEFT_WAITING),
    "main_exits_with_a_daemon_thread_waiting_in_native": (3, _LEFT_WAITING),
    "main_exits_with_a_thread_waiting_that_is_poisoned": (-signal.SIGBUS, "Bus error"),
    "main_exits_with_a_thread_waiting_whose_memory_is_closed": (-signal.SIGSEGV, _LEFT_WAITING),
    "the_loops_thread_touches_native_memory": (0, _NO_LINE),
    "the_loops_thread_touches_what_it_answers_for": (Watchdog.STATUS, _REFUSED_AND_TOLD),
    "the_daemon_ends_under_a_buffer": (-signal.SIGBUS, "uffdaemon.*"),
    "the_daemon_ends_under_a_buffer_in_thread": (-signal.SIGBUS, "uffdaemon.*"),
    "the_daemon_ends_under_a_buffer_and_poisons": (-signal.SIGBUS, "uffdaemon.*"),
    "the_daemon_ends_under_a_buffer_that_is_complete": (0, "there: True"),
}
"""By program: its status (negative: a signal), and what is found in what it wrote."""


@pytest.mark.parametrize("name", _ENDINGS)
@kernel_test()
def test_programs_end(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-m", "tests.hangs.ending", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    status, line = _ENDINGS[name]
    assert re.search(line, ended.stdout), ended.stdout
    assert ended.returncode == status, ended.stdout


def test_every_program_has_its_ending() -> None:
    assert list(PROGRAMS) == list(_ENDINGS)
