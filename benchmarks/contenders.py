"""Everybody who takes part in benchmarks/everybody.py: who can, and why the others cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from benchmarks.build import ROOT, program
from benchmarks.peers import building
from benchmarks.peers.building import Absent
from benchmarks.turns import (
    DEADLINE,
    Client,
    Cores,
    Seen,
    Side,
    TurnFailed,
    image_for,
    ours,
    parse_seen,
    rereading,
    sleeping,
)
from uffdaemon.daemon.entry import REREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

KERNEL = "the kernel, anonymous memory"
FILE = "the kernel, a cached file mapped"
SLEEPING = "C poll+read+COPY"
REREADING = f"C re-reading {REREADS} times"
SPINNING = "C spinning on a core of its own"
SIGBUS = "C, a handler of SIGBUS"
LOOP = "uffdaemon, in trio's sleep"
THREAD = "uffdaemon, resolver thread"
THREAD_INSIDE = "uffdaemon, resolver thread, own process"
IN_THREAD = "uffdaemon, in-thread"
NUMPY = "uffdaemon, in-thread, from numpy"
RUST = "userfaultfd-rs"
RUST_REREADING = f"userfaultfd-rs, re-reading {REREADS} times"
GO = "Go, on x/sys/unix"
FUSE = "pyfuse3, mmap"
UMAP = "LLNL umap"

NO_HANDLER = (KERNEL, FILE, SIGBUS, IN_THREAD, NUMPY)
"""Where the thread that faults is the one that answers, or the kernel is."""
ONE_THREAD = (NUMPY, SPINNING)
"""Who cannot be measured with several threads: the GIL is one, and the spinner wants a core."""
PEERS = (RUST, GO, FUSE, UMAP)
"""Whom we are to be as fast as."""

SPINS = 100_000
"""So many reads without a yield take longer than anything between two faults."""
PROBE = Client(pages=320, warm=64)


@dataclass(frozen=True, slots=True)
class Alone(Side):
    """A side that faults itself: a program that takes the toucher's options."""

    with_image: bool = True
    with_handler: bool = False
    """Whether it also has threads that answer."""

    def answer(self, client: Client, cores: Cores, image: int) -> Seen:
        """Fault and answer, in one process."""
        command = [*self.command, *client.arguments(), *cores.client_words()]
        if self.with_image:
            command += ["--image", f"/proc/self/fd/{image}"]
        if self.with_handler:
            command += cores.handler_words("--handler-cpu")
        return _touch(self.name, command, image)


@dataclass(frozen=True, slots=True)
class Mounted(Side):
    """A side that serves a filesystem, in which the toucher maps the image."""

    python_path: Path

    def answer(self, client: Client, cores: Cores, image: int) -> Seen:
        """Mount, touch, unmount."""
        with (
            tempfile.TemporaryDirectory(prefix="benchmark-") as directory,
            self._mounted(directory, cores, image),
        ):
            command = [str(program("toucher")), *client.arguments(), *cores.client_words()]
            return _touch(self.name, [*command, "--image", f"{directory}/image"], image)

    @contextmanager
    def _mounted(self, directory: str, cores: Cores, image: int) -> Iterator[None]:
        command = [*self.command, "--image", f"/proc/self/fd/{image}", "--mount", directory]
        with subprocess.Popen(
            [*command, *cores.handler_words()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(self.python_path)},
            pass_fds=[image],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as server:
            try:
                if not _line(server.stdout):
                    _, complaint = server.communicate(timeout=DEADLINE)
                    raise TurnFailed(f"{self.name}: {_last_line(complaint)}")
                yield
                # The end of its input is the end; it unmounts.
                server.communicate(timeout=DEADLINE)
            finally:
                if server.poll() is None:
                    server.kill()
                    # A filesystem without a server would stay.
                    subprocess.run(["umount", "--lazy", directory], check=False)  # noqa: S607


def _line(output: IO[bytes] | None) -> bytes:
    return output.readline() if output is not None else b""


def _last_line(complaint: bytes) -> str:
    lines = complaint.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


def _touch(name: str, command: Sequence[str], image: int) -> Seen:
    try:
        done = subprocess.run(
            command, cwd=ROOT, pass_fds=[image], capture_output=True, timeout=DEADLINE, check=False
        )
    except subprocess.SubprocessError as error:
        raise TurnFailed(f"{name}: {error}") from error
    if done.returncode != 0:
        raise TurnFailed(f"{name}: status {done.returncode}: {_last_line(done.stderr)}")
    seen = parse_seen(done.stdout)
    if seen["wrong"]:
        raise TurnFailed(f"{name}: {seen['wrong']} wrong pages")
    return seen


def _in_process(name: str, resolver: str, *more: str) -> Side:
    command = (sys.executable, "-m", "benchmarks.in_process", "--resolver", resolver, *more)
    return Alone(name, command, with_handler=True)


def _rust(*more: str) -> tuple[str, ...]:
    return (str(building.rust()), *more)


MAKERS: dict[str, Callable[[], Side]] = {
    KERNEL: lambda: Alone(KERNEL, (str(program("toucher")),), with_image=False),
    FILE: lambda: Alone(FILE, (str(program("toucher")),)),
    SLEEPING: sleeping,
    REREADING: lambda: rereading(REREADS),
    SPINNING: lambda: Side(SPINNING, (*rereading(SPINS).command, "--pause", "pause")),
    SIGBUS: lambda: Alone(SIGBUS, (str(program("sigbus")),)),
    LOOP: lambda: Side(LOOP, ours().command),
    THREAD: lambda: Side(THREAD, ours("--resolver", "thread").command),
    THREAD_INSIDE: lambda: _in_process(THREAD_INSIDE, "thread"),
    IN_THREAD: lambda: _in_process(IN_THREAD, "in-thread"),
    NUMPY: lambda: _in_process(NUMPY, "in-thread", "--numpy"),
    RUST: lambda: Side(RUST, _rust()),
    RUST_REREADING: lambda: Side(RUST_REREADING, _rust("--rereads", str(REREADS))),
    GO: lambda: Side(GO, (str(building.go()),)),
    FUSE: lambda: Mounted(
        FUSE, (sys.executable, "-m", "benchmarks.peers.fuse"), building.pyfuse3()
    ),
    UMAP: lambda: Alone(UMAP, (str(building.umap()),), with_handler=True),
}
"""How each is built, by its name."""


def reason(name: str, error: Exception) -> str:
    """What is wrong, in a line: the last one, since a complaint may be a whole traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{name}: ")


def gather(cores: Cores) -> tuple[dict[str, Side], dict[str, str]]:
    """Build everybody, and let everybody answer once: the sides that can, and for the others the
    reason why they cannot, by name."""
    able: dict[str, Side] = {}
    reasons: dict[str, str] = {}
    with image_for(PROBE) as image:
        for name, make in MAKERS.items():
            try:
                side = make()
                side.answer(PROBE, cores, image)
            except (Absent, TurnFailed) as error:
                reasons[name] = reason(name, error)
                continue
            able[name] = side
    return able, reasons
