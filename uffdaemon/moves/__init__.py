"""Moving pages with UFFDIO_MOVE: the calls, what to do about a refusal, previews, staging.

Imports `actions`, `kernel` and what lies below it; knows no region and no daemon.
"""

from typing import TYPE_CHECKING

from uffdaemon.lazy import lazy

if TYPE_CHECKING:
    from uffdaemon.actions import Fallback
    from uffdaemon.moves.calls import copy_exactly, move, move_in_trio, move_many
    from uffdaemon.moves.options import CopyOptions, MoveOptions
    from uffdaemon.moves.preview import can_move
    from uffdaemon.moves.staging import Staging
    from uffdaemon.uapi.moved import Cause, Moved, Run

__all__ = [
    "Cause",
    "CopyOptions",
    "Fallback",
    "MoveOptions",
    "Moved",
    "Run",
    "Staging",
    "can_move",
    "copy_exactly",
    "move",
    "move_in_trio",
    "move_many",
]

_MODULES = {
    "uffdaemon.actions": ("Fallback",),
    "uffdaemon.moves.calls": ("copy_exactly", "move", "move_in_trio", "move_many"),
    "uffdaemon.moves.options": ("CopyOptions", "MoveOptions"),
    "uffdaemon.moves.preview": ("can_move",),
    "uffdaemon.moves.staging": ("Staging",),
    "uffdaemon.uapi.moved": ("Cause", "Moved", "Run"),
}

if not TYPE_CHECKING:  # checkers believe that a module with `__getattr__` has every name
    # The pure modules in here must load without trio and the kernel.
    __getattr__, __dir__ = lazy(__name__, _MODULES)
