from __future__ import annotations

import ast
import errno
import inspect
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import uffdaemon
from uffdaemon import errors
from uffdaemon.uapi.features import Features
from uffdaemon.uapi.outcomes import Code, Operation, result_of

PACKAGE = Path(uffdaemon.__file__).parent
ROOT = errors.UffdaemonError
BRANCHES = (errors.UsageError, errors.KernelRefusal, errors.SourceError, errors.PolicyError)
ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == errors.__name__
]
LEAVES = [kind for kind in ALL if kind is not ROOT and kind not in BRANCHES]
ABSTRACT = {kind.__name__ for kind in ALL if "ever raised itself" in (kind.__doc__ or "")}
ADDRESSES = st.integers(0, (1 << 48) - 1).map(lambda page: page << 12)
LENGTHS = st.integers(1, 1 << 24).map(lambda pages: pages << 12)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_is_of_one_root_and_of_one_branch(kind: type[Exception]) -> None:
    assert issubclass(kind, ROOT)
    assert len([branch for branch in BRANCHES if issubclass(kind, branch)]) == 1
    assert issubclass(kind, OSError) == issubclass(kind, errors.KernelRefusal)


def test_usage_errors_are_also_pythons_own_exceptions() -> None:
    assert issubclass(errors.InvalidRange, ValueError)
    assert issubclass(errors.NotAUserfaultfd, ValueError)
    assert issubclass(errors.DaemonClosed, RuntimeError)
    assert issubclass(errors.PermissionRefused, PermissionError)


def test_branches_are_never_raised_themselves() -> None:
    assert {kind.__name__ for kind in (ROOT, *BRANCHES)} <= ABSTRACT
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                assert name not in ABSTRACT, f"{path}:{node.lineno} raises {name}"


@given(st.sampled_from(sorted(errno.errorcode)), ADDRESSES, LENGTHS)
def test_a_refusal_names_the_request_and_its_result(number: int, address: int, length: int) -> None:
    error = errors.RegistrationRefused(number, "REGISTER", address=address, length=length)
    assert (error.errno, error.number) == (number, number)
    assert (error.operation, error.address, error.length) == ("REGISTER", address, length)
    assert str(error) == error.strerror
    for part in (
        "REGISTER",
        f"{address:#x}",
        f"{length} bytes",
        errno.errorcode[number],
        os.strerror(number),
    ):
        assert part in str(error)


@given(st.sampled_from(Code), st.sampled_from(sorted(errno.errorcode)), ADDRESSES, st.data())
def test_a_failed_operation_keeps_its_result_and_names_the_rest(
    code: Code, number: int, address: int, data: st.DataObject
) -> None:
    pages = data.draw(st.integers(1, 1000))
    done = data.draw(st.integers(0, pages - 1))
    present = data.draw(st.integers(0, pages - 1 - done))
    operation = Operation(code, address, pages << 12)
    result = result_of(operation, number, done << 12, present << 12)
    error = errors.OperationError(number, result)
    assert error.result is result
    assert error.address == address + ((done + present) << 12)
    assert error.length == (pages - done - present) << 12
    assert error.operation == code.name
    assert error.reason == code.explain(number)
    for part in (code.name, f"{error.address:#x}", f"{error.length} bytes", error.reason):
        assert part in str(error)
    assert errno.errorcode[number] in str(error)


def test_a_reason_given_replaces_the_known_one() -> None:
    result = result_of(Operation(Code.COPY, 0x1000, 0x1000), errno.EFAULT, 0, 0)
    error = errors.OperationError(errno.EFAULT, result, reason="the disk is gone")
    assert error.reason == "the disk is gone"
    assert "the disk is gone" in str(error)


def test_advice_comes_last() -> None:
    error = errors.PermissionRefused(
        errno.EPERM, "userfaultfd", reason="not root", advice="sysctl vm.unprivileged_userfaultfd=1"
    )
    assert error.address is None
    assert error.length is None
    assert str(error) == (
        f"userfaultfd: EPERM ({os.strerror(errno.EPERM)}): not root "
        "[sysctl vm.unprivileged_userfaultfd=1]"
    )
    with pytest.raises(PermissionError) as caught:
        raise error
    assert caught.value.errno == errno.EPERM


def test_unknown_details_are_left_out() -> None:
    error = errors.OpenRefused(errno.EMFILE, "userfaultfd")
    assert str(error) == f"userfaultfd: EMFILE ({os.strerror(errno.EMFILE)})"


def test_an_errno_without_a_name_is_given_as_a_number() -> None:
    assert "4094" in str(errors.MemoryRefused(4094, "madvise", address=0x1000))


def test_a_missing_errno_is_0() -> None:
    error = errors.OpenRefused(errno.EMFILE, "userfaultfd")
    error.errno = None
    assert error.number == 0


def test_a_missing_feature_is_named() -> None:
    error = errors.FeatureMissing("UFFDIO_API", "MOVE", Features.MOVE)
    assert error.missing is Features.MOVE
    assert error.errno == errno.EINVAL
    assert "this kernel does not have it: MOVE" in str(error)
    assert errors.FeatureMissing("UFFDIO_MOVE", "the operation").missing is None


def test_a_policys_error_names_the_policy() -> None:
    error = errors.NoAnswer("mine", "does not answer")
    assert error.policy == "mine"
    assert str(error) == "policy mine does not answer"


def test_a_failure_in_a_worker_keeps_its_type_and_message() -> None:
    error = errors.WorkerFailure("shop:copied", "LookupError", "no such page")
    assert (error.policy, error.error_type) == ("shop:copied", "LookupError")
    assert str(error) == "policy shop:copied failed in its worker: LookupError: no such page"


def test_present_pages_are_named_and_counted() -> None:
    page = 1 << 12
    error = errors.PagesPresent("image", [(0, page), (4 * page, 6 * page)], 0, page)
    assert "3 pages of image are present (offsets 0x0-0x1000, 0x4000-0x6000)" in str(error)
    many = errors.PagesPresent("image", [(at * page, (at + 1) * page) for at in range(99)], 0, page)
    assert "...)" in str(many)
    assert "2 pages of image are present in its memory file" in str(
        errors.PagesPresent("image", [], 2 * page, page)
    )
