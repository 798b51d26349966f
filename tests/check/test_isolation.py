from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.check import children
from tests.support.descriptors import open_descriptors
from uffdaemon.check import isolation


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    done = children.run("tests.check.odd_probes")
    assert done.stderr == ""
    first, *attempts, last = done.stdout.splitlines()
    # A child that ran on, or flushed what its parent had printed, would show here.
    assert (first, last) == ("printed once", "no child is left")
    return {attempt.pop("name"): attempt for attempt in map(json.loads, attempts)}


def test_what_works_brings_details(made: dict[str, Any]) -> None:
    assert made["works"]["worked"]
    assert made["works"]["details"] == {"answer": 42}


def test_what_hangs_is_killed_in_time(made: dict[str, Any]) -> None:
    assert not made["hangs"]["worked"]
    assert made["hangs"]["text"] == "no result within 0.5 seconds"


def test_what_raises_is_told(made: dict[str, Any]) -> None:
    assert made["raises"]["text"] == "RuntimeError: a bug"
    assert made["raises"]["number"] == 0


def test_a_refusal_keeps_its_errno_and_leaves_the_advice_to_the_finding(
    made: dict[str, Any],
) -> None:
    assert made["is_refused"]["number"] == 1
    assert made["is_refused"]["text"] == "userfaultfd: EPERM (Operation not permitted)"
    assert made["meets_an_os_error"]["number"] == 9


def test_a_signal_is_told(made: dict[str, Any]) -> None:
    assert made["is_killed"]["text"] == "killed by SIGSYS"
    assert made["is_killed"]["signal"] == 31


def test_no_core_is_dumped(made: dict[str, Any]) -> None:
    assert made["would_dump_core"]["details"] == {"limit": 0}


def test_silence_is_told(made: dict[str, Any]) -> None:
    assert not made["ends_silently"]["worked"]
    assert made["ends_silently"]["text"] == "exited without a result"


def test_a_long_answer_arrives(made: dict[str, Any]) -> None:
    assert len(made["says_a_lot"]["details"]["text"]) == 200_000


def test_an_answer_that_cannot_be_told_is_told_as_such(made: dict[str, Any]) -> None:
    attempt = made["says_what_json_has_no_word_for"]
    assert not attempt["worked"]
    assert "TypeError" in attempt["text"]


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    descriptors = open_descriptors()
    made = isolation.attempt(dict)
    assert made.text.startswith("no child process: ")
    assert open_descriptors() == descriptors


def test_no_descriptor_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", no_pipe)
    assert isolation.attempt(dict).text.startswith("no pipe to a child process: ")
