"""The daemon's side of the demo: eager and lazy runs, the background fill, the comparison."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import CopyFrom, Daemon, FaultAround, FileSource, Region, open_daemon
from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.process import Worker, start_worker
from uffdaemon.demo.residency import cached_pages, drop_from_cache
from uffdaemon.demo.results import Answer, Cache, Fill, Mode, Proof, Run, Temperature
from uffdaemon.errors import DaemonClosed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from uffdaemon.demo.image import Image
    from uffdaemon.demo.progress import Progress
    from uffdaemon.demo.protocol import Json, Message

__all__ = ["Setting", "check_cold", "eager_run", "fill_and_verify", "lazy_run"]

_CHUNK: Final = 1 << 20
_COLD: Final = 0.01  # the page cache is cold if it has at most this fraction of the image


@dataclass(frozen=True, slots=True)
class Setting:
    """The parameters that all runs share."""

    image: Image
    queries: tuple[str, ...]
    fault_around: int
    folder: Path
    """The directory for sockets."""
    progress: Progress


def check_cold(image: Image) -> Cache:
    """Try to drop the image from the page cache, and describe the result."""
    drop_from_cache(image.path)
    fraction = cached_pages(image.path) / image.pages
    if fraction <= _COLD:
        note = (
            "cold: before each run the image was dropped from the page cache with posix_fadvise; "
            f"mincore then found {fraction:.1%} of it there. Caches below the kernel, in the disk "
            "or the host of a virtual machine, are not cleared"
        )
        return Cache(cold=True, cached_fraction=fraction, note=note)
    note = (
        "no cold runs: the image could not be dropped from the page cache with posix_fadvise; "
        f"mincore still found {fraction:.1%} of it there, as on a tmpfs"
    )
    return Cache(cold=False, cached_fraction=fraction, note=note)


async def eager_run(setting: Setting, temperature: Temperature) -> Run:
    """A run in which the worker reads the whole file into plain memory first."""
    fraction = await _prepare_cache(setting.image, temperature)
    async with start_worker(setting.folder, f"eager, {temperature}") as worker:
        _show_worker(setting, worker)
        await _send_start(setting, worker, "eager")
        answers = await worker.receive("answers")
        return _run("eager", temperature, fraction, answers, {})


async def lazy_run(setting: Setting, temperature: Temperature) -> Run:
    """A run in which the worker starts with empty memory, and the daemon resolves its faults."""
    fraction = await _prepare_cache(setting.image, temperature)
    async with _start_lazy_worker(setting, f"lazy, {temperature}") as lazy:
        return _run("lazy", temperature, fraction, lazy.answers, lazy.faults())


async def fill_and_verify(setting: Setting, temperature: Temperature) -> tuple[Run, Fill, Proof]:
    """A lazy run, after which the memory is filled and compared with the file.

    During the fill the worker reads passages at random, so that its faults compete with the fill.
    """
    image = setting.image
    fraction = await _prepare_cache(image, temperature)
    async with _start_lazy_worker(setting, "lazy, filled in the background") as lazy:
        worker = lazy.worker
        run = _run("lazy", temperature, fraction, lazy.answers, lazy.faults())
        await worker.send("read", {"passages": image.passages})
        begun = trio.current_time()
        await lazy.fill(lambda done, total: setting.progress.advance("filling", done, total))
        seconds = trio.current_time() - begun
        # The fill does not report the last page if a fault brought it.
        setting.progress.advance("filling", image.size, image.size)
        await worker.send("enough")
        reads = await worker.receive("reads")
        during = _difference(lazy.faults(), run.faults)
        fill = Fill(
            temperature=temperature,
            bytes=image.size,
            seconds=seconds,
            bytes_per_second=image.size / seconds,
            faults=during,
            reads=reads.integer("count"),
            read_median_seconds=reads.real("median_seconds"),
            read_slowest_seconds=reads.real("slowest_seconds"),
        )
        setting.progress.stage("comparing the restored memory with the file")
        before = sum(lazy.faults().values())
        await worker.send("verify", {"image": str(image.path)})
        verified = await worker.receive("verified")
        proof = Proof(
            file_sha256=await trio.to_thread.run_sync(_sha256, image.path),
            memory_sha256=verified.text("sha256"),
            differing_pages=verified.integer("differing_pages"),
            faults=sum(lazy.faults().values()) - before,
        )
        return run, fill, proof


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A worker with guarded memory that has sent its answers, and the daemon that serves it."""

    worker: Worker
    daemon: Daemon
    region: Region
    answers: Message

    def faults(self) -> dict[str, int]:
        """Faults resolved so far, by outcome."""
        counts: Counter[str] = Counter()
        for (_, outcome), count in self.daemon.statistics().faults.items():
            counts[outcome.value] += count
        return {name: count for name, count in counts.items() if count}

    async def fill(self, progress: Callable[[int, int], None]) -> None:
        """Fill all missing pages.  Raises `WorkerDied` if the worker exits."""
        try:
            await self.daemon.fill(self.region, progress=progress)
        except DaemonClosed:
            raise await self.worker.exit_error() from None


@asynccontextmanager
async def _start_lazy_worker(setting: Setting, name: str) -> AsyncGenerator[_Lazy]:
    # The source and the userfaultfd must outlive the daemon, and the daemon the worker.
    with ExitStack() as stack:
        async with open_daemon() as daemon, start_worker(setting.folder, name) as worker:
            _show_worker(setting, worker)
            await _send_start(setting, worker, "lazy")
            uffd, place = await worker.receive_userfaultfd()
            stack.enter_context(uffd)
            source = stack.enter_context(FileSource(setting.image.path))
            policy = FaultAround(CopyFrom(source), setting.fault_around)
            region = Region(place.integer("base"), place.integer("length"), policy, name="image")
            daemon.add_region(uffd, region, register=None)
            await worker.send("served")
            yield _Lazy(worker, daemon, region, await worker.receive("answers"))


def _show_worker(setting: Setting, worker: Worker) -> None:
    setting.progress.stage(f"{worker.name}: worker {worker.pid}")


async def _send_start(setting: Setting, worker: Worker, mode: Mode) -> None:
    fields: dict[str, Json] = {
        "mode": mode,
        "image": str(setting.image.path),
        "size": setting.image.size,
        "queries": list(setting.queries),
    }
    await worker.send("start", fields)


async def _prepare_cache(image: Image, temperature: Temperature) -> float:
    """Make the page cache cold or warm, and return the fraction of the image that is in it."""

    def prepare() -> float:
        if temperature == "cold":
            drop_from_cache(image.path)
        else:
            _sha256(image.path)
        return cached_pages(image.path) / image.pages

    fraction = await trio.to_thread.run_sync(prepare)
    if temperature == "cold" and fraction > _COLD:
        raise DemoError(f"the page cache did not stay cold: {fraction:.1%} of the image is in it")
    return fraction


def _sha256(path: Path) -> str:
    """The file's SHA-256.  Runs in a thread; raises when the task that waits is cancelled."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            trio.from_thread.check_cancelled()
            digest.update(piece)
    return digest.hexdigest()


def _run(
    mode: Mode, temperature: Temperature, fraction: float, message: Message, faults: dict[str, int]
) -> Run:
    return Run(
        mode=mode,
        temperature=temperature,
        cached_fraction=fraction,
        open_seconds=message.real("open_seconds"),
        first_answer_seconds=message.real("first_answer_seconds"),
        all_answers_seconds=message.real("all_answers_seconds"),
        first_answer_pages=message.integer("first_answer_pages"),
        all_answers_pages=message.integer("all_answers_pages"),
        faults=faults,
        answers=tuple(_answer(item) for item in message.messages("answers")),
    )


def _answer(item: Message) -> Answer:
    best = item.texts("best") or ["", ""]
    return Answer(item.text("query"), item.integer("matches"), best[0], best[1])


def _difference(later: dict[str, int], earlier: dict[str, int]) -> dict[str, int]:
    counts = {name: count - earlier.get(name, 0) for name, count in later.items()}
    return {name: count for name, count in counts.items() if count}
