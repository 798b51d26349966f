"""`RegionTable` against a dictionary from page to (whose page states, which page of them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.pure.fakes import PAGE, START, a_region
from uffdaemon.errors import InvalidRange
from uffdaemon.model.region_table import RegionTable, Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.model.page_map import PageMap
    from uffdaemon.model.region import Region

SPACE = 40
FIRSTS = st.integers(0, SPACE - 1)
SIZES = st.integers(1, 12)

Where = tuple[int, int]
"""(the identity of the page states, the number of the page in them)"""


def at(page: int) -> int:
    return START + page * PAGE


def pages_of(segments: Iterable[Segment]) -> dict[int, Where]:
    """What some segments say of each page."""
    found: dict[int, Where] = {}
    for start, end, region in segments:
        assert (start - START) % PAGE == (end - START) % PAGE == 0
        for page in range((start - START) // PAGE, (end - START) // PAGE):
            assert page not in found
            found[page] = id(region.pages), (at(page) - region.start) // PAGE
    return found


class TablesAreDictionaries(RuleBasedStateMachine):
    """All processes of a family: each table with its model."""

    def __init__(self) -> None:
        super().__init__()
        self.family: list[tuple[RegionTable, dict[int, Where]]] = [(RegionTable(), {})]
        self.alive: list[PageMap] = []  # so that no identity is used twice
        self.names = 0

    def one(self, data: st.DataObject) -> tuple[RegionTable, dict[int, Where]]:
        return self.family[data.draw(st.integers(0, len(self.family) - 1))]

    @rule(data=st.data(), first=FIRSTS, size=SIZES)
    def add(self, data: st.DataObject, first: int, size: int) -> None:
        table, model = self.one(data)
        self.names += 1
        region = a_region(pages=size, start=at(first), name=f"region {self.names}")
        self.alive.append(region.pages)
        if model.keys() & set(range(first, first + size)):
            with pytest.raises(InvalidRange, match=region.name) as caught:
                table.add(region)
            met = [other for other in self.regions(table) if other.label in str(caught.value)]
            assert met
            return
        table.add(region)
        model.update({first + page: (id(region.pages), page) for page in range(size)})

    @staticmethod
    def regions(table: RegionTable) -> list[Region]:
        return [segment.region for segment in table]

    @rule(data=st.data(), first=FIRSTS, size=SIZES)
    def unmap(self, data: st.DataObject, first: int, size: int) -> None:
        table, model = self.one(data)
        gone = table.unmap(at(first), at(first + size))
        expected = {page: model.pop(page) for page in range(first, first + size) if page in model}
        assert pages_of(gone) == expected

    @rule(data=st.data(), source=FIRSTS, goal=FIRSTS, size=SIZES)
    def remap(self, data: st.DataObject, source: int, goal: int, size: int) -> None:
        if abs(source - goal) < size:  # mremap(2) refuses it
            return
        table, model = self.one(data)
        moved = table.remap(at(source), at(goal), size * PAGE)
        taken = {page: model.pop(page) for page in range(source, source + size) if page in model}
        for page in range(goal, goal + size):
            model.pop(page, None)
        placed = {page - source + goal: where for page, where in taken.items()}
        model.update(placed)
        assert pages_of(moved) == placed

    @precondition(lambda self: any(model for _, model in self.family))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        table, model = data.draw(st.sampled_from([each for each in self.family if each[1]]))
        region = data.draw(st.sampled_from(self.regions(table)))
        theirs = {page: where for page, where in model.items() if where[0] == id(region.pages)}
        assert pages_of(table.segments(region)) == theirs
        assert pages_of(table.remove(region)) == theirs
        for page in theirs:
            del model[page]

    @precondition(lambda self: len(self.family) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, model = self.one(data)
        child = table.fork()
        born = {page: child.find(at(page)) for page in model}
        # What was one region's is one region's in the child, and nobody else's.
        names: dict[int, int] = {}
        for page, (identity, _) in model.items():
            region = born[page]
            assert region is not None
            self.alive.append(region.pages)
            assert names.setdefault(identity, id(region.pages)) == id(region.pages)
        known = {where[0] for _, other in self.family for where in other.values()}
        assert not known & set(names.values())
        assert len(set(names.values())) == len(names)
        self.family.append((child, {page: (names[i], at) for page, (i, at) in model.items()}))

    @rule(data=st.data(), first=FIRSTS, size=SIZES)
    def clip(self, data: st.DataObject, first: int, size: int) -> None:
        table, model = self.one(data)
        expected = {page: model[page] for page in range(first, first + size) if page in model}
        assert pages_of(table.clip(at(first), at(first + size))) == expected

    @invariant()
    def every_page_is_found(self) -> None:
        for table, model in self.family:
            assert pages_of(table) == model
            starts = [segment.start for segment in table]
            assert starts == sorted(starts)
            assert len(table) == len(starts)
            for page in range(-1, SPACE + 15):
                region = table.find(at(page) + 5)
                if region is None:
                    assert page not in model
                else:
                    assert model[page] == (id(region.pages), (at(page) - region.start) // PAGE)


TestTablesAreDictionaries = TablesAreDictionaries.TestCase
TestTablesAreDictionaries.settings = settings(max_examples=80, stateful_step_count=25)
