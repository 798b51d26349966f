"""A userfaultfd: opening, adopting, the handshake, registration, operations, reading.

One object owns one descriptor and closes it once, after its last use, so that a recycled one is
never used.  Source: userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from uffdaemon import errors, native
from uffdaemon.errors import error_of
from uffdaemon.kernel.descriptor import (
    How,
    check_descriptor,
    closed_on_error,
    explain_handshake,
    features_of,
    open_descriptor,
    receive_descriptors,
    registration_error,
)
from uffdaemon.kernel.exact_copies import Copies
from uffdaemon.kernel.shared_fd import SharedFd
from uffdaemon.ranges import PAGE_SIZE, check_range
from uffdaemon.uapi.events import Event, parse
from uffdaemon.uapi.features import Features, IoctlSet, RegisterMode
from uffdaemon.uapi.outcomes import (
    CONTINUE_WRITE_PROTECT,
    COPY_WRITE_PROTECT,
    DONTWAKE,
    MOVE_ALLOW_SOURCE_HOLES,
    WRITEPROTECT_DONTWAKE,
    WRITEPROTECT_PROTECT,
    Code,
    Operation,
    Result,
    Status,
    result_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

CarryOut: TypeAlias = "Callable[[native.OperationArray, int], None]"
"""Carries out the first operations of an array; the second argument is how many."""

_MESSAGES, _OPERATIONS = 256, 64


class Userfaultfd:
    """A userfaultfd(2), which threads may share.  Addresses and lengths are in bytes."""

    def __init__(self, fd: int, features: Features, *, same_process: bool) -> None:
        self.in_use: SharedFd = SharedFd(fd)
        """A context manager that yields the descriptor, and keeps it open inside."""
        self.features = features
        """The features that the handshake granted."""
        self.same_process = same_process
        """Whether the memory belongs to this process: only then can pages be moved."""
        self.user_mode_only: bool | None = None
        """Whether system calls that touch a missing page fail with EFAULT; None: not known."""
        # For C, which has no GIL: each call takes one, so that threads can share this object.
        self._messages: list[native.MessageArray] = []
        self._operations: list[native.OperationArray] = []
        self.files: list[int] = []
        """Received with it, and closed with it unless they are taken out of this list."""
        self.on_close: list[Callable[[], None]] = []
        """Called before the descriptor is closed, so that a daemon stops serving it."""
        self.guards: object = None
        """The memory that it guards, and that closes it."""
        self.copies: Copies = Copies()
        """Exact copies that are under way."""

    def __repr__(self) -> str:
        whose = "this process" if self.same_process else "another process"
        state = "closed" if self.closed else f"fd={self.fileno()}"
        only = ", USER_MODE_ONLY" if self.user_mode_only else ""
        names = "|".join(self.features.names) or "no features"
        return f"<Userfaultfd {state} of {whose}{only}, {names}>"

    # -- opening and handing over --------------------------------------------------------------

    @classmethod
    def open(
        cls,
        features: Features = Features(0),  # noqa: B008  # immutable
        *,
        user_mode_only: bool = False,
        how: How = "auto",
    ) -> Self:
        """Open a userfaultfd for this process and negotiate `features`.

        `how` is "syscall", "device" (/dev/userfaultfd), or "auto": the first that works.  With
        `user_mode_only`, system calls that touch a missing page fail with EFAULT.

        Raises `PermissionRefused` with the command that helps, `FeatureMissing` with the features
        that this kernel lacks, and `OpenRefused` for other errors.
        """
        fd = open_descriptor(user_mode_only=user_mode_only, how=how)
        with closed_on_error(fd):
            number, granted, _ = native.handshake(fd, int(features))
            if number < 0:
                explain_handshake(-number, features)
            # The kernel reports all features that it has, not only those requested.
            opened = cls(fd, Features(granted) & features, same_process=True)
        opened.user_mode_only = user_mode_only
        return opened

    @classmethod
    def adopt(cls, fd: int, *, same_process: bool = False) -> Self:
        """Take over descriptor `fd`, whose handshake has been done.

        Raises `ClosedDescriptor`, `NotAUserfaultfd` or `BlockingDescriptor`; the caller then still
        owns the descriptor.
        """
        check_descriptor(fd)
        return cls(fd, features_of(fd), same_process=same_process)

    @classmethod
    def receive(cls, sock: socket.socket, max_message: int = 65536) -> tuple[Self, bytes]:
        """Receive a userfaultfd by SCM_RIGHTS, and the bytes of the message that carried it.

        The message is one read from the socket, of at most `max_message` bytes.  Raises EOFError
        at the end of the stream, `InvalidDescriptor` for anything but exactly one userfaultfd (all
        received descriptors are closed), and OSError from the socket, including BlockingIOError.

        Files that come with it, such as the memory file of a guest, are in `files`.
        """
        fd, files, message = receive_descriptors(sock, max_message)
        with closed_on_error(fd, *files):
            received = cls.adopt(fd)
        received.files = files
        return received, message

    @classmethod
    def from_process(cls, pid: int, fd: int) -> Self:
        """Duplicate descriptor `fd` of process `pid` with pidfd_getfd(2).

        Raises `OpenRefused` (ESRCH: no such process, EBADF: no such descriptor in it, EPERM: no
        right to trace it), and what `adopt` raises.
        """
        pidfd = native.pidfd_open(pid)
        if pidfd < 0:
            raise errors.OpenRefused(-pidfd, "pidfd_open", reason=f"process {pid}")
        try:
            ours = native.pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        if ours < 0:
            refused = errors.PermissionRefused if ours == -errno.EPERM else errors.OpenRefused
            raise refused(-ours, "pidfd_getfd", reason=f"descriptor {fd} of process {pid}")
        with closed_on_error(ours):
            return cls.adopt(ours)

    def send(self, sock: socket.socket, message: bytes) -> None:
        """Send a duplicate by SCM_RIGHTS, with `message` (ValueError: empty).  Raises OSError."""
        if not message:
            raise ValueError("a descriptor is sent with at least one byte of message")
        with self.in_use as fd:
            sent = socket.send_fds(sock, [message], [fd])
        if sent < len(message):
            sock.sendall(message[sent:])

    # -- the descriptor ------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor.  Raises `ClosedDescriptor` after `close`."""
        return self.in_use.number()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.in_use.closed

    def close(self) -> None:
        """Close the descriptor, once, after calls that use it in other threads.

        If this was the last descriptor in any process, the kernel resolves waiting and later faults
        with zeros: unmap or fill the memory first.  That of guarded memory raises BufferError.
        """
        if self.guards is not None:
            raise BufferError(f"{self!r} guards {self.guards!r}: close that, which closes this")
        while self.on_close:
            self.on_close.pop()()
        self.in_use.close()
        while self.files:
            os.close(self.files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- ranges --------------------------------------------------------------------------------

    def register(
        self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING
    ) -> IoctlSet:
        """UFFDIO_REGISTER: report faults of a range; returns the ioctls that the range supports.

        Raises `InvalidRange`, `RangeBusy` (registered with another userfaultfd), `FeatureMissing`
        for modes that this kernel lacks, and `RegistrationRefused` for other errors.
        """
        check_range(start, length, PAGE_SIZE, "the range to register")
        if mode & RegisterMode.RWP and not self.features & Features.RWP:
            raise errors.FeatureMissing("REGISTER", "RWP (Linux 7.3)", Features.RWP)
        with self.in_use as fd:
            number, ioctls = native.register(fd, start, length, int(mode))
        if number < 0:
            raise registration_error("REGISTER", -number, start, length)
        return IoctlSet(ioctls)

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER: wake the threads that wait in the range.  Its missing pages read as
        zeros from now on.  Raises `InvalidRange`, `RegistrationRefused`."""
        check_range(start, length, PAGE_SIZE, "the range to unregister")
        with self.in_use as fd:
            number = native.unregister(fd, start, length)
        if number < 0:
            raise registration_error("UNREGISTER", -number, start, length)

    # -- operations ----------------------------------------------------------------------------

    def execute(
        self, operations: Sequence[Operation], carry_out: CarryOut | None = None
    ) -> list[Result]:
        """Carry out operations in one C call without the GIL, each even if one before it fails.
        `carry_out` replaces the plain call.  Raises only `ClosedDescriptor`."""
        count = len(operations)
        array = native.take_spare(self._operations, partial(native.OperationArray, _OPERATIONS))
        if count > array.capacity:
            array = native.OperationArray(count)
        buffer, pack, size = array.buffer, native.OPERATION.pack_into, native.OPERATION.size
        at = 0
        for code, dst, length, src, mode, page_size in operations:
            pack(buffer, at, code, 0, dst, src, length, mode, page_size, 0, 0)
            at += size
        with self.in_use as fd:
            if carry_out is None:
                array.execute(fd, count)
            else:
                carry_out(array, count)
        unpack, at = native.OPERATION_RESULT.unpack_from, native.OPERATION_RESULT_OFFSET
        results = [
            result_of(operation, *unpack(buffer, index * size + at))
            for index, operation in enumerate(operations)
        ]
        self._operations.append(array)
        return results

    def _carry_out(self, operation: Operation) -> Result:
        [result] = self.execute((operation,))
        if result.status is Status.FAILED:
            raise error_of(result)
        return result

    def copy(
        self,
        dst: int,
        src: int | Buffer,
        length: int | None = None,
        *,
        write_protect: bool = False,
        wake: bool = True,
        page_size: int = PAGE_SIZE,
    ) -> Result:
        """UFFDIO_COPY from an address or a bytes-like object of this process to `dst`.

        `length` defaults to that of the object.  Present pages are skipped and counted, and
        their waiting threads are woken; `page_size` must be that of the memory (for hugetlb, of its
        huge pages).  Raises `OperationError`, `InvalidRange`, ValueError.
        """
        mode = (COPY_WRITE_PROTECT if write_protect else 0) | (0 if wake else DONTWAKE)
        if isinstance(src, int):
            if length is None:
                raise ValueError("copying from an address needs a length")
            return self._carry_out(Operation(Code.COPY, dst, length, src, mode, page_size))
        pinned = native.PinnedBuffer(src)
        try:
            if length is None:
                length = pinned.length
            elif length > pinned.length:
                raise errors.InvalidRange(f"{length} bytes of a source of {pinned.length} bytes")
            return self._carry_out(
                Operation(Code.COPY, dst, length, pinned.address, mode, page_size)
            )
        finally:
            pinned.release()

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> Result:
        """UFFDIO_ZEROPAGE: fill with zeros.  Raises `OperationError`; EINVAL for hugetlb."""
        mode = 0 if wake else DONTWAKE
        return self._carry_out(Operation(Code.ZEROPAGE, start, length, 0, mode, PAGE_SIZE))

    def move(
        self,
        dst: int,
        src: int,
        length: int,
        *,
        allow_source_holes: bool = False,
        wake: bool = True,
    ) -> Result:
        """UFFDIO_MOVE (Linux 6.8): move pages atomically; never a copy.

        Raises `PageNotExclusive` (EBUSY), `PlacementRefused` for memory of another process, and
        `OperationError`; its ``result`` has the bytes that did move.
        """
        if not self.same_process:
            raise errors.PlacementRefused(
                "UFFDIO_MOVE works only within the process that owns the memory: the kernel "
                "refuses it from any other"
            )
        mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
        return self._carry_out(
            Operation(Code.MOVE, dst, length, src, mode | (0 if wake else DONTWAKE))
        )

    def continue_(
        self,
        start: int,
        length: int,
        *,
        write_protect: bool = False,
        wake: bool = True,
        page_size: int = PAGE_SIZE,
    ) -> Result:
        """UFFDIO_CONTINUE: map pages of the page cache.  Raises `OperationError`."""
        mode = (CONTINUE_WRITE_PROTECT if write_protect else 0) | (0 if wake else DONTWAKE)
        return self._carry_out(Operation(Code.CONTINUE, start, length, 0, mode, page_size))

    def poison(
        self, start: int, length: int, *, wake: bool = True, page_size: int = PAGE_SIZE
    ) -> Result:
        """UFFDIO_POISON: touching the range is SIGBUS.  Raises `OperationError`."""
        mode = 0 if wake else DONTWAKE
        return self._carry_out(Operation(Code.POISON, start, length, 0, mode, page_size))

    def write_protect(
        self, start: int, length: int, *, protect: bool = True, wake: bool = True
    ) -> Result:
        """UFFDIO_WRITEPROTECT: protect, or unprotect and wake.  Raises `OperationError`; after
        ENOENT, parts of the range may have changed."""
        mode = WRITEPROTECT_PROTECT if protect else 0
        # The kernel accepts DONTWAKE only to unprotect; protecting wakes no thread.
        if not protect and not wake:
            mode |= WRITEPROTECT_DONTWAKE
        return self._carry_out(Operation(Code.WRITEPROTECT, start, length, 0, mode))

    def wake(self, start: int, length: int) -> Result:
        """UFFDIO_WAKE: wake the threads that wait in the range.  Raises `OperationError`."""
        return self._carry_out(Operation(Code.WAKE, start, length))

    def rwprotect(self, start: int, length: int) -> Result:
        """UFFDIO_RWPROTECT of Linux 7.3, not implemented: always raises `FeatureMissing`."""
        del start, length
        raise errors.FeatureMissing("RWPROTECT", "RWP (Linux 7.3)", Features.RWP)

    def set_mode(self, mode: int) -> None:
        """UFFDIO_SET_MODE of Linux 7.3, not implemented: always raises `FeatureMissing`."""
        del mode
        raise errors.FeatureMissing("SET_MODE", "RWP (Linux 7.3)", Features.RWP)

    # -- messages ------------------------------------------------------------------------------

    def read_events(self, rereads: int = 0) -> list[Event]:
        """Read all pending messages; [] if there are none after `rereads` further tries.

        The caller owns the descriptors in fork events.  It reads until nothing is left, because the
        kernel returns faults before earlier events.  Raises `ClosedDescriptor`, and `OpenRefused`
        (EINVAL: no handshake).
        """
        array = native.take_spare(self._messages, partial(native.MessageArray, _MESSAGES))
        events: list[Event] = []
        with self.in_use as fd:
            count = array.read(fd, rereads)
            while count > 0:
                events += parse(array.buffer, count)
                if count < array.size:
                    break
                count = array.read(fd, 0)
        self._messages.append(array)
        if count < 0 and count != native.NOTHING and not events:
            raise errors.OpenRefused(-count, "read", reason="reading the userfaultfd")
        return events
