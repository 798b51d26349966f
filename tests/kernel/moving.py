"""What the tests of moves share: pages, what stands in their way, and a look between two steps."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.page_contents import PAGE, content
from uffdaemon import Memory, Outcome
from uffdaemon.kernel.page_probe import look
from uffdaemon.lowlevel import Features, Operation, Result, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from uffdaemon.kernel.userfaultfd import CarryOut
    from uffdaemon.moves import Cause, Moved


class Watched(Userfaultfd):
    """Tells of the results of its operations: so that a test can act between two steps."""

    def __init__(self, fd: int, features: Features, *, same_process: bool) -> None:
        super().__init__(fd, features, same_process=same_process)
        self.tell: Callable[[Result], None] = lambda result: None

    def execute(
        self, operations: Sequence[Operation], carry_out: CarryOut | None = None
    ) -> list[Result]:
        results = super().execute(operations, carry_out)
        for result in results:
            self.tell(result)
        return results


@contextmanager
def two_sides(
    count: int,
    features: Features = Features.MOVE,
    *,
    dont_fork: bool = True,
    filled: bool = True,
    huge: bool = False,
) -> Iterator[tuple[Watched, Memory, Memory]]:
    """A source of `count` pages and an empty, registered destination.

    The source holds `content` if `filled`, and nothing else; `huge` is for transparent huge pages.
    """
    with (
        Watched.open(features) as uffd,
        Memory.map(count * PAGE, transparent_huge=huge, dont_fork=dont_fork) as source,
        Memory.map(count * PAGE, transparent_huge=huge) as target,
    ):
        uffd.register(target.start, target.length)
        if filled:
            source.write(0, content(count))
        yield uffd, source, target


def there(memory: Memory) -> list[int]:
    """The pages that are there, by number."""
    return [n for n, page in enumerate(look(memory.start, memory.length)) if page.there]


def fates(moved: Moved) -> list[tuple[int, Outcome, Cause | None]]:
    """Pages, outcome and cause of each run."""
    return [(run.length // PAGE, run.outcome, run.cause) for run in moved.runs]
