"""Each check on its own, with a machine that differs in one fact."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.check import machines
from tests.check.machines import (
    finding,
    marks,
    refused,
    report_on,
    status,
    with_attempts,
    with_files,
)
from uffdaemon.check.facts import (
    HUGETLB,
    KSM_RUN,
    OVERCOMMIT,
    STATUS,
    SWAPS,
    SYSCTL,
    THP,
    UID_MAP,
    YAMA,
    Attempt,
    Device,
)
from uffdaemon.check.findings import Mark

# -- opening -------------------------------------------------------------------------------------


def test_a_kernel_before_user_mode_only_is_not_mistaken_for_a_filter() -> None:
    facts = replace(machines.unprivileged(), release="5.10.0", device=Device())
    facts = with_attempts(
        facts,
        user_mode=refused("EINVAL"),
        device=refused("ENOENT"),
        core=refused("EINVAL"),
        features=refused("EPERM"),
    )
    report = report_on(facts)
    assert report["open.user_mode"].verdict.fix == "boot Linux 5.11 or later"
    assert report["permission.seccomp"].mark is Mark.OK
    assert report["core"].verdict.fix == "sudo sysctl -w vm.unprivileged_userfaultfd=1"
    # With the sysctl set, the refusal cannot be userfaultfd's own.
    with_right = with_files(facts, {SYSCTL: "1"})
    assert report_on(with_right)["permission.seccomp"].mark is Mark.MISSING


def test_root_of_a_user_namespace() -> None:
    facts = with_files(
        machines.unprivileged(), {STATUS: status(machines.PTRACE), UID_MAP: "0 1000 1"}
    )
    capability = finding(replace(facts, uid=0), "permission.capability")
    assert capability.mark is Mark.LIMITED
    assert "user namespace" in capability.verdict.found
    assert "user namespace" in capability.verdict.fix
    assert finding(facts, "permission.sysctl").mark is Mark.LIMITED


def test_root_without_the_capability() -> None:
    facts = replace(machines.unprivileged(), uid=0)
    assert "CapabilityBoundingSet" in finding(facts, "permission.capability").verdict.fix


def test_everybody_may_have_kernel_faults() -> None:
    facts = with_files(
        with_attempts(machines.unprivileged(), syscall=machines.WORKED), {SYSCTL: "1"}
    )
    assert finding(facts, "permission.sysctl").mark is Mark.OK
    assert finding(facts, "open.syscall").mark is Mark.OK


def test_a_kernel_before_the_sysctl() -> None:
    facts = with_files(replace(machines.everything(), release="4.19"), {SYSCTL: None})
    assert finding(facts, "permission.sysctl").mark is Mark.OK


@pytest.mark.parametrize(
    ("device", "mark", "fix"),
    [
        (Device(), Mark.MISSING, "mknod -m 600 /dev/userfaultfd c 10 126"),
        (Device(exists=True, accessible=True), Mark.MISSING, "rm /dev/userfaultfd"),
        (
            Device(exists=True, is_device=True, mode=0o600, owner="root", group="root"),
            Mark.MISSING,
            "chgrp root /dev/userfaultfd && chmod 660 /dev/userfaultfd",
        ),
        (Device(error="not to be seen"), Mark.UNKNOWN, ""),
    ],
)
def test_device(device: Device, mark: Mark, fix: str) -> None:
    verdict = finding(replace(machines.everything(), device=device), "permission.device").verdict
    assert (verdict.mark, verdict.fix) == (mark, fix)


def test_a_kernel_before_the_device() -> None:
    facts = with_files(
        replace(machines.everything(), device=Device()), {"sys/class/misc/userfaultfd/dev": None}
    )
    assert finding(facts, "permission.device").verdict.fix == "boot Linux 6.1 or later"


def test_a_probe_that_fails_is_unknown() -> None:
    broken = Attempt(text="no result within 20 seconds")
    names = machines.everything().attempts
    report = report_on(with_attempts(machines.everything(), **dict.fromkeys(names, broken)))
    for key in ("open.syscall", "open.user_mode", "open.device", "operation.pagemap_scan"):
        assert report[key].mark is Mark.UNKNOWN
        assert "no result" in report[key].verdict.found
    assert report["core"].mark is Mark.MISSING
    assert not report.works


def test_opened_but_no_fault_resolved() -> None:
    facts = with_attempts(machines.everything(), core=Attempt(text="UnexpectedError: zeros"))
    report = report_on(facts)
    assert not report.works
    assert report["core"].verdict.found == "UnexpectedError: zeros"
    assert "report this" in report["core"].verdict.fix


# -- features and operations ---------------------------------------------------------------------


def test_features_of_a_newer_kernel_are_named_and_missing() -> None:
    bits = machines.ALL_BITS & ~(1 << 17 | 1 << 18)
    facts = with_attempts(
        replace(machines.everything(), release="6.18.0"),
        features=Attempt(worked=True, details={"bits": bits}),
    )
    report = report_on(facts)
    assert marks(report, Mark.MISSING) == {"feature.RWP", "feature.RWP_ASYNC"}
    verdict = report["feature.RWP"].verdict
    assert verdict.found == "since Linux 7.3: this kernel does not have it"
    assert verdict.fix == "boot Linux 7.3 or later"
    assert verdict.details == {"bit": 17, "since": "7.3", "available": False}


def test_a_feature_that_the_kernel_is_new_enough_for() -> None:
    facts = with_attempts(machines.everything(), features=Attempt(worked=True, details={"bits": 0}))
    option = "boot a kernel built with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR=y"
    assert finding(facts, "feature.MINOR_SHMEM").verdict.fix == option


def test_a_feature_that_this_library_has_no_name_for() -> None:
    bits = machines.ALL_BITS | 1 << 40
    facts = with_attempts(
        machines.everything(), features=Attempt(worked=True, details={"bits": bits})
    )
    unknown = finding(facts, "feature.bit_40")
    assert unknown.mark is Mark.OK
    assert unknown.verdict.details == {"bit": 40, "since": None, "available": True}


def test_move_that_the_kernel_lacks_or_refuses() -> None:
    facts = with_attempts(machines.everything(), move=refused("EBUSY"))
    assert "EBUSY" in finding(facts, "operation.move").verdict.found
    bits = machines.ALL_BITS & ~(1 << 16)
    facts = with_attempts(
        facts, features=Attempt(worked=True, details={"bits": bits}), move=refused("EINVAL")
    )
    verdict = finding(facts, "operation.move").verdict
    assert verdict.found == "this kernel does not have it"
    assert verdict.fix == "boot Linux 6.8 or later"


def test_pidfd_getfd_of_other_processes() -> None:
    other = Attempt(worked=True, details={"other_process": "EPERM"})
    facts = with_attempts(machines.unprivileged(), pidfd_getfd=other)
    assert "setcap" in finding(facts, "operation.pidfd_getfd").verdict.fix
    scoped = finding(with_files(facts, {YAMA: "1"}), "operation.pidfd_getfd")
    assert scoped.mark is Mark.LIMITED
    assert scoped.verdict.fix == "sudo sysctl -w kernel.yama.ptrace_scope=0"
    blocked = with_attempts(facts, pidfd_getfd=refused("EPERM"))
    assert finding(blocked, "operation.pidfd_getfd").mark is Mark.MISSING


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "mark", "fix", "found"),
    [
        (("8", "8", "0", "0"), Mark.OK, "", "2 MiB: 8 of 8 available"),
        (("0", "0", "0", "4"), Mark.OK, "", "2 MiB: none reserved, up to 4 on demand"),
        (("8", "3", "3", "0"), Mark.LIMITED, "echo 72", "2 MiB: 0 of 8 available"),
        (("0", "0", "0", "0"), Mark.MISSING, "echo 64", "2 MiB: none reserved"),
    ],
)
def test_hugetlb(counts: tuple[str, ...], mark: Mark, fix: str, found: str) -> None:
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages")
    directory = f"{HUGETLB}/hugepages-2048kB"
    files = {f"{directory}/{name}": count for name, count in zip(names, counts, strict=True)}
    hugetlb = finding(with_files(machines.everything(), files), "memory.hugetlb")
    assert hugetlb.mark is mark
    assert hugetlb.verdict.fix.startswith(fix)
    assert hugetlb.verdict.found == f"{found}; 1 GiB: 1 of 1 available"


def test_hugetlb_of_small_pages() -> None:
    facts = with_files(machines.nothing(), {f"{HUGETLB}/hugepages-64kB/nr_hugepages": "0"})
    assert finding(facts, "memory.hugetlb").verdict.found == "64 KiB: none reserved"


@pytest.mark.parametrize(
    ("files", "mark", "fix"),
    [
        ({"enabled": "[always] madvise never"}, Mark.OK, ""),
        ({"enabled": "always madvise [never]"}, Mark.MISSING, f"echo madvise > /{THP}/enabled"),
        (
            {
                "enabled": "[always] madvise never",
                "hugepages-2048kB/enabled": "always inherit madvise [never]",
            },
            Mark.MISSING,
            f"echo madvise > /{THP}/hugepages-2048kB/enabled",
        ),
        (
            {
                "enabled": "always madvise [never]",
                "hugepages-2048kB/enabled": "always [inherit] madvise never",
            },
            Mark.MISSING,
            f"echo madvise > /{THP}/enabled",
        ),
        ({"defrag": "always [never]"}, Mark.LIMITED, f"echo madvise > /{THP}/defrag"),
        ({"enabled": "nothing is chosen"}, Mark.UNKNOWN, ""),
    ],
)
def test_transparent_huge_pages(files: dict[str, str], mark: Mark, fix: str) -> None:
    facts = with_files(machines.everything(), {f"{THP}/{name}": files[name] for name in files})
    verdict = finding(facts, "memory.thp").verdict
    assert (verdict.mark, verdict.fix) == (mark, fix)


@pytest.mark.parametrize(
    ("value", "mark"),
    [("advise", Mark.OK), ("never", Mark.LIMITED), ("deny", Mark.MISSING)],
)
def test_transparent_huge_pages_of_shmem(value: str, mark: Mark) -> None:
    facts = with_files(machines.everything(), {f"{THP}/shmem_enabled": f"always [{value}] x"})
    shmem = finding(facts, "memory.thp_shmem")
    assert shmem.mark is mark
    assert bool(shmem.verdict.fix) == (mark is not Mark.OK)


def test_running_ksm_limits_move() -> None:
    verdict = finding(with_files(machines.everything(), {KSM_RUN: "1"}), "memory.ksm").verdict
    assert verdict.mark is Mark.LIMITED
    assert "EBUSY" in verdict.found
    assert verdict.fix == "echo 2 > /sys/kernel/mm/ksm/run"


def test_overcommit_and_swap() -> None:
    facts = with_files(machines.everything(), {OVERCOMMIT: "2", SWAPS: None})
    assert finding(facts, "memory.overcommit").verdict.fix == "sysctl -w vm.overcommit_memory=0"
    assert finding(facts, "memory.swap").mark is Mark.OK
    assert finding(machines.everything(), "memory.swap").verdict.found == "2047 MiB in 1"
