from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from tests.support.paths import ROOT
from uffdaemon.check.facts import FILES, HUGETLB, KSM_RUN, STATUS, Attempt, Device, Facts, Reading
from uffdaemon.check.findings import Group, Mark
from uffdaemon.check.text import render
from uffdaemon.uapi.features import SINCE

DOCUMENT = ROOT / "docs" / "privileges.md"


# -- whole machines ------------------------------------------------------------------------------


def test_everything_there() -> None:
    report = report_on(machines.everything())
    assert {finding.mark for finding in report.findings} == {Mark.OK}
    assert {finding.verdict.fix for finding in report.findings} == {""}
    assert report.works
    assert report.summary == "The core works."


def test_nothing_there() -> None:
    report = report_on(machines.nothing())
    assert not report.works
    assert report.summary == "The core does not work here."
    kernel_option = "boot a kernel built with CONFIG_USERFAULTFD=y"
    assert report["core"].verdict.fix == kernel_option
    assert report["open.syscall"].verdict.found == "this kernel has no userfaultfd"
    assert marks(report, Mark.UNKNOWN) == {f"feature.{feature.name}" for feature in SINCE}
    assert report["feature.MOVE"].verdict.fix == kernel_option
    assert report["operation.pagemap_scan"].verdict.fix == "boot Linux 6.7 or later"
    assert report["operation.pidfd_getfd"].verdict.fix == "boot Linux 5.6 or later"
    assert report["memory.ksm"].verdict.fix == "boot a kernel built with CONFIG_KSM=y"
    # Without userfaultfd there is no system call to block.
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
    fixes = {finding.key: finding.verdict.fix for finding in report.findings}
    assert fixes["open.syscall"] == fixes["permission.sysctl"] == fixes["core"] == sysctl
    assert fixes["open.device"] == fixes["permission.device"] == device
    assert fixes["permission.capability"] == fixes["permission.event_fork"] == capability


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "SIGSYS"])
def test_seccomp_filter(answer: str) -> None:
    report = report_on(machines.filtered(answer, device=False))
    assert not report.works
    for key in ("open.syscall", "open.user_mode", "permission.seccomp"):
        assert report[key].mark is Mark.MISSING
        assert "seccomp" in report[key].verdict.found
        assert answer in report[key].verdict.found
    assert "SystemCallFilter=userfaultfd" in report["core"].verdict.fix


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS", "SIGSYS"])
def test_the_device_gets_past_a_seccomp_filter(answer: str) -> None:
    report = report_on(machines.filtered(answer, device=True))
    assert report.works
    assert "through /dev/userfaultfd" in report["core"].verdict.found
    seccomp = report["permission.seccomp"]
    assert seccomp.mark is Mark.LIMITED
    # uffdaemon tries the system call first, unless `how` says otherwise.
    assert ('how="device"' in seccomp.verdict.found) == (answer == "SIGSYS")


def test_a_filter_that_allows_userfaultfd_is_ok() -> None:
    facts = with_files(machines.everything(), {STATUS: status(machines.PTRACE, seccomp=2)})
    assert finding(facts, "permission.seccomp").mark is Mark.OK


def test_refused_without_a_filter_is_not_seccomp() -> None:
    facts = with_files(machines.filtered("EPERM", device=False), {STATUS: status(machines.PTRACE)})
    assert "security module" in finding(facts, "open.syscall").verdict.found
    assert "no seccomp filter" in finding(facts, "permission.seccomp").verdict.found


@pytest.mark.parametrize(
    ("container", "fix"),
    [
        ("docker", "docker run --device=/dev/userfaultfd ..."),
        ("podman", "podman run --device=/dev/userfaultfd ..."),
        ("lxc", "docker run --device=/dev/userfaultfd ..."),
        ("kubernetes", "give the pod a securityContext.seccompProfile of type Localhost"),
    ],
)
def test_in_a_container_the_fixes_are_about_how_it_is_started(container: str, fix: str) -> None:
    facts = replace(machines.filtered("EPERM", device=False), container=container)
    assert finding(facts, "permission.seccomp").verdict.fix.startswith(fix)


def test_in_a_container_settings_are_fixed_on_the_host() -> None:
    facts = replace(machines.unprivileged(), container="podman")
    assert finding(facts, "open.syscall").verdict.fix == (
        "on the host, as root: sysctl -w vm.unprivileged_userfaultfd=1"
    )
    capability = "podman run --cap-add=SYS_PTRACE ..."
    assert finding(facts, "permission.capability").verdict.fix == capability
    assert "as root of the container" in finding(facts, "permission.device").verdict.fix
    given_none = with_attempts(facts, device=refused("EPERM"))
    assert finding(given_none, "open.device").verdict.fix == (
        "podman run --device=/dev/userfaultfd ..."
    )
    facts = with_files(facts, {KSM_RUN: "1"})
    assert finding(facts, "memory.ksm").verdict.fix == (
        "on the host, as root: sh -c 'echo 2 > /sys/kernel/mm/ksm/run'"
    )


# -- facts that are not known --------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_a_finding() -> None:
    facts = machines.unprivileged()
    files = {**facts.files, KSM_RUN: Reading(error="Permission denied")}
    verdict = finding(replace(facts, files=files), "memory.ksm").verdict
    assert verdict.mark is Mark.UNKNOWN
    assert verdict.found == "not known: /sys/kernel/mm/ksm/run: Permission denied"


def test_a_malformed_file_is_a_finding() -> None:
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
    st.just(Reading(error="no")),
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
        error=st.sampled_from(["", "no"]),
    ),
    attempts=st.dictionaries(st.sampled_from(NAMES), ATTEMPTS),
)


@given(FACTS)
def test_any_facts_give_a_report_with_fixes_for_all_that_is_missing(facts: Facts) -> None:
    report = report_on(facts)
    for found in report.findings:
        assert found.verdict.found
        assert "\n" not in found.verdict.fix
        if found.mark in (Mark.MISSING, Mark.LIMITED):
            assert found.verdict.fix
        if found.mark is Mark.OK:
            assert not found.verdict.fix
    assert json.loads(json.dumps(report.to_json()))["works"] == report.works
    assert report.summary in render(report)


# -- text and JSON -------------------------------------------------------------------------------


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


def test_text_has_a_line_for_each_finding_and_one_for_each_fix() -> None:
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
        if found.verdict.fix:
            assert lines[at + 1].strip() == f"fix: {found.verdict.fix}"
    assert lines[-1] == report.summary


def test_text_has_one_line_if_no_feature_is_known() -> None:
    text = render(report_on(machines.nothing()))
    assert text.count("no handshake") == 1
    assert f"all {len(SINCE)}" in text


def test_text_names_the_container() -> None:
    facts = replace(machines.everything(), container="podman")
    assert render(report_on(facts)).splitlines()[0].endswith(", in a container (podman)")


def test_marks_are_coloured_on_request() -> None:
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
