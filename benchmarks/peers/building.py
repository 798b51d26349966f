"""Builds the peers, as far as that is possible here, under build/peers.

Each is built with what its own world has: cargo, go, pip, gcc.  They fetch what they need from
their registries once.  What is lacking is raised as `Absent`, a line that says how to get it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.build import FLAGS, ROOT, SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).resolve().parent
OUTPUT = ROOT / "build" / "peers"
PATIENCE = 600.0
"""Seconds that one build may take."""


class Absent(Exception):
    """A peer cannot be built or run here, for a reason that fits in a line."""


def _run(
    what: str, command: Sequence[str], *, cwd: Path = ROOT, environment: Mapping[str, str] = {}
) -> None:
    """Run a step of a build, its output kept in a file.  Raises `Absent`."""
    if shutil.which(command[0]) is None:
        raise Absent(f"there is no {command[0]}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    log = OUTPUT / f"{what}.log"
    print(f"building {what}", file=sys.stderr)
    with log.open("wb") as output:
        try:
            subprocess.run(
                command,
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise Absent(f"{what} does not build: {error}; see {log.relative_to(ROOT)}") from error


def _newer(target: Path, *sources: Path) -> bool:
    return target.exists() and target.stat().st_mtime_ns > max(
        path.stat().st_mtime_ns for path in sources
    )


def _from_pip(project: str, *options: str) -> Path:
    """A directory with one project from PyPI, apart from our own environment."""
    target = OUTPUT / "python" / project
    if not target.exists():
        fresh = target.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        _run(project, [*pip, *options, "--target", str(fresh), project])
        fresh.rename(target)
    return target


def _libclang() -> Mapping[str, str]:
    """The environment in which bindgen, with which the crate reads the kernel's header, finds
    libclang: the system's, or the one that PyPI has, with gcc's headers beside it."""
    if "LIBCLANG_PATH" in os.environ or any(Path("/usr/lib").glob("**/libclang.so")):
        return {}
    library = _from_pip("libclang") / "clang" / "native"
    asked = subprocess.run(
        ["gcc", "-print-file-name=include"],  # noqa: S607
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    headers = f"-isystem {asked.stdout.strip()}"
    return {"LIBCLANG_PATH": str(library), "BINDGEN_EXTRA_CLANG_ARGS": headers}


@cache
def rust() -> Path:
    """The handler on the crate userfaultfd.  Raises `Absent`."""
    source = HERE / "rust"
    target = OUTPUT / "rust" / "release" / "peer"
    if not _newer(target, *source.glob("Cargo.*"), *source.glob("src/*")):
        if shutil.which("cargo") is None:
            raise Absent("there is no cargo; it comes with Rust")
        command = ["cargo", "build", "--release", "--locked", "--target-dir", str(OUTPUT / "rust")]
        _run("userfaultfd-rs", command, cwd=source, environment=_libclang())
        target.touch()
    return target


@cache
def go() -> Path:
    """The handler in Go.  Raises `Absent`."""
    source = HERE / "go"
    target = OUTPUT / "go-peer"
    if not _newer(target, *source.iterdir()):
        if shutil.which("go") is None:
            raise Absent("there is no go")
        # The toolchain that is here, or none.
        _run(
            "go",
            ["go", "build", "-trimpath", "-o", str(target), "."],
            cwd=source,
            environment={"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
        )
    return target


@cache
def pyfuse3() -> Path:
    """Where pyfuse3 can be imported from.  Raises `Absent`."""
    if not Path("/dev/fuse").exists():
        raise Absent("there is no /dev/fuse")
    if not (OUTPUT / "python" / "pyfuse3").exists():
        try:
            subprocess.run(["pkg-config", "--exists", "fuse3"], check=True)  # noqa: S607
        except (subprocess.SubprocessError, OSError) as error:
            needed = "pyfuse3 is compiled against libfuse3: apt install libfuse3-dev pkg-config"
            raise Absent(needed) from error
    return _from_pip("pyfuse3")


@cache
def umap() -> Path:
    """The program that maps with LLNL umap, if UMAP_PREFIX says where that is installed.  Raises
    `Absent`."""
    prefix = os.environ.get("UMAP_PREFIX")
    if prefix is None:
        raise Absent("UMAP_PREFIX does not say where umap is installed")
    libraries = [path for path in (Path(prefix, "lib"), Path(prefix, "lib64")) if path.is_dir()]
    source = HERE / "umap" / "umap.c"
    target = OUTPUT / "umap-peer"
    if not _newer(target, source, *SOURCES.iterdir()):
        shared = [str(SOURCES / name) for name in ("touching.c", "options.c", "shared.c")]
        found = [word for path in libraries for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
        command = ["gcc", *FLAGS, f"-I{prefix}/include", "-o", str(target), str(source), *shared]
        _run("umap", [*command, *found, "-lumap"])
    return target
