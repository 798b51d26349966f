"""Runs the command in a process, reads its output, and finds what it leaves behind."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.support.deadline import DEADLINE
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORKER = re.compile(r"(?P<name>eager|lazy)(?P<rest>.*): worker (?P<pid>\d+)")


@dataclass
class Demo:
    """A running `uffdaemon demo`, which is killed if it does not exit in time."""

    process: subprocess.Popen[str]
    folder: Path
    """Its directory for temporary files."""
    errors: list[str] = field(default_factory=list)
    """The lines of standard error so far."""

    @property
    def stderr(self) -> IO[str]:
        assert self.process.stderr is not None
        return self.process.stderr

    def lines(self) -> Iterator[str]:
        """The lines of standard error as they arrive, to the end."""
        for line in self.stderr:
            self.errors.append(line.rstrip("\n"))
            yield self.errors[-1]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until a line of standard error matches the pattern."""
        for line in self.lines():
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the demo exited without printing {pattern!r}: {self.errors}")

    def end(self) -> int:
        """Wait until it has exited; returns its exit status."""
        for _ in self.lines():
            pass
        return self.process.wait()

    def report(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def leavings(self) -> list[str]:
        """Its worker processes, and the files in its directory."""
        return [*processes_naming(self.folder), *(path.name for path in self.folder.iterdir())]


@contextmanager
def demo(
    folder: Path,
    *arguments: str,
    command: Sequence[str] = (),
    module: Sequence[str] = ("uffdaemon",),
) -> Iterator[Demo]:
    """Start `uffdaemon demo` with a directory of its own; nothing of it outlives the block.

    `command` runs it, and `module` is what Python runs before the word ``demo``.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    program = [*command, sys.executable, "-m", *module, "demo", *arguments]
    with subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    ) as process:
        old = signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.setitimer(signal.ITIMER_REAL, DEADLINE)
        try:
            yield Demo(process, temporary)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
            process.kill()


def processes_naming(folder: Path) -> list[str]:
    """Processes whose command line names something in `folder`: workers name their socket."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word.startswith(os.fsencode(folder) + b"/") for word in words):
            found.append(f"process {entry.name}: {b' '.join(words).decode()}")
    return found


def wait_for_end(pidfd: int) -> None:
    """Wait until a process that is not our child has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(DEADLINE * 1000), "the process did not end"
