"""The plan of an external policy: a file that tells each worker what to serve, and how."""

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
from uffdaemon.actions import Hold, Poison
from uffdaemon.journal.packed_region import pack_region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffdaemon.hooks import Hooks
    from uffdaemon.journal.packet import Json
    from uffdaemon.model.region import Fault, Region

_BOOT: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from uffdaemon.worker.main import main; main()"
)
EXIT_TIMEOUT: Final = 2.0
"""Seconds that a worker has to exit before it is killed."""

# -- the policy's name -------------------------------------------------------------------------

_NAME: Final = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)(\(\))?")


@dataclass(frozen=True, slots=True)
class PolicyPath:
    """Where a policy is imported from: ``package.module:object``.

    The object is the policy itself.  With ``()`` at the end it is called, without arguments, and
    returns the policy.
    """

    module: str
    attribute: str
    called: bool

    @classmethod
    def parse(cls, text: object) -> PolicyPath:
        """Parse a path.  Raises `PlacementRefused` if it is not one, or is in ``__main__``."""
        if not isinstance(text, str):
            raise errors.PlacementRefused(
                "an external policy is imported by another process: pass its name, as in "
                f"'package.module:object', instead of {text!r:.100}"
            )
        match = _NAME.fullmatch(text)
        if match is None or not all(
            word.isidentifier() for part in match.group(1, 2) for word in part.split(".")
        ):
            raise errors.PlacementRefused(
                "the name of an external policy is 'package.module:object', with '()' at the end "
                f"if the object is to be called to make it, not {text!r:.100}"
            )
        module, attribute, called = match.groups()
        if module == "__main__":
            raise errors.PlacementRefused(
                f"{text!r}: another process cannot import the program itself, which would run it "
                "again; put the policy into a module"
            )
        return cls(module, attribute, called is not None)


# -- the plan ----------------------------------------------------------------------------------


class ExternalPolicy:
    """The name of a policy that a worker imports, as ``package.module:object``.

    In the owner's process it takes the place of the policy, and is never called.  The object is the
    policy itself; with ``()`` at the end of the name it is called, without arguments, and returns
    the policy.  Raises `PlacementRefused` if the name is malformed or in ``__main__``, or if there
    is no such package; the policy is not imported here.
    """

    keeps_pages_in_file: Final = True
    """The page book of its region is in a memory file, which the workers map."""

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
        self.name: str = str(name)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, fault: Fault) -> None:
        """Never called: the worker has the policy."""
        del fault


@dataclass(frozen=True, slots=True)
class ExternalOptions:
    """How the worker serves.  The first three are options of `open_daemon`."""

    rereads: int = 100
    fetch_limit: int = 16
    on_fork: object = "adopt"
    restarts: int = 10
    """How many workers in a row may die early.  After that the policy is given up: workers do not
    load it any more, and every fault fails."""


DEFAULTS: Final = ExternalOptions()


def _refuse_callables(region: Region, hooks: Sequence[Hooks], options: ExternalOptions) -> None:
    if not isinstance(region.on_failure, Hold | Poison):
        raise errors.PlacementRefused(
            "on_failure of an external policy is Hold() or Poison(): the worker cannot call a "
            "function of this process, since it must never wait for it"
        )
    if any(each.before is not None for each in hooks):
        raise errors.PlacementRefused(
            "an external policy has no before hooks: the worker cannot call a function of this "
            "process, since it must never wait for it; after, failed and event hooks are called "
            "afterwards"
        )
    if options.on_fork not in ("adopt", "close"):
        raise errors.PlacementRefused(
            "on_fork of an external policy is 'adopt' or 'close': the worker cannot call a "
            "function of this process"
        )


def plan_of(region: Region, policy: str, hooks: Sequence[Hooks], options: ExternalOptions) -> bytes:
    """The plan for the workers of a region.

    Raises `PlacementRefused` if it would need a callable of this process in the worker.
    """
    _refuse_callables(region, hooks, options)
    if not sys.executable:
        raise errors.PlacementRefused("no Python interpreter to start: sys.executable is empty")
    warnings = [f"-W{option}" for option in sys.warnoptions]
    optimized = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    flags = ["-P", "-X", "faulthandler", *warnings, *optimized]
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100  # an entry can be any string
    path.append(str(Path(uffdaemon.external.supervisor.__file__).parents[2]))
    events = (hook for each in hooks for hook in (each.fork, each.remap, each.remove, each.unmap))
    plan: dict[str, Json] = {
        "policy": policy,
        "command": [sys.executable, *flags, "-c", _BOOT, json.dumps(path)],
        "exit_timeout": EXIT_TIMEOUT,
        "restarts": options.restarts,
        "region": pack_region(region),
        "options": {
            "rereads": options.rereads,
            "fetch_limit": options.fetch_limit,
            "on_fork": str(options.on_fork),
        },
        "reports": {
            "resolved": any(each.after is not None for each in hooks),
            "failures": any(each.failed is not None for each in hooks),
            "events": any(hook is not None for hook in events),
        },
    }
    return json.dumps(plan).encode()
