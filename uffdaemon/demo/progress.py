"""Shows progress on standard error: a bar on a terminal, lines otherwise, nothing with --json."""

from __future__ import annotations

import sys
from typing import Final, Protocol, TextIO

__all__ = ["Bar", "Lines", "Progress", "Silence", "bytes_text", "progress_for"]

_WIDTH: Final = 30
_KILO: Final = 1024


class Progress(Protocol):
    """Shows what the demo is doing.  Any thread may call it, one at a time."""

    def stage(self, text: str) -> None:
        """Show that a stage begins."""

    def advance(self, label: str, done: int, total: int) -> None:
        """Show `done` of `total` bytes.  In the last call both are equal."""

    def close(self) -> None:
        """Clear the line: other output follows."""


class Silence:
    """Shows nothing, for programs that parse the output."""

    def stage(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Prints a line for each stage, and one for each quarter of its progress."""

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
    """Draws one line of a terminal, over and over until the stage is done."""

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
    """The kind that suits standard error; none with --json."""
    if json:
        return Silence()
    return Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def bytes_text(count: int) -> str:
    """Format a number of bytes, as in 132.1 MiB."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < _KILO:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= _KILO
    return f"{value:.1f} TiB"
