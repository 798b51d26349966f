from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.uapi.features import SINCE, Features, IoctlSet, RegisterMode, bit_names

if TYPE_CHECKING:
    from enum import IntFlag

NAMED = sum(int(feature) for feature in Features)


def test_bits_stand_where_the_uapi_header_has_them() -> None:
    in_order = [
        "PAGEFAULT_FLAG_WP",
        "EVENT_FORK",
        "EVENT_REMAP",
        "EVENT_REMOVE",
        "MISSING_HUGETLBFS",
        "MISSING_SHMEM",
        "EVENT_UNMAP",
        "SIGBUS",
        "THREAD_ID",
        "MINOR_HUGETLBFS",
        "MINOR_SHMEM",
        "EXACT_ADDRESS",
        "WP_HUGETLBFS_SHMEM",
        "WP_UNPOPULATED",
        "POISON",
        "WP_ASYNC",
        "MOVE",
        "RWP",
        "RWP_ASYNC",
    ]
    assert Features((1 << len(in_order)) - 1).names == in_order
    assert [mode.name for mode in RegisterMode] == ["MISSING", "WP", "MINOR", "RWP"]
    assert [int(mode) for mode in RegisterMode] == [1, 2, 4, 8]
    ioctls = {member.name: int(member).bit_length() - 1 for member in IoctlSet}
    assert ioctls == {
        "REGISTER": 0x00,
        "UNREGISTER": 0x01,
        "WAKE": 0x02,
        "COPY": 0x03,
        "ZEROPAGE": 0x04,
        "MOVE": 0x05,
        "WRITEPROTECT": 0x06,
        "CONTINUE": 0x07,
        "POISON": 0x08,
        "RWPROTECT": 0x09,
        "SET_MODE": 0x0A,
        "API": 0x3F,
    }


def test_every_feature_has_a_kernel_version() -> None:
    assert list(SINCE) == list(Features)
    assert all(major.isdigit() and minor.isdigit() for major, minor in _versions())


def _versions() -> list[tuple[str, str]]:
    return [(major, minor) for major, _, minor in (text.partition(".") for text in SINCE.values())]


@given(st.integers(0, (1 << 64) - 1))
def test_unknown_bits_of_a_newer_kernel_are_kept_and_distinct(value: int) -> None:
    features = Features(value)
    assert int(features) == value
    assert features.unknown == value & ~NAMED
    assert len(features.names) == value.bit_count()
    assert [name for name in features.names if name.startswith("bit ")] == [
        f"bit {position}" for position in range(64) if features.unknown >> position & 1
    ]


@pytest.mark.parametrize("flags", [Features, RegisterMode, IoctlSet])
@given(value=st.integers(0, (1 << 64) - 1))
def test_names_lead_back_to_the_value(flags: type[IntFlag], value: int) -> None:
    bits = [
        1 << int(name[4:]) if name.startswith("bit ") else int(flags[name])
        for name in bit_names(value, flags)
    ]
    assert sum(bits) == value
    assert bits == sorted(bits)


def test_names_by_hand() -> None:
    value = Features.MOVE | Features.WP_ASYNC | Features(1 << 40)
    assert value.names == ["WP_ASYNC", "MOVE", "bit 40"]
    assert value.unknown == 1 << 40
    assert int(Features.PAGEFAULT_FLAG_WP) == 1


def test_nothing_has_no_names() -> None:
    assert Features(0).names == []
    assert Features(0).unknown == 0
