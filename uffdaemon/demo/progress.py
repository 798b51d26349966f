"""Saying how far things are: a bar on a terminal, lines elsewhere, nothing for a machine."""

from __future__ import annotations

import sys
from typing import Final, Protocol, TextIO

__all__ = ["Bar", "Lines", "Progress", "Silence", "bytes_text", "progress_for"]

_WIDTH: Final = 30
_KILO: Final = 1024


class Progress(Protocol):
    """Where the demonstration says what it does.  May be called from any one thread at a time."""

    def stage(self, text: str) -> None:
        """Something begins."""

    def advance(self, label: str, done: int, total: int) -> None:
        """`done` of `total` bytes are there; the last call of a kind has both equal."""

    def close(self) -> None:
        """What comes next on the terminal is somebody else's."""


class Silence:
    """Nothing: somebody parses what is printed."""

    def stage(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A line a stage, and one at each quarter of what advances."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ("", -1)

    def stage(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def advance(self, label: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 4
        if self._last != (label, quarter):
            self._last = (label, quarter)
            self.stage(f"{label}: {bytes_text(done)} of {bytes_text(total)}")

    def close(self) -> None:
        pass


class Bar:
    """One line of a terminal, drawn over until what it shows is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ("", -1)

    def stage(self, text: str) -> None:
        self._draw(text)

    def advance(self, label: str, done: int, total: int) -> None:
        filled = _WIDTH * done // total if total else _WIDTH
        percent = 100 * done // total if total else 100
        if self._last == (label, percent):
            return
        self._last = (label, percent)
        bar = "█" * filled + "·" * (_WIDTH - filled)
        self._draw(f"{label} [{bar}] {percent:3} % of {bytes_text(total)}")
        if done >= total:
            self._stream.write("\n")
            self._stream.flush()

    def close(self) -> None:
        self._draw("")

    def _draw(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()


def progress_for(*, json: bool) -> Progress:
    """What suits standard error; nothing at all when a machine reads."""
    if json:
        return Silence()
    return Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def bytes_text(count: int) -> str:
    """A number of bytes for a person: 132.1 MiB."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < _KILO:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= _KILO
    return f"{value:.1f} TiB"
