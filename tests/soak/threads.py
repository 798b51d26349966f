"""The C side of the soak test: compiled when it is needed, its threads run without the GIL."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import clib
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
WRITERS = 4
HOT, COLD, DIRECT, RING = 0, 1, 3, 4
PAGES = 5
PATTERN = 0x6B6D656D6B6D656D
DIRECT_BLOCKS = 16


class Writer(ctypes.Structure):
    """``struct writer``."""

    _fields_ = [  # the way of ctypes
        *((name, ctypes.c_uint64) for name in ("count", "published", "lost", "stale", "reads")),
        ("padding", ctypes.c_uint64 * 3),
    ]


class Shared(ctypes.Structure):
    """``struct soak``."""

    _fields_ = [  # the way of ctypes
        ("slots", ctypes.c_uint64 * 2),
        ("spacing", ctypes.c_uint64),
        ("stop", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("writers", Writer * WRITERS),
        *(
            (name, ctypes.c_uint64)
            for name in ("checks", "wrong", "forks", "directs", "rings", "pageouts", "lingering")
        ),
        ("file", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


def build(directory: Path) -> Path:
    """Compile the library into `directory`."""
    library = directory / "soak.so"
    found = clib.compiler()
    assert found is not None
    options = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-DPAGE={PAGE_SIZE}u")
    sources = [str(HERE / name) for name in ("writers.c", "disturb.c")]
    subprocess.run([found, *options, "-shared", "-fPIC", "-o", str(library), *sources], check=True)
    return library


class Threads:
    """The threads of one run."""

    def __init__(self, library: Path, slots: tuple[int, int], spacing: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self.shared = Shared()
        self.shared.slots[:] = slots
        self.shared.spacing = spacing
        self.shared.lingering = 500_000
        self._threads: list[threading.Thread] = []
        self.refused: dict[str, int] = {}
        """Disturbances that could not be had here, with their errno."""

    def start(self, name: str, *arguments: int) -> None:
        """Run ``soak_NAME`` in a thread until `stop`."""
        function: Callable[..., int] = getattr(self._library, f"soak_{name}")

        def run() -> None:
            error = function(ctypes.byref(self.shared), *arguments)
            if name == "ring" and error:
                self.refused[name] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """Ask all threads to end; those that wait for a page end when they have got it."""
        self.shared.stop = 1

    @property
    def running(self) -> bool:
        """Whether a thread has not ended yet."""
        return any(thread.is_alive() for thread in self._threads)
