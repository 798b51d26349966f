"""Wheels for machines without a compiler: one for each architecture, for CPython 3.11 and later.

Run by ``make wheels``.  Zig's C compiler comes as a Python package with the headers of every glibc,
so that neither a container nor a cross-compiler is needed.  The wheels are then checked:

- auditwheel names the oldest glibc that has every versioned symbol (manylinux);
- abi3audit looks for symbols that Python's stable ABI does not promise;
- symbols that nobody provides are looked for here: the linker lets them pass in a shared library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Final

GLIBC: Final = "2.31"
"""Debian 11's and Ubuntu 20.04's, the oldest that run with Linux 5.11 or later; C takes 2.30."""
ARCHITECTURES: Final = ("x86_64", "aarch64")
BIN: Final = Path(sys.executable).parent
HEADERS: Final = Path("build/headers/usr/include")
"""Where tools/preflight.sh puts Python.h if the machine has none."""

TYPES: Final = {
    "DOUBLE": "double",
    "FLOAT": "float",
    "FPOS_T": "fpos_t",
    "INT": "int",
    "LONG": "long",
    "LONG_DOUBLE": "long double",
    "LONG_LONG": "long long",
    "MAX_ALIGN_T": "max_align_t",
    "OFF_T": "off_t",
    "PID_T": "pid_t",
    "PTHREAD_KEY_T": "pthread_key_t",
    "PTHREAD_T": "pthread_t",
    "SHORT": "short",
    "SIZE_T": "size_t",
    "TIME_T": "time_t",
    "UINTPTR_T": "uintptr_t",
    "VOID_P": "void *",
    "WCHAR_T": "wchar_t",
    "_BOOL": "_Bool",
}
"""What pyconfig.h's SIZEOF_... and ALIGNOF_... are sizes of."""


def compiler(architecture: str) -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-gnu.{GLIBC}"]


def run(command: list[str], **environment: str) -> str:
    """Standard output; ends the program with what was printed if the command fails."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    ended = subprocess.run(
        command,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}")
    return ended.stdout


def python_headers(where: Path) -> None:
    """Copy Python's headers, with this machine's pyconfig.h as one flat list of macros.

    Debian's includes another file, by architecture.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    roots = (Path(sysconfig.get_path("include")).parent, HEADERS)
    root = next((root for root in roots if (root / version / "Python.h").exists()), None)
    if root is None:
        sys.exit(f"no Python.h in {' or '.join(str(root / version) for root in roots)}")
    shutil.copytree(root / version, where)
    host = compiler(os.uname().machine)
    search = ["-nostdinc", f"-I{root / version}", f"-I{root}"]
    source = str(root / version / "pyconfig.h")
    macros = run([*host, *search, "-E", "-dM", source]).splitlines()
    builtin = set(run([*host, "-nostdinc", "-E", "-dM", "-x", "c", os.devnull]).splitlines())
    flat = [line for line in macros if line not in builtin]
    (where / "pyconfig.h").write_text("\n".join(["#pragma once", *flat, ""]))


def check_headers(headers: Path, architecture: str) -> None:
    """Compile assertions that this machine's pyconfig.h holds for `architecture`, too."""
    lines = ["#define Py_LIMITED_API 0x030b0000", "#include <Python.h>"]
    lines += [f"#include <{name}.h>" for name in ("pthread", "stdint", "stdio", "time", "unistd")]
    text = (headers / "pyconfig.h").read_text()
    for kind, name in re.findall(r"^#define (SIZE|ALIGN)OF_(\w+) ", text, re.MULTILINE):
        of = "sizeof" if kind == "SIZE" else "_Alignof"
        lines.append(f'_Static_assert({kind}OF_{name} == {of}({TYPES[name]}), "{name}");')
    big = int("#define WORDS_BIGENDIAN" in text)
    order = "__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__"
    lines.append(f'_Static_assert(({order}) == {big}, "byte order");')
    source = headers.parent / f"headers-{architecture}.c"
    source.write_text("\n".join([*lines, ""]))
    command = [*compiler(architecture), "-std=gnu11", f"-I{headers}", "-Werror", "-c", str(source)]
    run([*command, "-o", str(source.with_suffix(".o"))])


def unprovided(library: Path) -> list[str]:
    """Symbols that neither Python nor a version of glibc is asked for."""
    found: list[str] = []
    for line in run(["readelf", "--dyn-syms", "--wide", str(library)]).splitlines():
        match line.split():
            case [_, _, _, _, "GLOBAL", _, "UND", name, *_] if "@" not in name:
                found.append(name)
            case _:
                pass
    return [name for name in found if not name.startswith(("Py", "_Py"))]


def build(architecture: str, headers: Path, work: Path, out: Path) -> Path:
    """Build a wheel from a fresh sdist, check it, and put it into `out`."""
    check_headers(headers, architecture)
    command = " ".join(compiler(architecture))
    run(
        [
            str(BIN / "pyproject-build"),
            f"--outdir={work}",
            f"-C--build-option=--plat-name=linux_{architecture}",
        ],
        CC=command,
        LDSHARED=f"{command} -shared",
        CFLAGS=f"-I{headers} -g0",
        C_INCLUDE_PATH="",
    )
    [built] = work.glob("*.whl")
    # "auto": by name, auditwheel knows the tags of its own architecture only.
    repair = ["repair", "--plat", "auto", "--only-plat", f"--wheel-dir={out}", str(built)]
    run([str(BIN / "auditwheel"), *repair])
    [wheel] = out.glob(f"*manylinux*_{architecture}.whl")
    run([str(BIN / "abi3audit"), "--strict", str(wheel)])
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".so"))
        missing = unprovided(Path(archive.extract(name, work)))
    if missing:
        sys.exit(f"{wheel.name}: nobody provides {', '.join(missing)}")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds and checks wheels.")
    parser.add_argument("out", type=Path, help="directory for the wheels and the sdist")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        headers = Path(directory, "include")
        python_headers(headers)
        for architecture in ARCHITECTURES:
            print(build(architecture, headers, Path(directory, architecture), out))
        [sdist] = Path(directory, ARCHITECTURES[0]).glob("*.tar.gz")
        print(shutil.copy(sdist, out))


if __name__ == "__main__":
    main()
