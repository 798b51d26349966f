"""The command line of `uffdaemon demo`: its options, and the steps of the demo."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import structlog
import trio

from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.image import Image, build_image, open_image
from uffdaemon.demo.progress import Progress, progress_for
from uffdaemon.demo.results import Mode, Report, Row, Run, Temperature
from uffdaemon.demo.runs import Setting, check_cold, eager_run, fill_and_verify, lazy_run
from uffdaemon.demo.sqlite import sqlite_version
from uffdaemon.demo.table import as_json, as_text
from uffdaemon.errors import UffdaemonError
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Sequence

__all__ = ["main"]

QUERIES: Final = (
    "abstract base class",
    "surrogate escape",
    "socket timeout",
    "method resolution order",
)
_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Options(argparse.Namespace):
    json: bool
    size: int
    directory: Path | None
    keep: bool
    image: Path | None
    query: list[str] | None
    rounds: int
    fault_around: int


class _Interrupted(Exception):
    """A signal stopped the demo."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {name}")
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status.

    0: the restored memory equals the file.  1: it does not, or the demo failed; one line on
    standard error says why.  2: wrong arguments.  128 + n: stopped by signal n.
    """
    options = _parser().parse_args(argv, namespace=_Options())
    progress = progress_for(json=options.json)
    # Standard output is for the report.
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
    try:
        report = trio.run(_run_until_signal, options, progress)
    except KeyboardInterrupt:
        return _exit(progress, "interrupted", 128 + signal.SIGINT)
    except BaseException as error:
        reason = _reason(error)
        if isinstance(reason, _Interrupted):
            return _exit(progress, str(reason), 128 + reason.number)
        if reason is None:
            raise
        return _exit(progress, str(reason) or type(reason).__name__, 1)
    progress.close()
    try:
        sys.stdout.write(as_json(report) + "\n" if options.json else as_text(report))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone.  Without this, Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0 if report.proof.equal else 1


def _exit(progress: Progress, text: str, status: int) -> int:
    progress.close()
    print(f"uffdaemon demo: {text}", file=sys.stderr)
    return status


def _reason(error: BaseException) -> BaseException | None:
    """The error to show in one line; None if there is an unexpected one among them."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        reasons = [_reason(part) for part in group.exceptions]
        if None in reasons:
            return None
        return next((reason for reason in reasons if isinstance(reason, DemoError)), reasons[0])
    expected = (_Interrupted, DemoError, UffdaemonError, OSError, MemoryError)
    return error if isinstance(error, expected) else None


async def _run_until_signal(options: _Options, progress: Progress) -> Report:
    """Run the demo.  A signal cancels it, so that it cleans up."""
    interruption: int | None = None

    async def cancel_on_signal(signals: AsyncIterator[int]) -> None:
        nonlocal interruption
        async for number in signals:
            interruption = number
            nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(*_INTERRUPTIONS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_on_signal, signals)
            report = await _run_demo(options, progress)
            nursery.cancel_scope.cancel()
            return report
    raise _Interrupted(interruption or signal.SIGINT)


async def _run_demo(options: _Options, progress: Progress) -> Report:
    with _directories(options) as (folder, sockets):
        begun = time.perf_counter()
        image = await trio.to_thread.run_sync(_image, options, folder, progress)
        build_seconds = None if options.image else time.perf_counter() - begun
        if options.keep:
            progress.stage(f"keeping the image in {image.path}")
        setting = Setting(
            image, tuple(options.query or QUERIES), options.fault_around, sockets, progress
        )
        cache = await trio.to_thread.run_sync(check_cold, image)
        temperatures: list[Temperature] = ["cold", "warm"] if cache.cold else ["warm"]
        runs: list[Run] = []
        for _ in range(options.rounds):
            for temperature in temperatures:
                runs.append(await eager_run(setting, temperature))
                runs.append(await lazy_run(setting, temperature))
        run, fill, proof = await fill_and_verify(setting, temperatures[0])
        answers = run.answers
        if any(other.answers != answers for other in runs):
            raise DemoError("eager and lazy restores gave different answers")
        return Report(
            image_path=str(image.path),
            image_bytes=image.size,
            image_pages=image.pages,
            image_passages=image.passages,
            image_copies=image.copies,
            build_seconds=build_seconds,
            sqlite=sqlite_version(),
            kernel=platform.release(),
            fault_around_pages=options.fault_around,
            cache=cache,
            rows=_rows(runs, temperatures),
            answers=answers,
            fill=fill,
            proof=proof,
            kept=options.keep or options.image is not None,
        )


def _image(options: _Options, folder: Path, progress: Progress) -> Image:
    """Build the image, or open the one given by --image.  Runs in a thread."""
    if options.image is not None:
        return open_image(options.image)

    def advance(done: int, total: int) -> None:
        trio.from_thread.check_cancelled()
        progress.advance("building the image", done, total)

    return build_image(folder / "image.db", options.size, progress=advance)


@contextmanager
def _directories(options: _Options) -> Generator[tuple[Path, Path]]:
    """A directory for the image, and one for sockets, whose paths must be short.

    Both are removed at the end, except for the image with --keep.
    """
    with tempfile.TemporaryDirectory(prefix="uffdaemon-demo-") as name:
        sockets = Path(name)
        if options.directory is None and not options.keep:
            yield sockets, sockets
            return
        folder = Path(tempfile.mkdtemp(prefix="uffdaemon-demo-", dir=options.directory))
        try:
            yield folder, sockets
        finally:
            kept = options.keep and any(folder.iterdir())
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)


def _rows(runs: list[Run], temperatures: list[Temperature]) -> list[Row]:
    modes: tuple[Mode, Mode] = ("eager", "lazy")
    return [
        _row([run for run in runs if run.mode == mode and run.temperature == temperature])
        for temperature in temperatures
        for mode in modes
    ]


def _row(runs: list[Run]) -> Row:
    first = round(statistics.median(run.first_answer_pages for run in runs))
    last = round(statistics.median(run.all_answers_pages for run in runs))
    worst = max if runs[0].temperature == "cold" else min
    return Row(
        mode=runs[0].mode,
        temperature=runs[0].temperature,
        rounds=len(runs),
        cached_fraction=worst(run.cached_fraction for run in runs),
        open_seconds=statistics.median(run.open_seconds for run in runs),
        first_answer_seconds=statistics.median(run.first_answer_seconds for run in runs),
        all_answers_seconds=statistics.median(run.all_answers_seconds for run in runs),
        first_answer_pages=first,
        first_answer_bytes=first * PAGE_SIZE,
        all_answers_pages=last,
        all_answers_bytes=last * PAGE_SIZE,
        faults=runs[-1].faults,
    )


def _size(text: str) -> int:
    """Parse a size in bytes, such as 4096, 64M or 1.5GiB."""
    lower = text.strip().lower().removesuffix("ib").removesuffix("b")
    number = lower.rstrip("kmgt")
    unit = _UNITS.get(lower[len(number) :])
    try:
        value = int(float(number) * (1 << unit)) if unit is not None else 0
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64M or 2G")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uffdaemon demo",
        description="Restore a real memory image lazily: a worker process runs SQLite queries on a "
        "full-text index in memory, and this process copies each page there when the worker "
        "touches it. For comparison, a second worker reads the whole image first. Then the "
        "remaining pages are filled, and the restored memory is compared with the file.",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--size", type=_size, default="128M", help="minimum size of the image (default: 128M)")
    add(
        "--directory", type=Path, help="where to build the image (default: the temporary directory)"
    )
    add("--keep", action="store_true", help="keep the image, and print where it is")
    add("--image", type=Path, help="use an image from an earlier run with --keep")
    add(
        "--query",
        action="append",
        help=f"words, or an FTS5 expression, to search for; can be repeated; the first answer is "
        f"timed on its own (default: {', '.join(QUERIES)})",
    )
    add("--rounds", type=_positive, default=3, help="runs per kind of restore (default: 3)")
    add(
        "--fault-around",
        type=_positive,
        default=16,
        metavar="PAGES",
        help="pages copied for one fault, as an aligned window (default: 16)",
    )
    return parser
