"""Features, registration modes and ioctls of a userfaultfd, as flags.

Values are those of ``include/uapi/linux/userfaultfd.h``.  Unknown bits of a newer kernel are kept.
"""

from __future__ import annotations

from enum import KEEP, IntFlag


class Features(IntFlag, boundary=KEEP):
    """``UFFD_FEATURE_*``: requested and granted in the handshake, ``UFFDIO_API``.

    Source: ``include/uapi/linux/userfaultfd.h``, ioctl_userfaultfd(2).
    """

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16
    RWP = 1 << 17
    RWP_ASYNC = 1 << 18

    @property
    def names(self) -> list[str]:
        """The names of the bits that are set; an unknown one is ``bit N``."""
        return bit_names(self, Features)

    @property
    def unknown(self) -> int:
        """The bits without a name here."""
        return int(self) & ~_ALL_FEATURES


SINCE = {
    Features.PAGEFAULT_FLAG_WP: "5.7",
    Features.EVENT_FORK: "4.11",
    Features.EVENT_REMAP: "4.11",
    Features.EVENT_REMOVE: "4.11",
    Features.MISSING_HUGETLBFS: "4.11",
    Features.MISSING_SHMEM: "4.11",
    Features.EVENT_UNMAP: "4.11",
    Features.SIGBUS: "4.14",
    Features.THREAD_ID: "4.14",
    Features.MINOR_HUGETLBFS: "5.13",
    Features.MINOR_SHMEM: "5.14",
    Features.EXACT_ADDRESS: "5.18",
    Features.WP_HUGETLBFS_SHMEM: "5.19",
    Features.WP_UNPOPULATED: "6.4",
    Features.POISON: "6.6",
    Features.WP_ASYNC: "6.7",
    Features.MOVE: "6.8",
    Features.RWP: "7.3",
    Features.RWP_ASYNC: "7.3",
}
"""The Linux version in which each feature appeared."""

_ALL_FEATURES = sum(int(feature) for feature in SINCE)


class RegisterMode(IntFlag, boundary=KEEP):
    """``UFFDIO_REGISTER_MODE_*`` of ioctl_userfaultfd(2): which faults of a range are reported."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class IoctlSet(IntFlag, boundary=KEEP):
    """The ioctls that a registered range supports: bit n is ``_UFFDIO_*`` number n."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09
    SET_MODE = 1 << 0x0A
    API = 1 << 0x3F


def bit_names(value: int, flags: type[IntFlag]) -> list[str]:
    """The names of the bits set in `value`; ``bit N`` if `flags` has no name for one."""
    found: list[str] = []
    for position in range(value.bit_length()):
        if value >> position & 1:
            member = flags(1 << position)
            found.append(member.name if member.name is not None else f"bit {position}")
    return found
