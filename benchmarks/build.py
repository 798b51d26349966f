"""Compiles the C programs when they are first needed, and again when their sources change."""

from __future__ import annotations

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "native"
OUTPUT = ROOT / "build" / "benchmarks"
FLAGS = shlex.split("-O2 -std=gnu11 -Wall -Wextra -Wconversion -Wshadow -pthread")
PROGRAMS = {
    "toucher": ("toucher.c", "client.c", "touching.c", "options.c", "shared.c"),
    "sigbus": ("sigbus.c", "client.c", "touching.c", "options.c", "shared.c"),
    "in_process.so": ("in_process.c", "touching.c", "options.c", "shared.c"),
    "yardstick": ("yardstick.c", "handed.c", "shared.c"),
    "moves.so": ("moves.c", "shared.c"),
    "steps.so": ("steps.c",),
}
SHARED = ("-shared", "-fPIC")


@cache
def program(name: str) -> Path:
    """The path of the compiled program or library `name`; without gcc this one ends with a line."""
    target = OUTPUT / name
    newest = max(path.stat().st_mtime_ns for path in SOURCES.iterdir())
    if target.exists() and target.stat().st_mtime_ns > newest:
        return target
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sources = [str(SOURCES / source) for source in PROGRAMS[name]]
    flags = [*FLAGS, *SHARED] if name.endswith(".so") else FLAGS
    try:
        subprocess.run(["gcc", *flags, "-o", str(target), *sources], check=True)  # noqa: S607
    except FileNotFoundError:
        sys.exit("benchmarks: there is no gcc; it is in the package gcc")
    return target
