from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.errors import OperationError, PageNotExclusive, error_of
from uffdaemon.uapi import outcomes
from uffdaemon.uapi.outcomes import (
    OUTCOME_OF_CODE,
    Code,
    Operation,
    Outcome,
    Status,
    result_of,
    status_of,
)

PAGES = st.integers(0, 1000)
COMMON = {"EAGAIN", "EEXIST", "ENOENT", "ESRCH", "ENOMEM", "EINVAL", "EBADF", "ENOTTY"}
SPECIAL = {
    Code.COPY: {"EFAULT", "ENOSPC"},
    Code.MOVE: {"EBUSY", "EFAULT"},
    Code.CONTINUE: {"EFAULT"},
}


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_errno_gives_a_text(code: Code, number: int) -> None:
    explained = code.explain(number)
    expected = errno.errorcode[number] in COMMON | SPECIAL.get(code, set())
    assert bool(explained) == expected
    error = error_of(result_of(Operation(code, 0x5000, 0x3000), number, 0x1000, 0))
    assert str(error).startswith(f"{code.name} at 0x6000, 8192 bytes: {errno.errorcode[number]} (")
    assert str(error).endswith(explained)


def test_operations_explain_what_is_special_about_them() -> None:
    assert "not exclusive" in Code.MOVE.explain(errno.EBUSY)
    assert "hole" in Code.MOVE.explain(errno.ENOENT)
    assert "hugetlb" in Code.ZEROPAGE.explain(errno.EINVAL)
    assert Code.WAKE.explain(errno.EINVAL) == Code.COPY.explain(errno.EINVAL)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (0, Status.DONE),
        (errno.EAGAIN, Status.RETRY),
        (errno.ESRCH, Status.CLIENT_GONE),
        (errno.EEXIST, Status.FAILED),
        (errno.ENOENT, Status.FAILED),
        (errno.EBUSY, Status.FAILED),
        (errno.EINVAL, Status.FAILED),
    ],
)
def test_what_an_errno_says_about_going_on(number: int, status: Status) -> None:
    assert status_of(number) is status
    result = result_of(Operation(Code.COPY, 0, 4096), number, 0, 0)
    assert result.status is status
    assert result.error == number
    assert result.complete == (number == 0)


def test_only_a_moves_ebusy_is_about_exclusiveness() -> None:
    for code in Code:
        error = error_of(result_of(Operation(code, 0, 4096), errno.EBUSY, 0, 0))
        assert (type(error) is PageNotExclusive) == (code is Code.MOVE)
        other = error_of(result_of(Operation(code, 0, 4096), errno.EINVAL, 0, 0))
        assert type(other) is OperationError


@given(st.sampled_from(Code), PAGES, PAGES, PAGES, st.integers(0, 1 << 40))
def test_the_rest_is_what_was_not_reached(
    code: Code, done: int, present: int, left: int, src: int
) -> None:
    operation = Operation(code, 0x7000_0000, (done + present + left) << 12, src, 3, 4096)
    result = result_of(operation, errno.EAGAIN, done << 12, present << 12)
    assert result.address == operation.dst
    assert result.length == operation.length
    assert result.progress == (done + present) << 12
    rest = result.rest
    assert (rest.code, rest.mode, rest.page_size) == (code, 3, 4096)
    assert rest.length == left << 12
    assert rest.dst + rest.length == operation.dst + operation.length
    if src:
        assert rest.src - operation.src == rest.dst - operation.dst
    else:
        assert rest.src == 0


def test_faults_end_in_every_outcome_but_two() -> None:
    assert [outcome for outcome in Outcome if not outcome.final] == [
        Outcome.DEFERRED,
        Outcome.HELD,
    ]


def test_every_operation_has_an_outcome_of_its_own() -> None:
    assert set(OUTCOME_OF_CODE) == set(Code)
    assert len(set(OUTCOME_OF_CODE.values())) == len(Code)
    assert all(outcome.final for outcome in OUTCOME_OF_CODE.values())


def test_outcomes_are_distinct_keys() -> None:
    assert {outcome: outcome.value for outcome in Outcome}[Outcome.MOVED] == "moved"
    assert len({hash(outcome) for outcome in Outcome}) == len(Outcome)


def test_mode_bits_stand_where_the_uapi_header_has_them() -> None:
    assert outcomes.DONTWAKE == 1 << 0
    assert outcomes.COPY_WRITE_PROTECT == 1 << 1
    assert outcomes.CONTINUE_WRITE_PROTECT == 1 << 1
    assert outcomes.MOVE_ALLOW_SOURCE_HOLES == 1 << 1
    assert outcomes.WRITEPROTECT_PROTECT == 1 << 0
    assert outcomes.WRITEPROTECT_DONTWAKE == 1 << 1
    numbers = {code.name: int(code) for code in Code}
    assert numbers == {
        "WAKE": 2,
        "COPY": 3,
        "ZEROPAGE": 4,
        "MOVE": 5,
        "WRITEPROTECT": 6,
        "CONTINUE": 7,
        "POISON": 8,
    }
