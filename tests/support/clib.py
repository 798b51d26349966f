"""helpers.c, compiled for the tests and called through ctypes, which lets go of the GIL."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("helpers.c")


def compiler() -> str | None:
    """Where there is a C compiler."""
    return shutil.which("cc") or shutil.which("gcc")


def build(directory: Path) -> Path:
    """Compile the library into `directory`."""
    library = directory / "helpers.so"
    found = compiler()
    assert found is not None
    options = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run([found, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


class Helpers:
    """The functions of the library."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._touch = loaded.touch
        self._touch.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self._fork_and_read = loaded.fork_and_read
        self._fork_and_read.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_int,
        ]
        self._fork_and_read.restype = ctypes.c_long
        self._fork_often = loaded.fork_often
        self._fork_often.argtypes = [ctypes.c_long]
        self._fork_often.restype = ctypes.c_long
        self._discard_until = loaded.discard_until
        self._discard_until.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p]
        self._discard_until.restype = ctypes.c_long
        self._increment = loaded.increment
        self._increment.argtypes = [ctypes.c_uint64] * 5 + [ctypes.c_void_p]

    def touch(self, address: int, *, write: bool = False) -> int:
        """Touch one byte; return 0, or the si_code of the SIGBUS that came of it."""
        return int(self._touch(address, write))

    def fork_and_read(self, addresses: list[int], go: int, out: int) -> int:
        """Fork a child that writes the first word of each page to `out` once it can read a byte
        from `go`, and ends with the next one; return its process id."""
        array = (ctypes.c_uint64 * len(addresses))(*addresses)
        child = int(self._fork_and_read(array, len(addresses), go, out))
        assert child > 0, "fork"
        return child

    def fork_often(self, rounds: int) -> int:
        """Fork children that end at once, one after the other; return how many there were."""
        return int(self._fork_often(rounds))

    def discard_until(self, start: int, length: int, stop: ctypes.c_int) -> int:
        """Discard a range again and again until `stop` is not 0; return how often."""
        return int(self._discard_until(start, length, ctypes.addressof(stop)))

    def increment(
        self,
        start: int,
        page_size: int,
        rounds: int,
        seed: int,
        added: ctypes.Array[ctypes.c_uint64],
    ) -> None:
        """Add 1 to the first word of a random page, `rounds` times, and to its word in `added`."""
        self._increment(start, page_size, len(added), rounds, seed, ctypes.addressof(added))
