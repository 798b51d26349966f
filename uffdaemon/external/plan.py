"""The plan of an external policy: what a worker is to serve, and how, as a file that it reads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uffdaemon.external.supervisor
from uffdaemon import errors
from uffdaemon.actions import Hold, Poison, Span
from uffdaemon.model.region import Region, Retry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffdaemon.actions import Extent
    from uffdaemon.external.protocol import Json, Packet
    from uffdaemon.hooks import Hooks
    from uffdaemon.model.region import Fault, Policy

_BOOT: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from uffdaemon.worker.main import main; main()"
)
FAREWELL: Final = 2.0
"""Seconds that a worker has for leaving, once it is told to, before it is killed."""

# -- the policy's name -------------------------------------------------------------------------

_NAME: Final = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)(\(\))?")


@dataclass(frozen=True, slots=True)
class PolicyPath:
    """Where a policy is imported from: ``package.module:object``.

    The object is the policy itself; with ``()`` at the end it is called, without arguments, to make
    the policy.
    """

    module: str
    attribute: str
    called: bool

    @classmethod
    def parse(cls, text: object) -> PolicyPath:
        """Raises `PlacementRefused` for what is no such path, or lies in ``__main__``."""
        if not isinstance(text, str):
            raise errors.PlacementRefused(
                "an external policy is imported by another process: name it, as in "
                f"'package.module:object', instead of handing over {text!r:.100}"
            )
        match = _NAME.fullmatch(text)
        if match is None or not all(
            word.isidentifier() for part in match.group(1, 2) for word in part.split(".")
        ):
            raise errors.PlacementRefused(
                f"an external policy is named 'package.module:object', or with '()' at the end if "
                f"the object is to be called to make it, not {text!r:.100}"
            )
        module, attribute, called = match.groups()
        if module == "__main__":
            raise errors.PlacementRefused(
                f"{text!r}: the program itself is not imported by another process, which would run "
                "it once more; put the policy into a module"
            )
        return cls(module, attribute, called is not None)


# -- the region --------------------------------------------------------------------------------


def pack_region(region: Region) -> dict[str, Json]:
    """A region without its policy.  Raises `PlacementRefused` where something cannot travel."""
    declared = region.on_failure
    if isinstance(declared, Hold):
        on_failure: list[Json] = ["hold", declared.reason]
    elif isinstance(declared, Poison):
        extent = declared.extent
        on_failure = ["poison", list(extent) if isinstance(extent, Span) else extent]
    else:
        raise errors.PlacementRefused(
            "on_failure of an external policy is Hold() or Poison(): a callable of this process "
            "cannot be asked by another one, which must never wait for it"
        )
    retry = region.retry
    return {
        "range": [region.start, region.length, region.page_size],
        "on_failure": on_failure,
        "retry": [retry.attempts, retry.timeout, retry.first_delay, retry.max_delay],
        "policy_timeout": region.policy_timeout,
        "after_remove": region.after_remove,
        "name": region.name,
    }


def unpack_region(packet: Packet, policy: Policy) -> Region:
    """The region of `pack_region`, with its policy."""
    start, length, page_size = packet.integers("range")
    word, value = packet.items("on_failure")
    extent: Extent = value if isinstance(value, int) else 1
    if isinstance(value, list):
        extent = Span(*(number for number in value if isinstance(number, int)))
    attempts, *times = packet.reals("retry")
    return Region(
        start,
        length,
        policy,
        page_size,
        on_failure=Hold(str(value)) if word == "hold" else Poison(extent),
        retry=Retry(int(attempts), *times),
        policy_timeout=packet.real("policy_timeout"),
        after_remove="policy" if packet.text("after_remove") == "policy" else "zero",
        name=packet.text("name"),
    )


# -- the plan ----------------------------------------------------------------------------------


class ExternalPolicy:
    """The name of a policy that another process imports, as ``package.module:object``; in the
    owner's process it stands for the policy, and nobody asks it.

    The object is the policy itself; with ``()`` at the end of the name it is called, without
    arguments, to make the policy.  Raises `PlacementRefused` as far as that can be found out
    without importing it: it is no such name, lies in ``__main__``, or there is no such package.
    """

    keeps_pages_in_file: Final = True
    """What is known of its region's pages is in a memory file, which workers map."""

    def __init__(self, name: object) -> None:
        path = PolicyPath.parse(name)
        package = path.module.partition(".")[0]
        try:
            found = package in sys.modules or importlib.util.find_spec(package) is not None
        except (ImportError, ValueError) as error:
            raise errors.PlacementRefused(f"{name!r} cannot be imported: {error}") from error
        if not found:
            raise errors.PlacementRefused(
                f"{name!r} cannot be imported: there is no module named {package!r}"
            )
        self.name = str(name)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, fault: Fault) -> None:
        """Never the one who knows."""
        del fault


@dataclass(frozen=True, slots=True)
class ExternalOptions:
    """How the worker serves; the first three are those of `open_daemon`."""

    rereads: int = 100
    fetch_limit: int = 16
    on_fork: object = "adopt"
    restarts: int = 10
    """How many workers in a row may die young before the policy is given up: from then on, faults
    fail with that reason."""


DEFAULTS: Final = ExternalOptions()


def plan_of(region: Region, policy: str, hooks: Sequence[Hooks], options: ExternalOptions) -> bytes:
    """The plan for the workers of a region.  Raises `PlacementRefused` where something cannot
    travel."""
    if any(each.before is not None for each in hooks):
        raise errors.PlacementRefused(
            "a before hook of this process cannot be asked by an external policy's, which must "
            "never wait for it; after, failed and the hooks of events are told afterwards"
        )
    if options.on_fork not in ("adopt", "close"):
        raise errors.PlacementRefused(
            "on_fork of an external policy is 'adopt' or 'close': a callable of this process "
            "cannot be asked by another one"
        )
    if not sys.executable:
        raise errors.PlacementRefused(
            "there is no Python interpreter to start: sys.executable is empty"
        )
    warnings = [f"-W{option}" for option in sys.warnoptions]
    optimized = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    flags = ["-P", "-X", "faulthandler", *warnings, *optimized]
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100  # of any text
    path.append(str(Path(uffdaemon.external.supervisor.__file__).parents[2]))
    events = (hook for each in hooks for hook in (each.fork, each.remap, each.remove, each.unmap))
    plan: dict[str, Json] = {
        "policy": policy,
        "command": [sys.executable, *flags, "-c", _BOOT, json.dumps(path)],
        "patience": FAREWELL,
        "restarts": options.restarts,
        "region": pack_region(region),
        "options": {
            "rereads": options.rereads,
            "fetch_limit": options.fetch_limit,
            "on_fork": str(options.on_fork),
        },
        "told": {
            "endings": any(each.after is not None for each in hooks),
            "failures": any(each.failed is not None for each in hooks),
            "events": any(hook is not None for hook in events),
        },
    }
    return json.dumps(plan).encode()
