from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest

from tests.pure.fakes import a_fault, a_region
from uffdaemon.actions import Action, Zero
from uffdaemon.hooks import HookCalls, Hooks, Resolved, Veto, abandon, is_awaitable
from uffdaemon.model.statistics import Counters
from uffdaemon.names import name_of
from uffdaemon.uapi.events import ForkEvent, RemapEvent, RemoveEvent, UnknownEvent, UnmapEvent
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import CoroutineType

    from uffdaemon.hooks import Before
    from uffdaemon.log import Log
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.events import Event

FAULT = a_fault(a_region(), 3)
RESOLVED = Resolved(FAULT, Outcome.COPIED, 1500, 4096)


class Lines:
    """A log that keeps what it was told."""

    def __init__(self) -> None:
        self.errors: list[dict[str, object]] = []

    def error(self, event: str, **fields: object) -> None:
        self.errors.append({"event": event, **fields})


class Bench:
    """Hook calls with everything around them."""

    def __init__(self, *hooks: Hooks) -> None:
        self.counters = Counters()
        self.log = Lines()
        self.later: list[tuple[Awaitable[None], object]] = []
        self.calls = HookCalls(hooks, self.counters, cast("Log", self.log))
        self.calls.await_by(lambda answer, hook: self.later.append((answer, hook)))

    @property
    def all_went_well(self) -> bool:
        return not (self.log.errors or self.counters.failures or self.later)


def told(*names: str) -> tuple[list[tuple[str, object]], Sequence[Callable[[object], None]]]:
    """A list, and for each name a hook that notes in it what it was told."""
    heard: list[tuple[str, object]] = []

    def hook(name: str, what: object) -> None:
        heard.append((name, what))

    return heard, [partial(hook, name) for name in names]


def test_after_hooks_hear_of_an_ending_in_their_order() -> None:
    heard, (first, second) = told("first", "second")
    bench = Bench(Hooks(after=first), Hooks(), Hooks(after=second))
    assert bench.calls.see_endings
    bench.calls.after(RESOLVED)
    assert heard == [("first", RESOLVED), ("second", RESOLVED)]
    assert bench.all_went_well


def test_without_after_hooks_outcomes_are_not_recorded() -> None:
    heard, (other,) = told("other")
    bench = Bench(Hooks(remove=other))
    assert not bench.calls.see_endings
    bench.calls.after(RESOLVED)
    assert heard == []


def test_failed_hooks_hear_the_fault_and_the_error() -> None:
    heard: list[tuple[Fault, Exception]] = []
    bench = Bench(Hooks(), Hooks(failed=lambda fault, error: heard.append((fault, error))))
    error = OSError("the disk")
    bench.calls.failed(FAULT, error)
    assert heard == [(FAULT, error)]
    assert bench.all_went_well


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("fork", ForkEvent(5)),
        ("remap", RemapEvent(0x1000, 0x9000, 0x1000)),
        ("remove", RemoveEvent(0x1000, 0x2000)),
        ("unmap", UnmapEvent(0x1000, 0x2000)),
        ("unknown", UnknownEvent(bytes(32))),
    ],
)
def test_events_go_to_the_hook_of_their_name(name: str, event: Event) -> None:
    names = ("fork", "remap", "remove", "unmap")
    heard, (fork, remap, remove, unmap) = told(*names)
    bench = Bench(Hooks(fork=fork, remap=remap), Hooks(remove=remove, unmap=unmap), Hooks())
    bench.calls.event(name, event)
    assert heard == [(name, event)] * (name in names)
    assert bench.all_went_well


def test_before_hooks_are_kept_in_the_order_in_which_they_are_asked() -> None:
    def first(fault: Fault, action: Action) -> Veto:
        return Veto()

    def second(fault: Fault, action: Action) -> Action:
        return Zero()

    bench = Bench(Hooks(before=first), Hooks(), Hooks(before=second))
    assert bench.calls.before == [first, second]
    assert Veto().reason == "vetoed"


def test_a_hook_that_raises_is_logged_and_the_next_one_is_called() -> None:
    broken = ZeroDivisionError("by zero")

    def breaks(resolved: Resolved) -> None:
        raise broken

    heard, (good,) = told("good")
    bench = Bench(Hooks(after=breaks), Hooks(after=good))
    bench.calls.after(RESOLVED)
    assert heard == [("good", RESOLVED)]
    assert bench.counters.failures == {"HookRaised": 1}
    [line] = bench.log.errors
    assert str(line["hook"]).endswith("breaks")
    assert line["error"] == repr(broken)
    assert line["exc_info"] is broken


def test_what_is_no_exception_is_not_swallowed() -> None:
    def stops(resolved: Resolved) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(Hooks(after=stops)).calls.after(RESOLVED)


def test_an_async_hook_is_handed_over_and_not_awaited_here() -> None:
    ran: list[Resolved] = []

    async def slow(resolved: Resolved) -> None:
        ran.append(resolved)

    bench = Bench(Hooks(after=slow))
    bench.calls.after(RESOLVED)
    bench.calls.after(RESOLVED)
    assert ran == []
    assert [hook for _, hook in bench.later] == [slow, slow]
    for answer, _ in bench.later:
        with pytest.raises(StopIteration):
            answer.__await__().__next__()
    assert ran == [RESOLVED, RESOLVED]


def test_hooks_are_called_by_their_name_or_their_repr() -> None:
    def mine() -> None: ...

    assert name_of(mine).endswith("mine")
    nameless = partial(mine)
    assert name_of(nameless) == repr(nameless)


def test_an_awaitable_whose_class_raises_is_none() -> None:
    hostile = type("Hostile", (), {"__class__": property(lambda _: 1 / 0)})()
    assert not is_awaitable(hostile)


def test_what_nobody_awaits_is_closed() -> None:
    async def never() -> None: ...

    answer = never()
    abandon(answer)
    assert inspect.getcoroutinestate(answer) == inspect.CORO_CLOSED
    abandon(object())  # a hook's own awaitable is its own business


def test_what_async_hooks_return_early_is_awaited_first() -> None:
    """Faults can be handled before the task that awaits hooks is there."""

    async def slow(event: object) -> None:
        del event

    later: list[object] = []
    calls = HookCalls([Hooks(remove=slow)], Counters(), cast("Log", Lines()))
    calls.event("remove", RemoveEvent(0, 1))
    calls.await_by(lambda answer, hook: later.append((answer, hook)))
    calls.event("remove", RemoveEvent(1, 2))
    assert len(later) == 2
    for answer, hook in cast("list[tuple[CoroutineType[object, object, None], object]]", later):
        assert hook is slow
        answer.close()


def test_a_hook_is_a_callable() -> None:
    with pytest.raises(TypeError, match="before is a hook, which is a callable, not 5"):
        Hooks(before=cast("Before", 5))
