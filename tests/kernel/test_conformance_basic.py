"""The kernel's tests UFFDIO_API, register-ioctls, zeropage, poison, mmap-changing."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from itertools import product
from typing import TYPE_CHECKING, Literal

import pytest

from tests.kernel.conformance import (
    MINOR,
    MISSING,
    WP,
    Handler,
    conformance,
    content,
    content_of,
    discard,
    map_area,
    page_offsets,
    placed,
)
from tests.support.calls import in_thread
from tests.support.clib import Helpers
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_event, wait_readable
from uffdaemon import MemoryType, native
from uffdaemon.errors import FeatureMissing, OperationError, RegistrationRefused
from uffdaemon.lowlevel import (
    Code,
    Features,
    IoctlSet,
    Operation,
    RegisterMode,
    RemoveEvent,
    Status,
    Userfaultfd,
)

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.uapi.events import PageFault

_UFFDIO_API = 0xC018AA3F


@pytest.mark.smoke
@pytest.mark.conformance("UFFDIO_API")
@pytest.mark.parametrize("how", ["syscall", "device"])
@kernel_test()
def test_api(how: Literal["syscall", "device"]) -> None:
    with pytest.raises(FeatureMissing, match="bit 63") as caught:
        Userfaultfd.open(Features(1 << 63), how=how)
    assert caught.value.missing == Features(1 << 63)

    opened = native.open_syscall if how == "syscall" else native.open_device
    fd = opened(user_mode_only=False)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAB, 0, 0)))
    os.close(fd)

    with Userfaultfd.open(how=how) as uffd:
        number, _, _ = native.handshake(uffd.fileno(), int(Features.PAGEFAULT_FLAG_WP))
        assert number == -errno.EINVAL


@conformance("register-ioctls", MISSING | MINOR | WP)
def test_register_ioctls(kind: MemoryType) -> None:
    with Userfaultfd.open(MISSING | MINOR | WP) as uffd, map_area(kind) as memory:
        for missing, write_protect, minor in product((False, True), repeat=3):
            mode, expected = RegisterMode(0), IoctlSet.WAKE
            if missing:
                mode, expected = mode | RegisterMode.MISSING, expected | IoctlSet.COPY
            if write_protect:
                mode, expected = mode | RegisterMode.WP, expected | IoctlSet.WRITEPROTECT
            if minor:
                mode, expected = mode | RegisterMode.MINOR, expected | IoctlSet.CONTINUE
            if not mode or (minor and kind is MemoryType.ANONYMOUS):
                with pytest.raises(RegistrationRefused) as caught:
                    uffd.register(memory.start, memory.page_size, mode)
                assert caught.value.errno == errno.EINVAL
                assert caught.value.address == memory.start
                assert caught.value.length == memory.page_size
                continue
            ioctls = uffd.register(memory.start, memory.page_size, mode)
            assert ioctls & expected == expected
            uffd.unregister(memory.start, memory.page_size)


@conformance("zeropage")
def test_zeropage(kind: MemoryType) -> None:
    with Userfaultfd.open() as uffd, map_area(kind) as memory:
        page = memory.page_size
        ioctls = uffd.register(memory.start, page)
        assert bool(ioctls & IoctlSet.ZEROPAGE) is not kind.huge
        if kind.huge:
            with pytest.raises(OperationError) as caught:
                uffd.zeropage(memory.start, page)
            assert caught.value.errno == errno.EINVAL
            assert caught.value.result.progress == 0
            return
        placed(uffd.zeropage(memory.start, page))
        ranges = [memory.start]
        if kind.shared:
            alias = memory.alias()
            uffd.register(alias.start, page)
            ranges.append(alias.start)
        for start in ranges:
            again = uffd.zeropage(start, page)
            assert again.complete
            assert (again.done, again.present) == (0, page)
            # page_size 0: what is present is not stepped over, and the errno shows.
            [refused] = uffd.execute([Operation(Code.ZEROPAGE, start, page)])
            assert (refused.status, refused.error) == (Status.FAILED, errno.EEXIST)
        assert memory.read(0, page) == bytes(page)
        uffd.unregister(memory.start, page)


@conformance("poison", Features.POISON)
def test_poison(kind: MemoryType, helpers: Path) -> None:
    library = Helpers(helpers)
    with Userfaultfd.open(Features.POISON) as uffd, map_area(kind) as memory:
        page = memory.page_size
        ioctls = uffd.register(memory.start, memory.length)
        assert ioctls & IoctlSet.COPY
        assert ioctls & IoctlSet.POISON

        def answer(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            if offset // page % 2:
                placed(uffd.copy(memory.start + offset, content(offset, page)))
            else:
                placed(uffd.poison(memory.start + offset, page))

        handler = Handler(memory.start, page, answer)
        running = in_thread(handler.run, uffd)
        # BUS_MCEERR_AR, or BUS_ADRERR from a kernel that was built without MEMORY_FAILURE.
        hit = [offset for offset in page_offsets(memory) if library.touch(memory.start + offset)]
        assert hit == [offset for offset in page_offsets(memory) if offset // page % 2 == 0]
        for offset in page_offsets(memory):
            if offset not in hit:
                assert memory.read(offset, page) == content(offset, page)
        # A poisoned page stays so, and is in the way of any other; discarding heals it.
        again = uffd.poison(memory.start, page, page_size=page)
        assert (again.done, again.present) == (0, page)
        discard(memory, 0, page)
        placed(uffd.copy(memory.start, content(0, page)))
        assert library.touch(memory.start) == 0
        handler.stop.cross()
        counts = running.result()
        assert counts.missing == counts.faults == memory.length // page


@conformance("mmap-changing", Features.EVENT_REMOVE | Features.POISON | Features.MOVE | MINOR)
def test_mmap_changing(kind: MemoryType) -> None:
    features = Features.EVENT_REMOVE | Features.POISON | Features.MOVE | MINOR
    with Userfaultfd.open(features) as uffd, map_area(kind) as memory, map_area(kind) as other:
        page, start = memory.page_size, memory.start
        mode = RegisterMode.MISSING
        if kind is not MemoryType.ANONYMOUS:
            mode |= RegisterMode.MINOR
        uffd.register(start, memory.length, mode)
        discarding = in_thread(discard, memory, 0, page)
        wait_readable(uffd)

        # The kernel asks whether the memory is changing before it looks at what else is wrong.
        data = bytes(page)
        for result in (
            uffd.copy(start, data),
            uffd.zeropage(start, page),
            uffd.move(start, other.start, page),
            uffd.poison(start, page),
            uffd.continue_(start, page),
        ):
            name = result.operation.code.name
            assert (name, result.status) == (name, Status.RETRY)
            assert (result.error, result.progress) == (errno.EAGAIN, 0)
        assert discarding.running

        assert next_event(uffd) == RemoveEvent(start, start + page)
        discarding.result()
        placed(uffd.copy(start, content_of(memory)))
        assert memory.read(0, memory.length) == content_of(memory)
