"""The rules of one userfaultfd: the part of its regions' policies that C carries out.

Lowering is pure (`uffdaemon.rules.lowering`).  Here the rules are cut to the mapped segments,
checked against what a pure module cannot know, and published to the port.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uffdaemon.actions import Poison
from uffdaemon.kernel.own_memory import before_unmapping, check_own
from uffdaemon.native.ports import ZEROPAGE, NativeRule, Port
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.rules.lasting import Lasting, lasting_sources
from uffdaemon.rules.lowering import Rule, gap, rules_of
from uffdaemon.sources import zeros
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import COPY_WRITE_PROTECT, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.engine.state import Served
    from uffdaemon.model.page_map import PageMap
    from uffdaemon.model.region import Region
    from uffdaemon.model.region_table import Segment


class _Lowered(NamedTuple):
    """The rules for one region's policy."""

    rules: list[Rule] | None
    """None if they must be made again."""
    pages: PageMap
    sources: list[Lasting]
    """They cannot be closed while C has their addresses, or a fetch their descriptors."""

    def release(self) -> None:
        """Nothing of this is in force any more."""
        for source in self.sources:
            source.release()


class Rulebook:
    """Keeps the rules of `port` in step with the regions of `served`.

    `outdated` is called, from any thread, when they must be updated.  With `native`, C serves the
    port without the event loop.  Then C reads events before Python does, and its rules must cover
    every address, including those whose faults go to Python.
    """

    def __init__(
        self,
        served: Served,
        port: Port,
        outdated: Callable[[], None],
        *,
        native: bool = False,
    ) -> None:
        self._served = served
        self._port = port
        self._outdated = outdated
        self._native_port = native
        # `before` hooks are called in Python, for every fault.
        self._lowered = not served.hooks.before
        self._known: dict[int, _Lowered] = {}
        self._sources: list[tuple[int, int]] = []
        """The ranges (start, end) that rules move from."""
        self._unmappings = 0
        """How many times memory of the library has been unmapped."""
        before_unmapping.append(self._unmapping)

    def close(self) -> None:
        """The port is no longer served: nothing is in force."""
        if self._unmapping in before_unmapping:
            before_unmapping.remove(self._unmapping)
        while self._known:
            self._known.popitem()[1].release()

    @property
    def moves(self) -> bool:
        """Whether a policy moves pages, even if no rule may do it now."""
        return any(any(map(_is_move, each.rules or ())) for each in self._known.values())

    def update(self) -> bool:
        """Lower the regions' policies and publish the rules.

        Returns False if events have arrived that must be handled first; until then the old rules
        stay in force.
        """
        self._served.stale.clear()
        known = -1
        while known != self._unmappings:
            # Another thread may unmap a source that was just found to be mapped.
            known = self._unmappings
            if not self._write():
                return False
        return True

    def gap(self, region: Region, kind: FaultKind) -> int | None:
        """The first offset at which no rule covers faults of `kind`; None if there is none."""
        known = self._known.get(id(region.pages))
        if known is None or not self._lowered:
            return 0
        rules = [rule for rule in known.rules or () if self._allowed(rule)]
        return gap(region, rules, kind)

    def _write(self) -> bool:
        gone = self._pop_gone()
        # The address of a source may have changed: make rules that move again.
        for key, known in self._known.items():
            if any(map(_is_move, known.rules or ())):
                self._known[key] = known._replace(rules=None)
        rules: list[NativeRule] = []
        for segment in self._served.regions:
            rules += self._of(segment)
        rules.sort(key=lambda rule: (rule.kind, rule.start))
        self._sources = [
            (rule.source, rule.source + rule.end - rule.start)
            for rule in rules
            if rule.code == Code.MOVE
        ]
        published = self._port.publish(rules)
        if not published:
            for known in gone:
                self._port.withdraw_book(known.pages.book)
        for known in gone:
            known.release()
        return published

    def withdraw(self) -> None:
        """Put all rules out of force."""
        self._port.withdraw()
        for known in self._pop_gone():
            known.release()

    def _pop_gone(self) -> list[_Lowered]:
        """What is known of regions that are no longer served."""
        served = {id(segment.region.pages) for segment in self._served.regions}
        return [self._known.pop(key) for key in self._known.keys() - served]

    def _unmapping(self, start: int, end: int) -> None:
        """Withdraw rules that move from this range: other memory may be mapped there next."""
        self._unmappings += 1
        if any(low < end and start < high for low, high in list(self._sources)):
            self._port.withdraw_source(start, end)
            self._outdated()

    def _lower(self, region: Region) -> _Lowered:
        known = self._known.get(id(region.pages))
        if known is None:
            known = _Lowered(None, region.pages, lasting_sources(region.policy))
            for source in known.sources:
                source.acquire()
        if known.rules is None:
            known = known._replace(rules=rules_of(region) if self._lowered else [])
        self._known[id(region.pages)] = known
        return known

    def _of(self, segment: Segment) -> list[NativeRule]:
        region = segment.region
        known = self._lower(region)
        low, high = segment.offset, segment.end - region.start
        poisons = self._native_port and isinstance(region.on_failure, Poison)

        def native(part: Rule, code: int) -> NativeRule:
            return NativeRule(
                part.flags,
                region.start + part.start,
                region.start + part.end,
                code,
                part.mode,
                part.source,
                region.start % (1 << 64),  # negative if the segment was moved down
                region.page_size,
                max(part.window, region.page_size),
                known.pages.book,
                _zeros_of(region, part),
                Code.POISON if poisons and code and not _is_move(part) else 0,
            )

        found = [
            native(part, part.code)
            for rule in known.rules or ()
            if rule.start < high and low < rule.end
            for part in (rule.cut(max(rule.start, low), min(rule.end, high)),)
            if self._allowed(part)
        ]
        at = segment.start
        missing = [rule for rule in found if rule.kind == 0]
        for start, end in [*((r.start, r.end) for r in missing), (segment.end, segment.end)]:
            if at < start:
                low, high = at - region.start, start - region.start
                found.append(native(Rule(FaultKind.MISSING, low, high, Code.WAKE), 0))
            at = max(at, end)
        return found

    def _allowed(self, rule: Rule) -> bool:
        """Whether C may carry the rule out.

        A source of moves must be memory that this library has mapped, or declared foreign, and must
        not be guarded.  A resolver thread must not copy from guarded memory: it could wait for
        itself.
        """
        if rule.code is Code.COPY and self._native_port:
            return not self._is_guarded(rule)
        if rule.code is not Code.MOVE:
            return True
        return (
            self._served.uffd.same_process
            and (rule.foreign or check_own(rule.source, rule.end - rule.start))
            and not self._is_guarded(rule)
        )

    def _is_guarded(self, rule: Rule) -> bool:
        """Whether a part of the source is guarded."""
        return any(
            served.regions.clip(rule.source, rule.source + rule.end - rule.start)
            for served in self._served.loop.peers()
        )


def _is_move(rule: Rule) -> bool:
    return rule.code is Code.MOVE


def _zeros_of(region: Region, rule: Rule) -> int:
    """What C does with a discarded page, as `NativeRule.zeros`."""
    if region.after_remove != "zero":
        return 0
    size = region.page_size
    # ZEROPAGE cannot write-protect.
    protects = rule.code is Code.COPY and rule.mode & COPY_WRITE_PROTECT
    if size == PAGE_SIZE and not protects:
        return ZEROPAGE
    return zeros(size).address(0, size) or 0
