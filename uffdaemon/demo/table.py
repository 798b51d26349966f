"""The report as a table for a person, and as JSON for a program."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from uffdaemon.demo.progress import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.demo.results import Report, Row

__all__ = ["as_json", "as_text"]

_MILLISECOND: Final = 1e-3


def as_json(report: Report) -> str:
    """The report as an indented JSON object; `ok` is whether the memory equals the file."""
    return json.dumps({"ok": report.proof.equal, **asdict(report)}, indent=2)


def as_text(report: Report) -> str:
    """The image, the table that compares the two kinds of restore, and the comparison."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    built = "" if report.build_seconds is None else f", built in {report.build_seconds:.1f} s"
    yield (
        f"image    SQLite {report.sqlite} full-text index: {bytes_text(report.image_bytes)}, "
        f"{report.image_pages:,} pages, {report.image_passages:,} passages"
    )
    yield f"         {report.image_copies} x the standard library's sources{built}"
    if report.kept:
        yield f"         kept: {report.image_path}"
    for answer in report.answers:
        yield f"query    {answer.query}: {_count(answer.matches, 'passage')}"
        if answer.where:
            yield f"         best: {answer.where}  {_one_line(answer.snippet)}"
    yield ""
    yield from _table(report)
    yield ""
    yield f"lazy     fault-around {_count(report.fault_around_pages, 'page')}"
    for note in report.cache.note.split(". "):
        yield f"cache    {note}"
    fill = report.fill
    yield (
        f"fill     {bytes_text(fill.bytes)} in {fill.seconds:.2f} s "
        f"({bytes_text(round(fill.bytes_per_second))}/s, {fill.temperature} page cache); meanwhile "
        f"{_count(fill.reads, 'passage')} read,"
    )
    yield (
        f"         median {_milliseconds(fill.read_median_seconds)}, "
        f"slowest {_milliseconds(fill.read_slowest_seconds)}, faults {_faults(fill.faults)}"
    )
    proof = report.proof
    verdict = "equals the file" if proof.equal else "DIFFERS FROM THE FILE"
    yield f"proof    the restored memory {verdict}"
    yield f"         sha256 of the file    {proof.file_sha256}"
    yield f"         sha256 of the memory  {proof.memory_sha256}"
    yield (
        f"         {proof.differing_pages:,} of {report.image_pages:,} pages differ; "
        f"{_count(proof.faults, 'fault')} while reading it all"
    )


def _table(report: Report) -> Iterator[str]:
    yield "cache restore  first answer   all answers   pages at first answer          all faults"
    for row in report.rows:
        share = row.first_answer_pages / report.image_pages
        yield (
            f"{row.temperature:5} {row.mode:7} {_milliseconds(row.first_answer_seconds):>13} "
            f"{_milliseconds(row.all_answers_seconds):>13} {row.first_answer_pages:>9,} "
            f"({share:6.1%}, {bytes_text(row.first_answer_bytes):>9})   {_faults(row.faults)}"
        )
    rounds = report.rows[0].rounds
    if rounds > 1:
        yield f"medians of {rounds} runs each, in turn"
    for temperature in dict.fromkeys(row.temperature for row in report.rows):
        eager, lazy = (_find(report.rows, mode, temperature) for mode in ("eager", "lazy"))
        ratio = eager.first_answer_seconds / lazy.first_answer_seconds
        yield f"{temperature}: the lazy restore's first answer came {ratio:.1f} x as fast"


def _find(rows: list[Row], mode: str, temperature: str) -> Row:
    return next(row for row in rows if row.mode == mode and row.temperature == temperature)


def _faults(faults: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in faults.items()) or "none"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= _MILLISECOND else f"{seconds * 1e6:.0f} µs"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _one_line(text: str) -> str:
    return " ".join(text.split())
