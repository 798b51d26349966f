"""What a daemon tells: open faults, statistics, dumps."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import trio

from uffdaemon.model.statistics import Statistics

if TYPE_CHECKING:
    import signal

    from uffdaemon.daemon.servers import Servers
    from uffdaemon.model.ledger import OpenFault


class Inspection:
    """The part of a `Daemon` that only looks."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._log = servers.log

    @trio.lowlevel.enable_ki_protection
    def open_faults(self) -> list[OpenFault]:
        """The faults that are open now, the oldest first."""
        return sorted(self._servers.open_faults(time.perf_counter_ns()), key=lambda each: -each.age)

    @trio.lowlevel.enable_ki_protection
    def statistics(self) -> Statistics:
        """A snapshot of the counters of all userfaultfds together.

        It has every fault whose thread goes on, and every event whose thread does.
        """
        total = self._servers.count()
        return Statistics(
            dict(total.outcomes),
            dict(total.failures),
            dict(total.events),
            dict(total.bytes_done),
            self.open_faults(),
            total.joined,
            list(total.latencies),
        )

    @trio.lowlevel.enable_ki_protection
    def dump(self) -> str:
        """The open faults as text, a line each: thread, address, age, and what it waits for."""
        stuck = self.open_faults()
        served = len(self._servers.own) + len(self._servers.external)
        head = f"uffdaemon: {len(stuck)} open faults on {served} userfaultfds"
        return "\n".join([head, *(f"  {entry}" for entry in stuck)])

    async def dump_on_signal(self, *signals: signal.Signals) -> None:
        """Print `dump` to standard error at each of these signals, until cancelled."""
        with trio.open_signal_receiver(*signals) as received:
            async for _ in received:
                print(self.dump(), file=sys.stderr, flush=True)  # noqa: T201  # requested by the signal

    def log_statistics(self) -> None:
        """Log what `statistics` returns, without zeros."""
        figures = self.statistics().as_dict()
        self._log.info("served", **{name: figure for name, figure in figures.items() if figure})

    async def log_regularly(self, interval: float) -> None:
        """Log it every `interval` seconds, until cancelled."""
        while True:
            await trio.sleep(interval)
            self.log_statistics()
