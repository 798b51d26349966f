"""What root has, given up."""

from __future__ import annotations

import os

import pytest

_NOBODY = 65534


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root, to give it up")


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
