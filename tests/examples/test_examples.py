"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.kernel


def run(name: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout.splitlines()


def test_custom_policy() -> None:
    assert run("custom_policy.py") == ["page   42"]


def test_the_custom_policy_is_no_longer_than_promised() -> None:
    source = (EXAMPLES / "custom_policy.py").read_text()
    start = source.index("def page_numbers")
    policy = source[start : source.index("async def main")]
    assert len(policy.strip().splitlines()) <= 15


def test_access_trace_is_recorded_and_replayed_without_a_fault() -> None:
    recorded, replayed = run("access_trace.py")
    assert recorded == "recorded: 13 faults, pages 3 5 8 13 21 34 55 89 144 233 377 610 987"
    assert replayed == "replayed: 0 faults"


def test_service_answers_from_pages_that_it_fetched() -> None:
    *answers, statistics = run("service.py")
    assert answers == [
        "7 -> 7: record 7",
        "8 -> 8: record 8",
        "4095 -> 4095: record 4095",
        "oops -> error: no record 'oops'",
    ]
    figures = json.loads(statistics.removeprefix("statistics -> "))
    assert figures == {"faults": {"missing": {"copied": 2}}, "bytes": {"copied": 2 * 16384}}


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"custom_policy.py", "access_trace.py", "service.py", "lazy_restore.py"}
