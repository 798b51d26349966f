"""Public names that are imported on first use, so that importing their home loads next to nothing.

PEP 562 has the hooks of a module that this makes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Hooks = tuple[Callable[[str], object], Callable[[], list[str]]]


def lazy(home: str, modules: Mapping[str, Iterable[str]], below: Iterable[str] = ()) -> Hooks:
    """``__getattr__`` and ``__dir__`` of the module `home`.

    `modules` says which names come out of which module of this library, and `below` which modules
    in `home` are public themselves.  ``__dir__`` lists these and nothing else.
    """
    source = {name: module for module, names in modules.items() for name in names}
    names = sorted({*source, *below})

    def find(name: str) -> object:
        if name in source:
            found = getattr(import_module(source[name]), name)
        elif name in below:
            found = import_module(f"{home}.{name}")
        else:
            raise AttributeError(f"module {home!r} has no attribute {name!r}")
        setattr(sys.modules[home], name, found)
        return found

    return find, names.copy
