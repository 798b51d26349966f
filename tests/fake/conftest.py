"""Fixtures of the tests without a kernel."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from tests.fake.kernel import FakeUserfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def uffd() -> Iterator[FakeUserfaultfd]:
    with FakeUserfaultfd() as fake:
        yield fake
    gc.collect()  # a coroutine that was never awaited is a warning, and so an error, of this test
