"""Runs probes that fail in every way, and prints the result of each."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from tests.support.deadline import DEADLINE
from uffdaemon.check.isolation import Probe, attempt
from uffdaemon.errors import PermissionRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdaemon.check.facts import Json


def works() -> Mapping[str, Json]:
    return {"answer": 42}


def hangs() -> Mapping[str, Json]:
    while True:
        signal.pause()


def raises() -> Mapping[str, Json]:
    raise RuntimeError("a bug")


def is_refused() -> Mapping[str, Json]:
    raise PermissionRefused(1, "userfaultfd", advice="ask root")


def meets_an_os_error() -> Mapping[str, Json]:
    return {"read": len(os.read(-1, 1))}


def is_killed() -> Mapping[str, Json]:
    os.kill(os.getpid(), signal.SIGSYS)
    return {}


def would_dump_core() -> Mapping[str, Json]:
    return {"limit": resource.getrlimit(resource.RLIMIT_CORE)[0]}


def exits_silently() -> Mapping[str, Json]:
    os._exit(3)


def returns_much() -> Mapping[str, Json]:
    return {"text": "x" * 200_000}


def returns_what_json_cannot_encode() -> Mapping[str, Json]:
    return {"set": {1, 2}}  # type: ignore[dict-item]


PROBES: list[Probe] = [
    works,
    hangs,
    raises,
    is_refused,
    meets_an_os_error,
    is_killed,
    would_dump_core,
    exits_silently,
    returns_much,
    returns_what_json_cannot_encode,
]

if __name__ == "__main__":
    sys.stdout.write("printed once\n")
    for probe in PROBES:
        made = attempt(probe, deadline=0.5 if probe is hangs else DEADLINE / 2)
        sys.stdout.write(
            json.dumps({"name": getattr(probe, "__name__", ""), **asdict(made)}) + "\n"
        )
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        sys.stdout.write("no child is left\n")
