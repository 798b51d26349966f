"""Verdicts on the kernel's facilities: features, operations, and kinds of memory.  Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from uffdaemon.check import fixes
from uffdaemon.check.facts import HUGETLB, KSM_RUN, OVERCOMMIT, SWAPS, THP, YAMA, chosen
from uffdaemon.check.findings import Mark, Verdict
from uffdaemon.check.permissions import core_fix
from uffdaemon.uapi.features import SINCE, Features

if TYPE_CHECKING:
    from uffdaemon.check.facts import Facts, Json

_NOT_HERE: Final = "this kernel does not have it"
_NOT_OPENED: Final = "no userfaultfd can be opened"
_DEFAULT_SIZE: Final = 2048  # KiB: the default of uffdaemon.kernel.memory
_MORE_PAGES: Final = 64

_OPTIONS: Final = {
    Features.PAGEFAULT_FLAG_WP: "CONFIG_HAVE_ARCH_USERFAULTFD_WP",
    Features.WP_HUGETLBFS_SHMEM: "CONFIG_PTE_MARKER_UFFD_WP",
    Features.WP_UNPOPULATED: "CONFIG_PTE_MARKER_UFFD_WP",
    Features.WP_ASYNC: "CONFIG_PTE_MARKER_UFFD_WP",
    Features.MINOR_HUGETLBFS: "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
    Features.MINOR_SHMEM: "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
}
"""The option that the kernel must be built with, on architectures that have it."""


def feature(facts: Facts, which: Features) -> Verdict:
    """One bit of the handshake."""
    since = SINCE.get(which)
    details: dict[str, Json] = {"bit": int(which).bit_length() - 1, "since": since}
    if facts.features is None:
        details["available"] = None
        return Verdict(Mark.UNKNOWN, "not known: no handshake", core_fix(facts), details)
    available = which in facts.features
    details["available"] = available
    if since is None:
        return Verdict(
            Mark.OK, "the kernel is newer than this library, which has no name for it", "", details
        )
    if available:
        return Verdict(Mark.OK, f"since Linux {since}", "", details)
    fix = fixes.kernel(since)
    if not facts.older_than(since):
        fix = fixes.kernel_option(_OPTIONS.get(which, "CONFIG_USERFAULTFD"))
    return Verdict(Mark.MISSING, f"since Linux {since}: {_NOT_HERE}", fix, details)


# -- operations ----------------------------------------------------------------------------------


def move(facts: Facts) -> Verdict:
    """UFFDIO_MOVE, tried on a page of the child process."""
    if not facts.opens:
        return Verdict(Mark.MISSING, _NOT_OPENED, core_fix(facts))
    attempt = facts.conclusive("move")
    details = {"error": attempt.refused}
    if attempt.worked:
        found = "a page was moved, and its source is empty"
        return Verdict(Mark.OK, found, details=details)
    found = attempt.text
    if facts.features is not None and Features.MOVE not in facts.features:
        found = _NOT_HERE
    return Verdict(Mark.MISSING, found, fixes.kernel("6.8"), details)


def pagemap_scan(facts: Facts) -> Verdict:
    """PAGEMAP_SCAN, tried on memory of the child process."""
    attempt = facts.conclusive("pagemap_scan")
    details = {"error": attempt.refused}
    if attempt.worked:
        return Verdict(Mark.OK, "finds the pages that are present", details=details)
    found = f"ENOTTY: {_NOT_HERE}" if attempt.refused == "ENOTTY" else attempt.text
    return Verdict(Mark.MISSING, found, fixes.kernel("6.7"), details)


def pidfd_getfd(facts: Facts) -> Verdict:
    """Take a descriptor from this process, and from another one of the same user."""
    attempt = facts.conclusive("pidfd_getfd")
    details = {"error": attempt.refused, **attempt.details}
    if not attempt.worked:
        if attempt.refused == "ENOSYS" and facts.older_than("5.6"):
            return Verdict(Mark.MISSING, f"ENOSYS: {_NOT_HERE}", fixes.kernel("5.6"), details)
        return Verdict(Mark.MISSING, attempt.text, fixes.capability(facts), details)
    other = attempt.details.get("other_process")
    if not other:
        return Verdict(Mark.OK, "can take descriptors of this user's processes", details=details)
    scope = facts.read(YAMA)
    details["ptrace_scope"] = scope
    found = f"{other} for other processes; they can send descriptors over a socket instead"
    if scope is not None and scope != "0":
        return Verdict(
            Mark.LIMITED,
            f"{found} (kernel.yama.ptrace_scope={scope})",
            fixes.ptrace_scope(facts),
            details,
        )
    return Verdict(Mark.LIMITED, found, fixes.capability(facts), details)


# -- memory --------------------------------------------------------------------------------------


def hugetlb(facts: Facts) -> Verdict:
    """Reserved huge pages, by size."""
    sizes = sorted(
        int(found[1])
        for path in facts.files
        if (found := re.fullmatch(rf"{HUGETLB}/hugepages-(\d+)kB/nr_hugepages", path))
    )
    if not sizes:
        fix = fixes.kernel_option("CONFIG_HUGETLBFS")
        return Verdict(Mark.MISSING, "this kernel has no hugetlb", fix)
    counts = {size: _hugetlb_counts(facts, size) for size in sizes}
    details: dict[str, Json] = {f"{size}kB": dict(count) for size, count in counts.items()}
    seen = "; ".join(_describe_size(size, count) for size, count in counts.items())
    usable = counts.get(_DEFAULT_SIZE, {})
    if usable.get("available", 0) or usable.get("overcommit", 0):
        return Verdict(Mark.OK, seen, details=details)
    total = usable.get("total", 0)
    mark = Mark.LIMITED if total else Mark.MISSING
    path = f"{HUGETLB}/hugepages-{_DEFAULT_SIZE}kB/nr_hugepages"
    return Verdict(mark, seen, fixes.write(facts, path, str(total + _MORE_PAGES)), details)


def _hugetlb_counts(facts: Facts, size: int) -> dict[str, int]:
    def count(name: str) -> int:
        return int(facts.read(f"{HUGETLB}/hugepages-{size}kB/{name}_hugepages") or 0)

    # Pages that are reserved for a mapping still count as free.
    return {
        "total": count("nr"),
        "free": count("free"),
        "available": count("free") - count("resv"),
        "overcommit": count("nr_overcommit"),
    }


def _describe_size(size: int, count: dict[str, int]) -> str:
    name = f"{size >> 20} GiB" if size >= 1 << 20 else f"{size >> 10} MiB"
    if size < 1 << 10:
        name = f"{size} KiB"
    if not count["total"]:
        more = f", up to {count['overcommit']} on demand" if count["overcommit"] else ""
        return f"{name}: none reserved{more}"
    return f"{name}: {count['available']} of {count['total']} available"


def transparent_huge_pages(facts: Facts) -> Verdict:
    """THP for anonymous memory."""
    enabled = facts.read(f"{THP}/enabled")
    if enabled is None:
        fix = fixes.kernel_option("CONFIG_TRANSPARENT_HUGEPAGE")
        return Verdict(Mark.MISSING, _NOT_HERE, fix)
    # Since Linux 6.8 each size has its own setting, by default "inherit".
    by_size = facts.read(f"{THP}/hugepages-2048kB/enabled")
    value = chosen(enabled)
    if by_size is not None and chosen(by_size) != "inherit":
        value = chosen(by_size)
    defrag = chosen(facts.read(f"{THP}/defrag") or "[unknown]")
    details = {"enabled": value, "defrag": defrag}
    found = f"enabled: {value}, defrag: {defrag}"
    if value == "never":
        where = "hugepages-2048kB/" if by_size and chosen(by_size) == "never" else ""
        fix = fixes.write(facts, f"{THP}/{where}enabled", "madvise")
        return Verdict(Mark.MISSING, found, fix, details)
    if defrag == "never":
        fix = fixes.write(facts, f"{THP}/defrag", "madvise")
        return Verdict(Mark.LIMITED, f"{found}: used only if one is free", fix, details)
    return Verdict(Mark.OK, found, details=details)


def shmem_huge_pages(facts: Facts) -> Verdict:
    """THP for shmem."""
    enabled = facts.read(f"{THP}/shmem_enabled")
    if enabled is None:
        fix = fixes.kernel_option("CONFIG_TRANSPARENT_HUGEPAGE")
        return Verdict(Mark.MISSING, _NOT_HERE, fix)
    value = chosen(enabled)
    details = {"enabled": value}
    if value in ("never", "deny"):
        found = f"{value}: only with MADV_COLLAPSE" if value == "never" else value
        fix = fixes.write(facts, f"{THP}/shmem_enabled", "advise")
        mark = Mark.LIMITED if value == "never" else Mark.MISSING
        return Verdict(mark, found, fix, details)
    return Verdict(Mark.OK, value, details=details)


def ksm(facts: Facts) -> Verdict:
    """Kernel samepage merging."""
    value = facts.read(KSM_RUN)
    details = {"run": value}
    if value is None:
        return Verdict(Mark.MISSING, _NOT_HERE, fixes.kernel_option("CONFIG_KSM"), details)
    if value == "1":
        found = "running: MOVE fails with EBUSY on pages that it merged (MADV_MERGEABLE)"
        return Verdict(Mark.LIMITED, found, fixes.write(facts, KSM_RUN, "2"), details)
    return Verdict(Mark.OK, "not running: no pages are merged", details=details)


def overcommit(facts: Facts) -> Verdict:
    """vm.overcommit_memory: whether a process can map more memory than there is."""
    value = facts.read(OVERCOMMIT)
    details = {"value": value}
    if value == "2":
        found = "2: mappings count against the commit limit, even if never touched"
        return Verdict(Mark.LIMITED, found, fixes.sysctl(facts, "vm.overcommit_memory=0"), details)
    return Verdict(Mark.OK, f"{value}: large sparse mappings are allowed", details=details)


def swap(facts: Facts) -> Verdict:
    """Swap areas.  Guarded memory is swapped out like any other."""
    text = facts.read(SWAPS)
    areas = text.splitlines()[1:] if text else []
    size = sum(int(area.split()[2]) for area in areas)
    found = f"{size >> 10} MiB in {len(areas)}" if areas else "none: no page is swapped out"
    return Verdict(Mark.OK, found, details={"areas": len(areas), "kib": size})
