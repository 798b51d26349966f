"""What a test needs of the machine, and the reason for which it is skipped without it."""

from __future__ import annotations

import errno
import functools
import os
from typing import NoReturn

import pytest

from uffdaemon.errors import FeatureMissing, OpenRefused, PermissionRefused
from uffdaemon.lowlevel import Features, Userfaultfd

REQUIRED = "UFFDAEMON_REQUIRE_KERNEL"


def require(features: Features, *, user_mode_only: bool = False) -> None:
    """Skip the test unless a userfaultfd with `features` can be opened here."""
    reason, advice = _obstacle(features, user_mode_only)
    if advice:
        unavailable(reason, advice)
    if reason:
        pytest.skip(reason)


def unavailable(reason: str, advice: str) -> NoReturn:
    """Skip for want of permission, which `advice` mends; fail where the kernel tier must run."""
    text = f"{reason}; {advice}"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{text} ({REQUIRED} is set)", pytrace=False)
    pytest.skip(text)


def explain_refusal(refused: PermissionRefused) -> tuple[str, str]:
    """What was refused, and what mends it."""
    name = errno.errorcode.get(refused.number, str(refused.number))
    return f"{refused.operation}: {name}", refused.advice or "it takes root"


@functools.cache
def _obstacle(features: Features, user_mode_only: bool) -> tuple[str, str]:
    try:
        Userfaultfd.open(features, user_mode_only=user_mode_only).close()
    except PermissionRefused as refused:
        return explain_refusal(refused)
    except FeatureMissing as refused:
        names = ", ".join((refused.missing or features).names)
        return f"this kernel does not have {names}", ""
    except OpenRefused as refused:
        return f"no userfaultfd: {refused.strerror}", ""
    return "", ""
