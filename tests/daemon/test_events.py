"""Memory that changes while it is served: discarded, unmapped, moved, forked."""

from __future__ import annotations

from tests.daemon.client import Client, Inside
from tests.daemon.support import (
    PAGE,
    both_sleeps,
    content,
    region_of,
)
from tests.kernel.harness import kernel_test
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Features,
    open_daemon,
)

REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE


def _discard_and_look(inside: Inside, pages: int) -> list[int]:
    """Read each page, discard it and read it at once; the pages that were not zeros then."""
    wrong = []
    for page in range(pages):
        inside.read(page * PAGE, 1)
        inside.advise(Advice.DONTNEED, page * PAGE, PAGE)
        if inside.read(page * PAGE, PAGE) != bytes(PAGE):
            wrong.append(page)
    return wrong


@both_sleeps
@kernel_test(features=REMOVE)
async def test_a_discarded_page_is_zeros_at_once(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    pages = 1000
    memory = await client.guarded(pages * PAGE)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = CopyFrom(BytesSource(content(pages)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        wrong = await client.run(_discard_and_look, pages)
        assert wrong == []
        assert daemon.statistics().events == {"remove": pages}
