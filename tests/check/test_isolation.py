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
    # A child that returned into the parent's code, or flushed its output, would show here.
    assert (first, last) == ("printed once", "no child is left")
    return {attempt.pop("name"): attempt for attempt in map(json.loads, attempts)}


def test_details_are_returned(made: dict[str, Any]) -> None:
    assert made["works"]["worked"]
    assert made["works"]["details"] == {"answer": 42}


def test_a_probe_that_hangs_is_killed_in_time(made: dict[str, Any]) -> None:
    assert not made["hangs"]["worked"]
    assert made["hangs"]["text"] == "no result within 0.5 seconds"


def test_an_exception_is_reported(made: dict[str, Any]) -> None:
    assert made["raises"]["text"] == "RuntimeError: a bug"
    assert made["raises"]["number"] == 0


def test_a_refusal_keeps_its_errno_without_the_advice(
    made: dict[str, Any],
) -> None:
    assert made["is_refused"]["number"] == 1
    assert made["is_refused"]["text"] == "userfaultfd: EPERM (Operation not permitted)"
    assert made["meets_an_os_error"]["number"] == 9


def test_a_signal_is_reported(made: dict[str, Any]) -> None:
    assert made["is_killed"]["text"] == "killed by SIGSYS"
    assert made["is_killed"]["signal"] == 31


def test_no_core_is_dumped(made: dict[str, Any]) -> None:
    assert made["would_dump_core"]["details"] == {"limit": 0}


def test_an_exit_without_a_result_is_reported(made: dict[str, Any]) -> None:
    assert not made["exits_silently"]["worked"]
    assert made["exits_silently"]["text"] == "exited without a result"


def test_a_long_result_is_read_completely(made: dict[str, Any]) -> None:
    assert len(made["returns_much"]["details"]["text"]) == 200_000


def test_a_result_that_cannot_be_encoded_is_reported(made: dict[str, Any]) -> None:
    attempt = made["returns_what_json_cannot_encode"]
    assert not attempt["worked"]
    assert "TypeError" in attempt["text"]


def test_fork_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    descriptors = open_descriptors()
    made = isolation.attempt(dict)
    assert made.text.startswith("no child process: ")
    assert open_descriptors() == descriptors


def test_pipe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", no_pipe)
    assert isolation.attempt(dict).text.startswith("no pipe to a child process: ")
