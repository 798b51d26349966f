"""The daemon's side: eager and lazy runs, the background fill, and the proof."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon import CopyFrom, Daemon, FaultAround, FileSource, Region, open_daemon
from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.process import Worker, started_worker
from uffdaemon.demo.residency import cached_pages, drop_from_cache
from uffdaemon.demo.results import Answer, Cache, Fill, Mode, Proof, Run, Temperature
from uffdaemon.errors import DaemonClosed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from uffdaemon.demo.image import Image
    from uffdaemon.demo.progress import Progress
    from uffdaemon.demo.protocol import Json, Message

__all__ = ["Setting", "eager_run", "examine_cache", "fill_and_prove", "lazy_run"]

_PIECE: Final = 1 << 20
_COLD: Final = 0.01  # at most so much of the image may be in the page cache, to call it cold


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common."""

    image: Image
    queries: tuple[str, ...]
    fault_around: int
    folder: Path
    """Where sockets are made."""
    progress: Progress


def examine_cache(image: Image) -> Cache:
    """Try to make the page cache cold, and say honestly what came of it."""
    drop_from_cache(image.path)
    fraction = cached_pages(image.path) / image.pages
    if fraction <= _COLD:
        note = (
            "cold: before each run the image was dropped from the page cache with posix_fadvise; "
            f"mincore then found {fraction:.1%} of it there. Caches below the kernel, of the disk "
            "or of a virtual machine's host, are as they are"
        )
        return Cache(cold=True, cached_fraction=fraction, note=note)
    note = (
        "no cold runs: the image could not be dropped from the page cache with posix_fadvise; "
        f"mincore still found {fraction:.1%} of it there, as on a tmpfs"
    )
    return Cache(cold=False, cached_fraction=fraction, note=note)


async def eager_run(setting: Setting, temperature: Temperature) -> Run:
    """The worker reads the whole file into plain memory first."""
    fraction = await _prepare_cache(setting.image, temperature)
    async with started_worker(setting.folder, f"eager, {temperature}") as worker:
        _announce(setting, worker)
        await _start(setting, worker, "eager")
        answers = await worker.hear("answers")
        return _run("eager", temperature, fraction, answers, {})


async def lazy_run(setting: Setting, temperature: Temperature) -> Run:
    """The worker starts with empty memory, and the daemon brings what is touched."""
    fraction = await _prepare_cache(setting.image, temperature)
    async with _lazy_worker(setting, f"lazy, {temperature}") as lazy:
        return _run("lazy", temperature, fraction, lazy.answers, lazy.faults())


async def fill_and_prove(setting: Setting, temperature: Temperature) -> tuple[Run, Fill, Proof]:
    """A lazy run whose memory is then filled up, and compared with the file.

    While the fill goes on the worker reads passages all over the image, so that its faults
    compete with the fill.
    """
    image = setting.image
    fraction = await _prepare_cache(image, temperature)
    async with _lazy_worker(setting, "lazy, filled in the background") as lazy:
        worker = lazy.worker
        run = _run("lazy", temperature, fraction, lazy.answers, lazy.faults())
        await worker.say("read", {"passages": image.passages})
        begun = trio.current_time()
        await lazy.fill(lambda done, total: setting.progress.advance("filling", done, total))
        seconds = trio.current_time() - begun
        # Not told by the fill when it was a fault that brought the last page.
        setting.progress.advance("filling", image.size, image.size)
        await worker.say("enough")
        reads = await worker.hear("reads")
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
        await worker.say("verify", {"image": str(image.path)})
        verified = await worker.hear("verified")
        proof = Proof(
            file_sha256=await trio.to_thread.run_sync(_sha256, image.path),
            memory_sha256=verified.text("sha256"),
            differing_pages=verified.integer("differing_pages"),
            faults=sum(lazy.faults().values()) - before,
        )
        return run, fill, proof


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A worker with guarded memory that has given its answers, and the daemon that serves it."""

    worker: Worker
    daemon: Daemon
    region: Region
    answers: Message

    def faults(self) -> dict[str, int]:
        """Faults answered so far, by outcome."""
        counts: Counter[str] = Counter()
        for (_, outcome), count in self.daemon.statistics().faults.items():
            counts[outcome.value] += count
        return {name: count for name, count in counts.items() if count}

    async def fill(self, progress: Callable[[int, int], None]) -> None:
        """Bring all that is missing; `WorkerDied` when there is nobody to bring it to."""
        try:
            await self.daemon.fill(self.region, progress=progress)
        except DaemonClosed:
            raise await self.worker.death() from None


@asynccontextmanager
async def _lazy_worker(setting: Setting, name: str) -> AsyncGenerator[_Lazy]:
    # The source and the userfaultfd have to outlive the daemon, and that the worker.
    with ExitStack() as stack:
        async with open_daemon() as daemon, started_worker(setting.folder, name) as worker:
            _announce(setting, worker)
            await _start(setting, worker, "lazy")
            uffd, place = await worker.hear_userfaultfd()
            stack.enter_context(uffd)
            source = stack.enter_context(FileSource(setting.image.path))
            policy = FaultAround(CopyFrom(source), setting.fault_around)
            region = Region(place.integer("base"), place.integer("length"), policy, name="image")
            daemon.add_region(uffd, region, register=None)
            await worker.say("served")
            yield _Lazy(worker, daemon, region, await worker.hear("answers"))


def _announce(setting: Setting, worker: Worker) -> None:
    setting.progress.stage(f"{worker.name}: worker {worker.pid}")


async def _start(setting: Setting, worker: Worker, mode: Mode) -> None:
    fields: dict[str, Json] = {
        "mode": mode,
        "image": str(setting.image.path),
        "size": setting.image.size,
        "queries": list(setting.queries),
    }
    await worker.say("start", fields)


async def _prepare_cache(image: Image, temperature: Temperature) -> float:
    """Make the page cache cold or warm; how much of the image is in it then."""

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
    """The file's hash; ends early when the task that waits for it is cancelled."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
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
