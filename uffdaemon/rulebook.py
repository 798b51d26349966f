"""The rules of one userfaultfd that is served: what of its regions' policies C carries out.

Lowering is pure (`uffdaemon.lowering`).  Here its rules are cut to the parts that are mapped,
checked against what a pure module cannot know, and handed to the port.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.lowering import Rule, rules_of
from uffdaemon.memory import before_unmapping, check_own
from uffdaemon.native.ports import NativeRule, Port, pin
from uffdaemon.outcomes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.handlers import Handler
    from uffdaemon.native import PinnedBuffer
    from uffdaemon.regions import Segment


class Rulebook:
    """Keeps the rules of `port` in step with the regions of `handler`.

    `outdated` is called, from any thread, when they have to be written anew.
    """

    def __init__(self, handler: Handler, port: Port, outdated: Callable[[], None]) -> None:
        self._handler = handler
        self._port = port
        self._outdated = outdated
        # Hooks that are asked before an action have to be asked in Python.
        self._lowered = not handler.hooks.before
        self._rules: dict[int, tuple[list[Rule], PinnedBuffer]] = {}
        self._sources: list[tuple[int, int]] = []
        """(start, end) of what rules move from."""
        self._unmappings = 0
        """How often memory of the library has been unmapped."""
        before_unmapping.append(self._unmapping)

    def close(self) -> None:
        """The port is used no more."""
        if self._unmapping in before_unmapping:
            before_unmapping.remove(self._unmapping)

    @property
    def moves(self) -> bool:
        """Whether anything is moved, or would be but for its source."""
        return any(any(map(_is_move, rules)) for rules, _ in self._rules.values())

    def update(self) -> None:
        """Write the regions' policies down for C, as far as they can be."""
        if not self._lowered:
            return
        for stale in self._handler.stale:
            self._rules.pop(stale, None)
        self._handler.stale.clear()
        known = -1
        while known != self._unmappings:
            # Another thread may unmap what has just been found to be there.
            known = self._unmappings
            self._write()

    def _write(self) -> None:
        # Where a source lies may have changed: what was written down of moves is asked for anew.
        moves = [key for key, (rules, _) in self._rules.items() if any(map(_is_move, rules))]
        for key in moves:
            del self._rules[key]
        rules = [rule for segment in self._handler.regions for rule in self._native(segment)]
        rules.sort(key=lambda rule: (rule.kind, rule.start))
        self._sources = [
            (rule.source, rule.source + rule.end - rule.start)
            for rule in rules
            if rule.code == Code.MOVE
        ]
        self._port.set_rules(rules)

    def forget(self, segments: list[Segment]) -> None:
        """These regions are served no more."""
        for segment in segments:
            self._rules.pop(id(segment.region.pages), None)

    def _unmapping(self, start: int, end: int) -> None:
        """Nothing may be moved from there any more: something else may be mapped there next."""
        self._unmappings += 1
        if any(low < end and start < high for low, high in list(self._sources)):
            self._port.drop_rules()
            self._outdated()

    def _native(self, segment: Segment) -> list[NativeRule]:
        region = segment.region
        known = self._rules.get(id(region.pages))
        if known is None:
            known = rules_of(region), pin(region.pages.present.buffer)
            self._rules[id(region.pages)] = known
        rules, pages = known
        low, high = segment.offset, segment.end - region.start
        return [
            NativeRule(
                part.flags,
                region.start + part.start,
                region.start + part.end,
                part.code,
                part.mode,
                part.source,
                region.start % (1 << 64),  # a part that was moved down may begin "before" 0
                region.page_size,
                max(part.window, region.page_size),
                pages,
            )
            for rule in rules
            if rule.start < high and low < rule.end
            for part in (rule.cut(max(rule.start, low), min(rule.end, high)),)
            if not _is_move(part) or self._moves(part)
        ]

    def _moves(self, rule: Rule) -> bool:
        """Whether C may move by the rule: from memory that is ours to give, and of whose pages
        nobody here keeps books."""
        length = rule.end - rule.start
        return (
            self._handler.uffd.same_process
            and (rule.foreign or check_own(rule.source, length))
            and not any(
                handler.regions.clip(rule.source, rule.source + length)
                for handler in self._handler.of_this_process()
            )
        )


def _is_move(rule: Rule) -> bool:
    return rule.code is Code.MOVE
