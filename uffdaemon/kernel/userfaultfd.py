"""The owner of a userfaultfd: opening, adopting, the handshake, registration, the operations.

One object owns one descriptor and closes it once; the number becomes -1 before it is closed, so
that nobody can hit a recycled one.  Source: userfaultfd(2), ioctl_userfaultfd(2).
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
    explain_handshake,
    features_of,
    open_descriptor,
    receive_descriptor,
    registration_error,
)
from uffdaemon.kernel.exact_copies import Copies
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
"""Carries out the first so many operations of an array."""

_MESSAGES = 256
_OPERATIONS = 64


class Userfaultfd:
    """One userfaultfd, made by `open`, `adopt`, `receive` or `from_process`."""

    def __init__(self, fd: int, features: Features, *, same_process: bool) -> None:
        self._fd = fd
        self.features = features
        """What the handshake granted."""
        self.same_process = same_process
        """Whether the memory is this process's own: only then can pages be moved."""
        # Buffers that C works on without the GIL: each call takes one, so that threads can share
        # this object.
        self._messages: list[native.MessageArray] = []
        self._operations: list[native.OperationArray] = []
        self.on_close: list[Callable[[], None]] = []
        """Called before the descriptor is closed: whoever serves it lets go of it then."""
        self.copies = Copies()
        """What is being copied in the place of a move."""

    def __repr__(self) -> str:
        whose = "this process" if self.same_process else "another process"
        return f"<Userfaultfd fd={self._fd} of {whose}, {'|'.join(self.features.names)}>"

    # -- where it comes from -------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        features: Features = Features(0),  # noqa: B008  # immutable
        *,
        user_mode_only: bool = False,
        how: How = "auto",
    ) -> Self:
        """Open a userfaultfd for this process and negotiate `features`.

        ``how`` is the system call, /dev/userfaultfd, or the first of the two that works.  With
        `user_mode_only`, system calls that touch a missing page fail with EFAULT.

        Raises `PermissionRefused` with the line that mends it, `FeatureMissing` with the features
        that this kernel lacks, `OpenRefused` for anything else.
        """
        fd = open_descriptor(user_mode_only=user_mode_only, how=how)
        try:
            number, granted, _ = native.handshake(fd, int(features))
            if number < 0:
                explain_handshake(-number, features)
            # The kernel reports all that it has; what counts is what was asked for.
            return cls(fd, Features(granted) & features, same_process=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, fd: int, *, same_process: bool = False) -> Self:
        """Take over the descriptor `fd`, whose handshake has been done.

        Raises `ClosedDescriptor`, `NotAUserfaultfd`, or `BlockingDescriptor`; the descriptor is
        then still the caller's.
        """
        check_descriptor(fd)
        return cls(fd, features_of(fd), same_process=same_process)

    @classmethod
    def receive(cls, sock: socket.socket, max_message: int = 65536) -> tuple[Self, bytes]:
        """Receive a userfaultfd by SCM_RIGHTS, and the bytes of the message that carried it.

        The message is one read from the socket, of at most `max_message` bytes.  Raises EOFError
        at the end of the stream, `InvalidDescriptor` for anything but exactly one userfaultfd
        (whatever came is closed), and OSError from the socket (BlockingIOError included).
        """
        fd, message = receive_descriptor(sock, max_message)
        try:
            return cls.adopt(fd), message
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_process(cls, pid: int, fd: int) -> Self:
        """Duplicate descriptor `fd` of process `pid` by pidfd_getfd(2).

        Raises `OpenRefused` (ESRCH: no such process, EBADF: no such descriptor there, EPERM: no
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
        try:
            return cls.adopt(ours)
        except BaseException:
            os.close(ours)
            raise

    def send(self, sock: socket.socket, message: bytes) -> None:
        """Hand a duplicate over by SCM_RIGHTS, with `message` (not empty); ours stays open."""
        if not message:
            raise ValueError("descriptors travel with at least one byte of message")
        sent = socket.send_fds(sock, [message], [self.fileno()])
        if sent < len(message):
            sock.sendall(message[sent:])

    # -- the descriptor ------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor.  Raises `ClosedDescriptor` after `close`."""
        if self._fd < 0:
            raise errors.ClosedDescriptor("this userfaultfd has been closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; again is nothing.

        When this was the last one anywhere, the kernel answers waiting and later faults with
        zeros: unmap or complete the memory first.
        """
        while self.on_close:
            self.on_close.pop()()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

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
        """Watch a range of bytes, and return what it answers to.

        Raises `InvalidRange`, `RangeBusy` (another userfaultfd watches it), `FeatureMissing` for
        modes that this kernel lacks, `RegistrationRefused` for what else the kernel dislikes.
        """
        check_range(start, length, PAGE_SIZE, "the range to register")
        if mode & RegisterMode.RWP and not self.features & Features.RWP:
            raise errors.FeatureMissing("REGISTER", "RWP (Linux 7.3)", Features.RWP)
        number, ioctls = native.register(self.fileno(), start, length, int(mode))
        if number < 0:
            raise registration_error("REGISTER", -number, start, length)
        return IoctlSet(ioctls)

    def unregister(self, start: int, length: int) -> None:
        """Stop watching a range.  Whoever waits in it is woken; pages missing there read as zeros
        from now on."""
        check_range(start, length, PAGE_SIZE, "the range to unregister")
        number = native.unregister(self.fileno(), start, length)
        if number < 0:
            raise registration_error("UNREGISTER", -number, start, length)

    # -- operations ----------------------------------------------------------------------------

    def execute(
        self, operations: Sequence[Operation], carry_out: CarryOut | None = None
    ) -> list[Result]:
        """Carry out operations in one C call without the GIL; raises nothing but
        `ClosedDescriptor`: each result says how far it came.  One that fails does not keep the
        next from being tried.  `carry_out` does it in the place of the plain call."""
        fd = self.fileno()
        count = len(operations)
        array = native.take_spare(self._operations, partial(native.OperationArray, _OPERATIONS))
        if count > array.capacity:
            array = native.OperationArray(count)
        buffer, pack, size = array.buffer, native.OPERATION.pack_into, native.OPERATION.size
        at = 0
        for code, dst, length, src, mode, page_size in operations:
            pack(buffer, at, code, 0, dst, src, length, mode, page_size, 0, 0)
            at += size
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

        `length` (bytes) defaults to that of the object.  Pages found present are stepped over,
        woken, and counted; `page_size` (bytes) is how far to step, and so must be the memory's
        own: that of its huge pages for hugetlb.  Raises `OperationError`.
        """
        mode = (COPY_WRITE_PROTECT if write_protect else 0) | (0 if wake else DONTWAKE)
        if isinstance(src, int):
            if length is None:
                raise ValueError("copying from an address takes a length")
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
        """UFFDIO_ZEROPAGE.  Raises `OperationError`; EINVAL for hugetlb."""
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
        """UFFDIO_MOVE: strictly, atomically, and never a copy.

        Raises `PageNotExclusive` (EBUSY), `PlacementRefused` when the memory is another
        process's, and `OperationError` with the bytes that did move in its ``result``.
        """
        if not self.same_process:
            raise errors.PlacementRefused(
                "UFFDIO_MOVE works only from inside of the process whose memory it is: the kernel "
                "refuses it from outside"
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
        """UFFDIO_CONTINUE: map what the page cache holds.  Raises `OperationError`."""
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
        ENOENT, parts may have changed."""
        mode = WRITEPROTECT_PROTECT if protect else 0
        # The kernel takes DONTWAKE only when unprotecting; protecting wakes nobody.
        if not protect and not wake:
            mode |= WRITEPROTECT_DONTWAKE
        return self._carry_out(Operation(Code.WRITEPROTECT, start, length, 0, mode))

    def wake(self, start: int, length: int) -> Result:
        """UFFDIO_WAKE: let whoever waits in the range try again.  Raises `OperationError`."""
        return self._carry_out(Operation(Code.WAKE, start, length))

    def rwprotect(self, start: int, length: int) -> Result:
        """UFFDIO_RWPROTECT of Linux 7.3, which is known by name only: always refused."""
        del start, length
        raise errors.FeatureMissing("RWPROTECT", "RWP (Linux 7.3)", Features.RWP)

    def set_mode(self, mode: int) -> None:
        """UFFDIO_SET_MODE of Linux 7.3, which is known by name only: always refused."""
        del mode
        raise errors.FeatureMissing("SET_MODE", "RWP (Linux 7.3)", Features.RWP)

    # -- messages ------------------------------------------------------------------------------

    def read_events(self, rereads: int = 0) -> list[Event]:
        """Read all that is pending; [] when that is nothing, after `rereads` further tries.

        Fork events carry descriptors that are the caller's from now on.  Reads on until the
        kernel has nothing left, since it hands out faults before events that happened earlier.
        Raises OSError (EBADF, EINVAL: no handshake).
        """
        fd = self.fileno()
        array = native.take_spare(self._messages, partial(native.MessageArray, _MESSAGES))
        events: list[Event] = []
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
