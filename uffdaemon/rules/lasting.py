"""The sources that a policy reads from, where they have to stay open as long as it is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from uffdaemon.policy import ByKind, ByRange, CopyFrom, FaultAround, FirstOf

if TYPE_CHECKING:
    from uffdaemon.model.region import Policy


@runtime_checkable
class Lasting(Protocol):
    """A source that refuses to be closed between `acquire` and `release`."""

    def acquire(self) -> None:
        """Somebody uses it."""
        ...

    def release(self) -> None:
        """Undo `acquire`."""
        ...


def lasting_sources(policy: Policy | None) -> list[Lasting]:
    """Those of the policies of this library; a policy of your own keeps its sources itself."""
    if isinstance(policy, CopyFrom):
        return [policy.source] if isinstance(policy.source, Lasting) else []
    inner: list[Policy | None] = []
    if isinstance(policy, FirstOf):
        inner = list(policy.policies)
    elif isinstance(policy, ByKind):
        inner = list(policy.policies.values())
    elif isinstance(policy, ByRange):
        inner = [each for _, _, each in policy.ranges]
    elif isinstance(policy, FaultAround):
        inner = [policy.policy]
    return [source for each in inner for source in lasting_sources(each)]
