"""A descriptor that one thread closes while another uses it."""

from __future__ import annotations

import os

import pytest

from uffdaemon import errors
from uffdaemon.kernel.shared_fd import SharedFd


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_descriptor_stays_open_until_its_last_use_is_over() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    shared = SharedFd(reading)
    with shared as first:
        with shared as second:
            assert first == second == shared.number() == reading
            shared.close()
            assert shared.closed
        assert _is_open(reading)
    assert not _is_open(reading)


def test_a_descriptor_is_closed_once() -> None:
    fd = os.dup(0)
    shared = SharedFd(fd)
    with shared:
        shared.close()
        shared.close()
    again = os.dup(0)
    assert again == fd  # the number is free, and now somebody else's
    shared.close()
    assert _is_open(again)
    os.close(again)


def test_a_closed_descriptor_cannot_be_used() -> None:
    shared = SharedFd(os.dup(0))
    shared.close()
    with pytest.raises(errors.ClosedDescriptor), shared:
        pass
    with pytest.raises(errors.ClosedDescriptor):
        shared.number()
