"""Updates the rules in C whenever regions, policies or memory have changed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from uffdaemon.rules.rulebook import Rulebook

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Region
    from uffdaemon.ports.endpoint import Endpoint
    from uffdaemon.uapi.events import FaultKind

_ROUNDS: Final = 100
"""How many times rules are rewritten while new events keep arriving."""


class Publisher:
    """Keeps the rules of one userfaultfd up to date.

    `wake` wakes the loop, which calls `update` if rules are `outdated`.  `catch_up` handles every
    record that has been read so far.
    """

    def __init__(
        self,
        served: Served,
        endpoint: Endpoint,
        *,
        wake: Callable[[], None],
        catch_up: Callable[[], object],
    ) -> None:
        self.outdated: bool = False
        self._native = endpoint.native
        self._wake = wake
        self._catch_up = catch_up
        self._token = trio.lowlevel.current_trio_token()
        self._rulebook = Rulebook(
            served,
            endpoint.port,
            self._schedule_from_any_thread,
            native=endpoint.native,
        )

    def close(self) -> None:
        """Withdraw the rules: the userfaultfd is no longer served."""
        self._rulebook.close()

    def schedule_update(self) -> None:
        """Schedule one update, for any number of changes."""
        self.outdated = True
        self._wake()

    def region_added(self) -> None:
        """Schedule an update: the rules may copy or move from a region that was added elsewhere."""
        if self._rulebook.moves or self._native:
            self.schedule_update()

    def update(self) -> None:
        """Lower the regions' policies, and publish the rules to C."""
        self.outdated = not self._rulebook.update()
        if self.outdated:
            self._wake()  # events have arrived meanwhile, and must be handled first

    def publish(self) -> None:
        """Update at once: the caller may touch the memory next, in this thread."""
        for _ in range(_ROUNDS):
            self._catch_up()
            self.update()
            if not self.outdated:
                return

    def gap(self, region: Region, kind: FaultKind) -> int | None:
        """The first offset at which no rule covers faults of `kind`; None if there is none."""
        return 0 if not self._native else self._rulebook.gap(region, kind)

    def remove(self) -> None:
        """Regions are no longer served: none of their rules is in force when this returns.

        Where the event loop serves, all rules are withdrawn and written anew once, for any number
        of regions; Python resolves faults meanwhile.
        """
        if self._native:
            self.update()
        else:
            self._rulebook.withdraw()
            self.schedule_update()

    def _schedule_from_any_thread(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.schedule_update)
