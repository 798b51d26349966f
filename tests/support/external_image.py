"""An external policy over an image that is large enough for many examples."""

from __future__ import annotations

from typing import Final

from tests.support.page_contents import content
from uffdaemon import BytesSource, CopyFrom

LARGE: Final = 4000
"""Pages of the image."""


def make_large() -> CopyFrom:
    """The policy that a worker imports."""
    return CopyFrom(BytesSource(content(LARGE)))
