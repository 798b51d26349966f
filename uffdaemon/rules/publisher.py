"""Having C's rules written anew whenever regions, policies or memory have changed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon.rules.rulebook import Rulebook

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.handlers import Handler
    from uffdaemon.model.region import Region
    from uffdaemon.model.region_table import Segment
    from uffdaemon.ports.endpoint import Post
    from uffdaemon.uapi.events import FaultKind

_ROUNDS: Final = 100
"""How often rules are written anew while events keep coming in."""


class Publisher:
    """Keeps the rules of one userfaultfd up to date.

    `wake` has its loop look again, which calls `update` where rules are `outdated`; `catch_up`
    takes in everything that has been read by now.
    """

    def __init__(
        self,
        handler: Handler,
        post: Post,
        *,
        wake: Callable[[], None],
        catch_up: Callable[[], object],
    ) -> None:
        self.outdated = False
        self._native = post.native
        self._wake = wake
        self._catch_up = catch_up
        self._token = trio.lowlevel.current_trio_token()
        self._rulebook = Rulebook(
            handler,
            post.port,
            self._from_any_thread,
            native=post.native,
        )

    def close(self) -> None:
        """Nothing is served any more."""
        self._rulebook.close()

    def soon(self) -> None:
        """There are regions that have no rules yet: have them made, many at a time."""
        self.outdated = True
        self._wake()

    def region_added(self) -> None:
        """Somewhere in this daemon: perhaps where this one moves from, so that books are kept."""
        if self._rulebook.moves or self._native:
            self.soon()

    def update(self) -> None:
        """Write the regions' policies down for C, as far as they can be."""
        self.outdated = not self._rulebook.update()
        if self.outdated:
            self._wake()  # what came in between has to be taken first

    def publish(self) -> None:
        """The same at once: whoever asks for it may touch the memory next, in this very thread."""
        for _ in range(_ROUNDS):
            self._catch_up()
            self.update()
            if not self.outdated:
                return

    def gap(self, region: Region, kind: FaultKind) -> int | None:
        """The first offset at which C does not answer faults of `kind` without Python."""
        return 0 if not self._native else self._rulebook.gap(region, kind)

    def forget(self, segments: list[Segment]) -> None:
        """These regions are served no more."""
        self._rulebook.forget(segments)

    def _from_any_thread(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.soon)
