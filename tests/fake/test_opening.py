"""The ways in: what comes out of the block of `open_daemon`, and what fills ask their policy."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import trio

from uffdaemon import ByKind, BytesSource, CopyFrom, FaultAround, Unprotect, ZeroPage, open_daemon
from uffdaemon.daemon.entry import DaemonOptions
from uffdaemon.daemon.fill import copy_of
from uffdaemon.errors import PlacementRefused


@pytest.mark.parametrize("native_sleep", [True, False])
async def test_what_the_block_raises_comes_out_as_it_is(native_sleep: bool) -> None:
    raised = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with open_daemon(native_sleep=native_sleep):
            raise raised
    assert caught.value is raised


async def test_a_cancelled_block_ends_as_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with open_daemon():
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


def test_serve_takes_every_option_of_open_daemon() -> None:
    assert DaemonOptions.__annotations__.keys() == inspect.signature(open_daemon).parameters.keys()


def test_a_fill_copies_what_the_policy_copies() -> None:
    source = BytesSource(bytes(8192))
    copies = CopyFrom(source, 4096, write_protect=True)
    for policy in (copies, FaultAround(copies, 8), ByKind(missing=FaultAround(copies, 8))):
        copy = copy_of(policy)
        assert (copy.source, copy.offset, copy.write_protect) == (source, 4096, True)


@pytest.mark.parametrize("policy", [ZeroPage(), ByKind(write_protect=Unprotect())], ids=repr)
def test_a_fill_says_when_it_does_not_know_what_to_copy(policy: ZeroPage | ByKind) -> None:
    with pytest.raises(PlacementRefused, match="pass the source to fill"):
        copy_of(policy)


async def test_shutdown_is_a_word_that_is_known() -> None:
    unknown: Any = "bogus"
    with pytest.raises(ValueError, match="bogus"):
        async with open_daemon(on_shutdown=unknown):
            pytest.fail("it was accepted")
    known: Any = "resolve"
    async with open_daemon(on_shutdown=known):
        pass
