"""Runs the command in a child process with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.confined import CANNOT
from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN: Final = {"NO_COLOR", "TERM", "container", "KUBERNETES_SERVICE_HOST"}


def run(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in PLAIN}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def check(
    *confinement: str, environment: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """`uffdaemon check --json`, confined by these options.  Returns its exit status and output."""
    done = run(
        "tests.support.confined", *confinement, "--", "check", "--json", environment=environment
    )
    if done.returncode == CANNOT:
        pytest.skip(f"{' '.join(confinement)} is not possible here: {done.stderr.strip()}")
    assert done.stderr == "", done.stderr
    return done.returncode, json.loads(done.stdout)
