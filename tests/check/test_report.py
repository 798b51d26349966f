from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.check import machines
from tests.check.machines import refused, status, with_attempts, with_files
from uffdaemon.check.facts import (
    FILES,
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
    Facts,
    Reading,
)
from uffdaemon.check.findings import Finding, Group, Mark, Report
from uffdaemon.check.judging import judge
from uffdaemon.check.text import render
from uffdaemon.features import SINCE

DOCUMENT = Path(__file__).parents[2] / "docs" / "privileges.md"


def report_on(facts: Facts) -> Report:
    return judge(facts, "1.0")


def marks(report: Report, mark: Mark) -> set[str]:
    return {finding.key for finding in report.findings if finding.mark is mark}


def finding(facts: Facts, key: str) -> Finding:
    return report_on(facts)[key]


# -- whole machines ------------------------------------------------------------------------------


def test_everything_there() -> None:
    report = report_on(machines.everything())
    assert {finding.mark for finding in report.findings} == {Mark.OK}
    assert {finding.verdict.mend for finding in report.findings} == {""}
    assert report.works
    assert report.summary == "The core works."


def test_nothing_there() -> None:
    report = report_on(machines.nothing())
    assert not report.works
    assert report.summary == "The core cannot work here."
    kernel_option = "boot a kernel built with CONFIG_USERFAULTFD=y"
    assert report["core"].verdict.mend == kernel_option
    assert report["open.syscall"].verdict.found == "this kernel has no userfaultfd"
    assert marks(report, Mark.UNKNOWN) == {f"feature.{feature.name}" for feature in SINCE}
    assert report["feature.MOVE"].verdict.mend == kernel_option
    assert report["operation.pagemap_scan"].verdict.mend == "boot Linux 6.7 or later"
    assert report["operation.pidfd_getfd"].verdict.mend == "boot Linux 5.6 or later"
    assert report["memory.ksm"].verdict.mend == "boot a kernel built with CONFIG_KSM=y"
    # Nobody is blamed for a kernel that has nothing to refuse.
    assert report["permission.seccomp"].mark is Mark.OK


def test_unprivileged() -> None:
    report = report_on(machines.unprivileged())
    assert report.works
    assert "user mode only" in report.summary
    assert marks(report, Mark.LIMITED) == {"core", "permission.sysctl"}
    assert marks(report, Mark.MISSING) == {
        "open.syscall",
        "open.device",
        "permission.device",
        "permission.capability",
        "permission.event_fork",
    }
    sysctl = "sudo sysctl -w vm.unprivileged_userfaultfd=1"
    device = "sudo chgrp ann /dev/userfaultfd && sudo chmod 660 /dev/userfaultfd"
    capability = "sudo setcap cap_sys_ptrace+ep /usr/bin/python3.11"
    mends = {finding.key: finding.verdict.mend for finding in report.findings}
    assert mends["open.syscall"] == mends["permission.sysctl"] == mends["core"] == sysctl
    assert mends["open.device"] == mends["permission.device"] == device
    assert mends["permission.capability"] == mends["permission.event_fork"] == capability


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "SIGSYS"])
def test_seccomp_filter(answer: str) -> None:
    report = report_on(machines.filtered(answer, device=False))
    assert not report.works
    for key in ("open.syscall", "open.user_mode", "permission.seccomp"):
        assert report[key].mark is Mark.MISSING
        assert "seccomp" in report[key].verdict.found
        assert answer in report[key].verdict.found
    assert "SystemCallFilter=userfaultfd" in report["core"].verdict.mend


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "SIGSYS"])
def test_the_device_gets_past_a_seccomp_filter(answer: str) -> None:
    report = report_on(machines.filtered(answer, device=True))
    assert report.works
    assert "through /dev/userfaultfd" in report["core"].verdict.found
    seccomp = report["permission.seccomp"]
    assert seccomp.mark is Mark.LIMITED
    # uffdaemon tries the system call first, unless told otherwise.
    assert ('how="device"' in seccomp.verdict.found) == (answer == "SIGSYS")


def test_a_filter_that_lets_userfaultfd_through_is_none() -> None:
    facts = with_files(machines.everything(), {STATUS: status(machines.PTRACE, seccomp=2)})
    assert finding(facts, "permission.seccomp").mark is Mark.OK


def test_refused_without_a_filter_is_not_seccomp() -> None:
    facts = with_files(machines.filtered("EPERM", device=False), {STATUS: status(machines.PTRACE)})
    assert "security module" in finding(facts, "open.syscall").verdict.found
    assert "no seccomp filter" in finding(facts, "permission.seccomp").verdict.found


@pytest.mark.parametrize(
    ("container", "mend"),
    [
        ("docker", "docker run --device=/dev/userfaultfd ..."),
        ("podman", "podman run --device=/dev/userfaultfd ..."),
        ("lxc", "docker run --device=/dev/userfaultfd ..."),
        ("kubernetes", "give the pod a securityContext.seccompProfile of type Localhost"),
    ],
)
def test_in_a_container_the_mends_are_about_how_it_is_started(container: str, mend: str) -> None:
    facts = replace(machines.filtered("EPERM", device=False), container=container)
    assert finding(facts, "permission.seccomp").verdict.mend.startswith(mend)


def test_in_a_container_settings_are_mended_on_the_host() -> None:
    facts = replace(machines.unprivileged(), container="podman")
    assert finding(facts, "open.syscall").verdict.mend == (
        "on the host, as root: sysctl -w vm.unprivileged_userfaultfd=1"
    )
    capability = "podman run --cap-add=SYS_PTRACE ..."
    assert finding(facts, "permission.capability").verdict.mend == capability
    assert "as root of the container" in finding(facts, "permission.device").verdict.mend
    given_none = with_attempts(facts, device=refused("EPERM"))
    assert finding(given_none, "open.device").verdict.mend == (
        "podman run --device=/dev/userfaultfd ..."
    )
    facts = with_files(facts, {KSM_RUN: "1"})
    assert finding(facts, "memory.ksm").verdict.mend == (
        "on the host, as root: sh -c 'echo 2 > /sys/kernel/mm/ksm/run'"
    )


# -- opening -------------------------------------------------------------------------------------


def test_a_kernel_before_user_mode_only_is_not_taken_for_a_filter() -> None:
    facts = replace(machines.unprivileged(), release="5.10.0", device=Device())
    facts = with_attempts(
        facts,
        user_mode=refused("EINVAL"),
        device=refused("ENOENT"),
        core=refused("EINVAL"),
        features=refused("EPERM"),
    )
    report = report_on(facts)
    assert report["open.user_mode"].verdict.mend == "boot Linux 5.11 or later"
    assert report["permission.seccomp"].mark is Mark.OK
    assert report["core"].verdict.mend == "sudo sysctl -w vm.unprivileged_userfaultfd=1"
    # With the right that it wants, a refusal is somebody else's.
    with_right = with_files(facts, {SYSCTL: "1"})
    assert report_on(with_right)["permission.seccomp"].mark is Mark.MISSING


def test_root_of_a_user_namespace() -> None:
    facts = with_files(
        machines.unprivileged(), {STATUS: status(machines.PTRACE), UID_MAP: "0 1000 1"}
    )
    capability = finding(replace(facts, uid=0), "permission.capability")
    assert capability.mark is Mark.LIMITED
    assert "user namespace" in capability.verdict.found
    assert "user namespace" in capability.verdict.mend
    assert finding(facts, "permission.sysctl").mark is Mark.LIMITED


def test_root_without_the_capability() -> None:
    facts = replace(machines.unprivileged(), uid=0)
    assert "CapabilityBoundingSet" in finding(facts, "permission.capability").verdict.mend


def test_anybody_may_have_kernel_faults() -> None:
    facts = with_files(
        with_attempts(machines.unprivileged(), syscall=machines.WORKED), {SYSCTL: "1"}
    )
    assert finding(facts, "permission.sysctl").mark is Mark.OK
    assert finding(facts, "open.syscall").mark is Mark.OK


def test_a_kernel_before_the_sysctl() -> None:
    facts = with_files(replace(machines.everything(), release="4.19"), {SYSCTL: None})
    assert finding(facts, "permission.sysctl").mark is Mark.OK


@pytest.mark.parametrize(
    ("device", "mark", "mend"),
    [
        (Device(), Mark.MISSING, "mknod -m 600 /dev/userfaultfd c 10 126"),
        (Device(exists=True, accessible=True), Mark.MISSING, "rm /dev/userfaultfd"),
        (
            Device(exists=True, is_device=True, mode=0o600, owner="root", group="root"),
            Mark.MISSING,
            "chgrp root /dev/userfaultfd && chmod 660 /dev/userfaultfd",
        ),
        (Device(trouble="not to be seen"), Mark.UNKNOWN, ""),
    ],
)
def test_device(device: Device, mark: Mark, mend: str) -> None:
    verdict = finding(replace(machines.everything(), device=device), "permission.device").verdict
    assert (verdict.mark, verdict.mend) == (mark, mend)


def test_a_kernel_before_the_device() -> None:
    facts = with_files(
        replace(machines.everything(), device=Device()), {"sys/class/misc/userfaultfd/dev": None}
    )
    assert finding(facts, "permission.device").verdict.mend == "boot Linux 6.1 or later"


def test_what_broke_is_not_known() -> None:
    broken = Attempt(text="no answer within 20 seconds")
    names = machines.everything().attempts
    report = report_on(with_attempts(machines.everything(), **dict.fromkeys(names, broken)))
    for key in ("open.syscall", "open.user_mode", "open.device", "operation.pagemap_scan"):
        assert report[key].mark is Mark.UNKNOWN
        assert "no answer" in report[key].verdict.found
    assert report["core"].mark is Mark.MISSING
    assert not report.works


def test_opened_but_no_fault_answered() -> None:
    facts = with_attempts(machines.everything(), core=Attempt(text="UnexpectedError: zeros"))
    report = report_on(facts)
    assert not report.works
    assert report["core"].verdict.found == "UnexpectedError: zeros"
    assert "report this" in report["core"].verdict.mend


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
    assert verdict.mend == "boot Linux 7.3 or later"
    assert verdict.details == {"bit": 17, "since": "7.3", "available": False}


def test_a_feature_that_the_kernel_is_new_enough_for() -> None:
    facts = with_attempts(machines.everything(), features=Attempt(worked=True, details={"bits": 0}))
    option = "boot a kernel built with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR=y"
    assert finding(facts, "feature.MINOR_SHMEM").verdict.mend == option


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
    assert verdict.mend == "boot Linux 6.8 or later"


def test_pidfd_getfd_of_other_processes() -> None:
    other = Attempt(worked=True, details={"other_process": "EPERM"})
    facts = with_attempts(machines.unprivileged(), pidfd_getfd=other)
    assert "setcap" in finding(facts, "operation.pidfd_getfd").verdict.mend
    scoped = finding(with_files(facts, {YAMA: "1"}), "operation.pidfd_getfd")
    assert scoped.mark is Mark.LIMITED
    assert scoped.verdict.mend == "sudo sysctl -w kernel.yama.ptrace_scope=0"
    blocked = with_attempts(facts, pidfd_getfd=refused("EPERM"))
    assert finding(blocked, "operation.pidfd_getfd").mark is Mark.MISSING


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "mark", "mend", "found"),
    [
        (("8", "8", "0", "0"), Mark.OK, "", "2 MiB: 8 of 8 to be had"),
        (("0", "0", "0", "4"), Mark.OK, "", "2 MiB: none set aside, up to 4 on demand"),
        (("8", "3", "3", "0"), Mark.LIMITED, "echo 72", "2 MiB: 0 of 8 to be had"),
        (("0", "0", "0", "0"), Mark.MISSING, "echo 64", "2 MiB: none set aside"),
    ],
)
def test_hugetlb(counts: tuple[str, ...], mark: Mark, mend: str, found: str) -> None:
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages")
    directory = f"{HUGETLB}/hugepages-2048kB"
    files = {f"{directory}/{name}": count for name, count in zip(names, counts, strict=True)}
    hugetlb = finding(with_files(machines.everything(), files), "memory.hugetlb")
    assert hugetlb.mark is mark
    assert hugetlb.verdict.mend.startswith(mend)
    assert hugetlb.verdict.found == f"{found}; 1 GiB: 1 of 1 to be had"


def test_hugetlb_of_small_pages() -> None:
    facts = with_files(machines.nothing(), {f"{HUGETLB}/hugepages-64kB/nr_hugepages": "0"})
    assert finding(facts, "memory.hugetlb").verdict.found == "64 KiB: none set aside"


@pytest.mark.parametrize(
    ("files", "mark", "mend"),
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
def test_transparent_huge_pages(files: dict[str, str], mark: Mark, mend: str) -> None:
    facts = with_files(machines.everything(), {f"{THP}/{name}": files[name] for name in files})
    verdict = finding(facts, "memory.thp").verdict
    assert (verdict.mark, verdict.mend) == (mark, mend)


@pytest.mark.parametrize(
    ("value", "mark"),
    [("advise", Mark.OK), ("never", Mark.LIMITED), ("deny", Mark.MISSING)],
)
def test_transparent_huge_pages_of_shmem(value: str, mark: Mark) -> None:
    facts = with_files(machines.everything(), {f"{THP}/shmem_enabled": f"always [{value}] x"})
    shmem = finding(facts, "memory.thp_shmem")
    assert shmem.mark is mark
    assert bool(shmem.verdict.mend) == (mark is not Mark.OK)


def test_ksm_that_runs_stands_in_the_way_of_move() -> None:
    verdict = finding(with_files(machines.everything(), {KSM_RUN: "1"}), "memory.ksm").verdict
    assert verdict.mark is Mark.LIMITED
    assert "EBUSY" in verdict.found
    assert verdict.mend == "echo 2 > /sys/kernel/mm/ksm/run"


def test_overcommit_and_swap() -> None:
    facts = with_files(machines.everything(), {OVERCOMMIT: "2", SWAPS: None})
    assert finding(facts, "memory.overcommit").verdict.mend == "sysctl -w vm.overcommit_memory=0"
    assert finding(facts, "memory.swap").mark is Mark.OK
    assert finding(machines.everything(), "memory.swap").verdict.found == "2047 MiB in 1"


# -- what cannot be known ------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_a_finding() -> None:
    facts = machines.unprivileged()
    files = {**facts.files, KSM_RUN: Reading(trouble="Permission denied")}
    verdict = finding(replace(facts, files=files), "memory.ksm").verdict
    assert verdict.mark is Mark.UNKNOWN
    assert verdict.found == "not known: /sys/kernel/mm/ksm/run: Permission denied"


def test_a_file_that_makes_no_sense_is_a_finding() -> None:
    facts = with_files(machines.everything(), {STATUS: "CapEff:\tmany\n"})
    report = report_on(facts)
    assert report["permission.capability"].mark is Mark.UNKNOWN
    assert report["permission.seccomp"].mark is Mark.UNKNOWN
    assert report.works


ATTEMPTS = st.one_of(
    st.builds(
        Attempt,
        worked=st.just(value=True),
        details=st.sampled_from(
            [{}, {"bits": 0}, {"bits": 1 << 63}, {"bits": "x"}, {"other_process": "EPERM"}]
        ),
    ),
    st.sampled_from(["EPERM", "EACCES", "EINVAL", "ENOSYS", "ENOENT", "ENOTTY", "SIGSYS"]).map(
        refused
    ),
    st.builds(Attempt, text=st.text(min_size=1, max_size=5)),
)
READINGS = st.one_of(
    st.sampled_from(["0", "1", "2", "[never]", "[always]", status(), status(1 << 19, 2)]).map(
        Reading
    ),
    st.text(max_size=20).map(Reading),
    st.just(Reading()),
    st.just(Reading(trouble="no")),
)
NAMES = list(machines.everything().attempts)
FACTS = st.builds(
    Facts,
    release=st.sampled_from(["4.2", "5.10", "7.3", "unheard of"]),
    machine=st.just("x86_64"),
    uid=st.sampled_from([0, 1000]),
    user=st.just("ann"),
    group=st.just("ann's"),
    interpreter=st.just("/a python"),
    container=st.sampled_from(["", "docker", "kubernetes", "lxc"]),
    files=st.dictionaries(
        st.sampled_from([*FILES, f"{HUGETLB}/hugepages-2048kB/nr_hugepages"]), READINGS
    ),
    device=st.builds(
        Device,
        exists=st.booleans(),
        is_device=st.booleans(),
        accessible=st.booleans(),
        trouble=st.sampled_from(["", "no"]),
    ),
    attempts=st.dictionaries(st.sampled_from(NAMES), ATTEMPTS),
)


@given(FACTS)
def test_whatever_is_found_is_a_report_and_all_that_is_missing_has_its_mend(facts: Facts) -> None:
    report = report_on(facts)
    for found in report.findings:
        assert found.verdict.found
        assert "\n" not in found.verdict.mend
        if found.mark in (Mark.MISSING, Mark.LIMITED):
            assert found.verdict.mend
        if found.mark is Mark.OK:
            assert not found.verdict.mend
    assert json.loads(json.dumps(report.to_json()))["works"] == report.works
    assert report.summary in render(report)


# -- its two forms -------------------------------------------------------------------------------


def test_json_keys_are_those_of_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z_]+\.?[a-z_]*)` \|", text, re.MULTILINE))
    report = report_on(machines.everything()).to_json()
    findings = report.pop("findings")
    assert isinstance(findings, dict)
    keys = {key for key in findings if not key.startswith("feature.")}
    inner = set.union(*(set(one) for one in findings.values() if isinstance(one, dict)))
    assert documented == {*report, "findings", *keys, *inner}
    assert {f"feature.{feature.name}" for feature in SINCE} == set(findings) - keys
    assert "`feature.NAME`" in text


def test_text_has_a_line_for_each_finding_and_one_for_each_mend() -> None:
    report = report_on(machines.unprivileged())
    lines = render(report).splitlines()
    assert lines[0] == "uffdaemon 1.0 on Linux 7.3.0-1-amd64 (x86_64), as ann"
    for group in Group:
        assert group.value in lines
    for found in report.findings:
        pattern = (
            rf"  {found.mark.value} +{re.escape(found.title)} +{re.escape(found.verdict.found)}"
        )
        [at] = [at for at, line in enumerate(lines) if re.fullmatch(pattern, line)]
        if found.verdict.mend:
            assert lines[at + 1].strip() == f"mend: {found.verdict.mend}"
    assert lines[-1] == report.summary


def test_text_says_only_once_that_no_feature_is_known() -> None:
    text = render(report_on(machines.nothing()))
    assert text.count("no handshake") == 1
    assert f"all {len(SINCE)}" in text


def test_text_names_the_container() -> None:
    facts = replace(machines.everything(), container="podman")
    assert render(report_on(facts)).splitlines()[0].endswith(", in a container (podman)")


def test_colour_is_for_marks_and_only_when_asked_for() -> None:
    report = report_on(machines.unprivileged())
    plain, coloured = render(report), render(report, colour=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    assert "\x1b[31mmissing" in coloured
    assert "\x1b[33mlimited" in coloured
    assert "\x1b[32mok" in coloured


def test_a_report_has_no_other_findings() -> None:
    with pytest.raises(KeyError):
        report_on(machines.everything())["open.sesame"]
