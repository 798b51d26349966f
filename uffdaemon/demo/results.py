"""The results of the demo: plain values, for the table and for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Answer", "Cache", "Fill", "Mode", "Proof", "Report", "Row", "Run", "Temperature"]

Mode = Literal["eager", "lazy"]
Temperature = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one query: the number of passages that match, and the best one."""

    query: str
    matches: int
    where: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a worker.  Seconds count from when it received the queries."""

    mode: Mode
    temperature: Temperature
    cached_fraction: float
    """How much of the image was in the page cache at the start, 0 to 1."""
    open_seconds: float
    first_answer_seconds: float
    all_answers_seconds: float
    first_answer_pages: int
    """Pages of the image in the worker's memory at the first answer."""
    all_answers_pages: int
    faults: dict[str, int]
    """Faults by outcome; an eager run has none."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of the runs of one mode with one temperature of the page cache.

    `cached_fraction` is the worst of all runs (highest if cold, lowest if warm), `faults` that of
    the last run.
    """

    mode: Mode
    temperature: Temperature
    rounds: int
    cached_fraction: float
    open_seconds: float
    first_answer_seconds: float
    all_answers_seconds: float
    first_answer_pages: int
    first_answer_bytes: int
    all_answers_pages: int
    all_answers_bytes: int
    faults: dict[str, int]


@dataclass(frozen=True, slots=True)
class Cache:
    """Whether the image could be dropped from the page cache, and how that was checked."""

    cold: bool
    cached_fraction: float
    note: str


@dataclass(frozen=True, slots=True)
class Fill:
    """The background fill, and the worker's reads during it."""

    temperature: Temperature
    bytes: int
    seconds: float
    bytes_per_second: float
    faults: dict[str, int]
    reads: int
    read_median_seconds: float
    read_slowest_seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """The restored memory compared with the file."""

    file_sha256: str
    memory_sha256: str
    differing_pages: int
    faults: int
    """Faults while the whole memory was read: none after a complete fill."""

    @property
    def equal(self) -> bool:
        return self.file_sha256 == self.memory_sha256 and self.differing_pages == 0


@dataclass(frozen=True, slots=True)
class Report:
    """All results.  Sizes are in bytes, times in seconds."""

    image_path: str
    image_bytes: int
    image_pages: int
    image_passages: int
    image_copies: int
    build_seconds: float | None
    """None if the image was not built by this run."""
    sqlite: str
    kernel: str
    fault_around_pages: int
    cache: Cache
    rows: list[Row]
    answers: tuple[Answer, ...]
    fill: Fill
    proof: Proof
    kept: bool
