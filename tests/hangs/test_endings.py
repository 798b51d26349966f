"""Programs that end while they guard memory, in one way or another: each does end, and says why
where that is not what it was meant to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.hangs.ending import PROGRAMS, WAYS, Way
from tests.support.kernel_tests import kernel_test
from uffdaemon import Watchdog
from uffdaemon.lowlevel import Features


@dataclass(frozen=True)
class Ending:
    """The status (negative: a signal), what is found in what was written, and for whom."""

    status: int
    text: str = ""
    ways: tuple[Way, ...] = WAYS


_PLAIN: tuple[Way, ...] = ("thread", "in-thread", "external")
_HELD: tuple[Way, ...] = ("thread", "external", "in_process")
"""Where a thread that waits goes on waiting; with "in-thread", it goes on into SIGBUS."""

_LEFT_WAITING = "thread left waiting"
_ENDED = r"uffdaemon: thread \d+ .*the daemon that served this memory has ended"
_LEFT = rf"(?s){_LEFT_WAITING}.*{_ENDED}"
_TOLD = r"uffdaemon: thread \d+ has waited(.*\n)*.*in {}\n"
_BUS_ERROR = r"Fatal Python error: Bus error\n(.*\n)*.*in {}\n"
_REFUSED = r"(.*this thread runs trio.*\n){4}no buffer of ours.*\n"

_ENDINGS: dict[str, list[Ending]] = {
    "a_thread_ends_in_the_middle": [
        Ending(0, "LookupError: in the middle", _PLAIN),
        Ending(0, "LookupError: in the middle", ("in_process",)),
    ],
    "a_worker_exits_in_the_middle": [Ending(3)],
    "the_block_raises_under_a_reader": [Ending(1, r"read\n(.*\n)*.*LookupError: in the block")],
    "main_exits_in_the_middle": [Ending(3)],
    "main_exits_with_an_array_at_hand": [Ending(3, r"\A\Z", _PLAIN)],
    "main_is_interrupted": [Ending(-signal.SIGINT, "KeyboardInterrupt")],
    "main_exits_with_a_daemon_thread_waiting": [
        Ending(3, _LEFT_WAITING, _HELD),
        Ending(-signal.SIGBUS, _ENDED, ("in-thread",)),
    ],
    "main_exits_with_a_daemon_thread_waiting_and_takes_long": [
        Ending(Watchdog.STATUS, _LEFT, _HELD)
    ],
    "main_exits_with_a_thread_waiting_that_is_poisoned": [Ending(-signal.SIGBUS, "Bus error")],
    "main_exits_with_a_thread_waiting_whose_memory_is_closed": [
        Ending(-signal.SIGSEGV, _LEFT_WAITING, _HELD),
        Ending(-signal.SIGBUS, _ENDED, ("in-thread",)),
    ],
    "main_exits_with_a_thread_waiting_and_is_ended": [
        Ending(Watchdog.STATUS, _LEFT, _HELD),
        Ending(-signal.SIGBUS, _ENDED, ("in-thread",)),
    ],
    "main_exits_with_a_thread_waiting_and_poisons": [Ending(-signal.SIGBUS, _LEFT, _HELD)],
    "main_exits_with_a_thread_waiting_and_hangs": [Ending(-signal.SIGKILL, _LEFT, _HELD)],
    "main_exits_with_a_thread_waiting_and_nobody_reads_of_it": [
        Ending(Watchdog.STATUS, _LEFT_WAITING, _HELD)
    ],
    "the_loops_thread_touches": [Ending(0, "", _PLAIN)],
    "the_loops_thread_touches_what_it_answers_for": [
        Ending(
            Watchdog.STATUS,
            _REFUSED + _TOLD.format("the_loops_thread_touches_what_it_answers_for"),
            ("in_process",),
        )
    ],
    "a_page_that_cannot_be_had_is_poisoned": [
        Ending(
            -signal.SIGBUS,
            _BUS_ERROR.format("a_page_that_cannot_be_had_is_poisoned"),
            ("thread", "in-thread"),
        )
    ],
    "a_policy_that_fails_has_the_page_poisoned": [
        Ending(
            -signal.SIGBUS,
            r"reports; logging on its behalf:\n(.*\n)*.*LookupError: no such page",
            ("external",),
        )
    ],
    "a_page_is_poisoned_by_a_rule": [Ending(-signal.SIGBUS, "Bus error", _PLAIN)],
    "a_page_is_poisoned_by_python": [Ending(-signal.SIGBUS, "Bus error")],
    "a_page_was_poisoned_before": [Ending(-signal.SIGBUS, "Bus error", _PLAIN)],
    "a_page_is_poisoned_by_the_watchdog": [
        Ending(
            -signal.SIGBUS,
            _TOLD.format("a_page_is_poisoned_by_the_watchdog"),
            ("thread", "in-thread", "in_process"),
        )
    ],
    "memory_of_somebody_elses_is_lost": [
        Ending(
            -signal.SIGBUS,
            _BUS_ERROR.format("memory_of_somebody_elses_is_lost"),
            ("thread", "in-thread"),
        )
    ],
    "the_interpreter_ends_while_the_daemon_serves": [
        Ending(0, "there: True", _PLAIN),
        Ending(Watchdog.STATUS, _TOLD.format("__del__"), ("in_process",)),
    ],
    "the_daemon_ends_under_a_buffer": [Ending(-signal.SIGBUS, _ENDED, _PLAIN)],
    "the_daemon_ends_under_a_buffer_and_poisons": [Ending(-signal.SIGBUS, _ENDED, _PLAIN)],
    "the_daemon_ends_under_a_buffer_that_is_complete": [Ending(0, "there: True", _PLAIN)],
}


@pytest.mark.parametrize("name", _ENDINGS)
@kernel_test(features=Features.SIGBUS)
def test_programs_end(name: str) -> None:
    """The ways side by side."""
    running = [(way, ending, _start(name, way)) for ending in _ENDINGS[name] for way in ending.ways]
    ended = [(way, ending, *_end(process, ending)) for way, ending, process in running]
    for way, ending, status, text in ended:
        assert re.search(ending.text, text), (way, status, text)
        assert status == ending.status, (way, status, text)


def _start(name: str, way: Way) -> subprocess.Popen[bytes]:
    python = [sys.executable, "-X", "faulthandler", "-W", "error"]
    return subprocess.Popen(
        [*python, "-m", "tests.hangs.ending", name, way],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _end(process: subprocess.Popen[bytes], ending: Ending) -> tuple[int, str]:
    """Wait for the end; one that is to hang is killed once it has said so."""
    assert process.stdout is not None
    text, killed = b"", False
    while more := os.read(process.stdout.fileno(), 65536):
        text += more
        hangs = ending.status == -signal.SIGKILL and not killed
        if hangs and re.search(ending.text, text.decode()):
            assert process.poll() is None
            process.kill()
            killed = True
    return process.wait(), text.decode()


def test_every_program_has_its_ending() -> None:
    assert list(PROGRAMS) == list(_ENDINGS)
