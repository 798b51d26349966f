"""Userfaultfds that come from elsewhere: a number, a socket, another process."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.kernel.privileges import become_nobody, needs_root
from tests.support.calls import Barrier, in_child
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.page_contents import PAGE
from uffdaemon import Memory, native
from uffdaemon.errors import (
    BlockingDescriptor,
    ClosedDescriptor,
    NotAUserfaultfd,
    OpenRefused,
    PermissionRefused,
    PlacementRefused,
)
from uffdaemon.lowlevel import Features, Status, Userfaultfd


def _open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


# -- by number ---------------------------------------------------------------------------------


@kernel_test(features=Features.THREAD_ID)
def test_adopting_keeps_the_features() -> None:
    with Userfaultfd.open(Features.THREAD_ID | Features.SIGBUS) as uffd:
        adopted = Userfaultfd.adopt(os.dup(uffd.fileno()))
        assert adopted.features == uffd.features
        assert not adopted.same_process
        adopted.close()
        ours = Userfaultfd.adopt(os.dup(uffd.fileno()), same_process=True)
        assert ours.same_process


@kernel_test()
def test_a_pipe_is_no_userfaultfd_and_stays_the_callers() -> None:
    end, _ = os.pipe()
    with pytest.raises(NotAUserfaultfd, match=rf"descriptor {end} is not a userfaultfd but pipe:"):
        Userfaultfd.adopt(end)
    os.fstat(end)


@kernel_test()
def test_a_closed_number_is_named() -> None:
    end, _ = os.pipe()
    os.close(end)
    with pytest.raises(ClosedDescriptor, match=rf"descriptor {end} is not open"):
        Userfaultfd.adopt(end)


@kernel_test()
def test_a_blocking_userfaultfd_is_refused_with_the_line_that_mends_it() -> None:
    with Userfaultfd.open() as uffd:
        os.set_blocking(uffd.fileno(), True)
        with pytest.raises(BlockingDescriptor, match=rf"os.set_blocking\({uffd.fileno()}, False\)"):
            Userfaultfd.adopt(uffd.fileno())


@kernel_test()
def test_a_userfaultfd_without_handshake_is_refused() -> None:
    fd = native.open_syscall(user_mode_only=True)
    with pytest.raises(NotAUserfaultfd, match="has had no handshake"):
        Userfaultfd.adopt(fd)
    os.fstat(fd)


# -- by socket ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stream", "seqpacket"])
@kernel_test()
def test_a_userfaultfd_travels_with_its_message(how: str) -> None:
    kind = socket.SOCK_STREAM if how == "stream" else socket.SOCK_SEQPACKET
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with Userfaultfd.open(Features.SIGBUS) as uffd:
        uffd.send(theirs, b'{"start": 4096}')
        received, message = Userfaultfd.receive(ours)
        assert message == b'{"start": 4096}'
        assert received.features == Features.SIGBUS
        assert not received.same_process
        assert not os.get_inheritable(received.fileno())
        # Nothing is left behind, and no empty message that would pass for the end.
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            Userfaultfd.receive(ours)
        theirs.close()
        with pytest.raises(EOFError):
            Userfaultfd.receive(ours)


@kernel_test()
def test_a_long_message_arrives_whole_or_as_its_beginning() -> None:
    ours, theirs = socket.socketpair()
    message = os.urandom(40_000)
    with Userfaultfd.open() as uffd:
        uffd.send(theirs, message)
        _, beginning = Userfaultfd.receive(ours, 1000)
        assert beginning == message[:1000]
        rest = b""
        while len(rest) < 39_000:
            rest += ours.recv(65536)
        assert beginning + rest == message
        with pytest.raises(ValueError, match="at least one byte"):
            uffd.send(theirs, b"")


@kernel_test()
def test_anything_but_one_userfaultfd_is_refused_and_closed() -> None:
    ours, theirs = socket.socketpair()
    with Userfaultfd.open() as uffd:
        end, _ = os.pipe()
        before = _open_descriptors()
        theirs.sendall(b"none")
        with pytest.raises(NotAUserfaultfd, match="carries 0 descriptors"):
            Userfaultfd.receive(ours)
        socket.send_fds(theirs, [b"two"], [uffd.fileno(), uffd.fileno()])
        with pytest.raises(NotAUserfaultfd, match="carries 2 descriptors"):
            Userfaultfd.receive(ours)
        socket.send_fds(theirs, [b"pipe"], [end])
        with pytest.raises(NotAUserfaultfd, match="not a userfaultfd but pipe:"):
            Userfaultfd.receive(ours)
        assert _open_descriptors() == before


@kernel_test()
def test_files_that_come_with_it_are_received_too() -> None:
    ours, theirs = socket.socketpair()
    with Userfaultfd.open(Features.THREAD_ID) as uffd:
        before = _open_descriptors()
        first, second = os.memfd_create("first"), os.memfd_create("second")
        os.write(second, b"second")
        for fds in ([uffd.fileno(), first, second], [first, uffd.fileno(), second]):
            socket.send_fds(theirs, [b"a guest"], fds)
            received, message = Userfaultfd.receive(ours)
            assert message == b"a guest"
            assert received.features == Features.THREAD_ID
            assert os.pread(received.files[1], 9, 0) == b"second"
            assert not any(os.get_inheritable(fd) for fd in received.files)
            kept = received.files.pop(0)
            received.close()
            assert received.files == []
            assert os.fstat(kept).st_ino == os.fstat(first).st_ino
            os.close(kept)
        os.close(first)
        os.close(second)
        assert _open_descriptors() == before


@kernel_test()
def test_other_control_messages_are_passed_over() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with Userfaultfd.open() as uffd:
        uffd.send(theirs, b"with credentials")
        received, message = Userfaultfd.receive(ours)
        assert message == b"with credentials"
        received.close()


@kernel_test()
def test_the_end_of_the_stream_is_an_eof_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(EOFError):
        Userfaultfd.receive(ours)


@pytest.mark.smoke
@kernel_test()
def test_another_process_is_served_and_its_death_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    answered = Barrier()

    def client() -> None:
        memory = Memory.map(4 * PAGE)
        uffd = Userfaultfd.open()
        uffd.register(memory.start, memory.length)
        uffd.send(theirs, str(memory.start).encode())
        assert memory.read(0, 3) == b"abc"
        answered.cross()
        signal.pause()

    process = in_child(client)
    uffd, message = Userfaultfd.receive(ours)
    start = int(message)
    assert next_fault(uffd).address == start
    # A handler outside cannot move, whatever it is told.
    with pytest.raises(PlacementRefused, match="only within the process"):
        uffd.move(start, start + PAGE, PAGE)
    result = uffd.copy(start, b"abc" + bytes(PAGE - 3))
    assert (result.status, result.done) == (Status.DONE, PAGE)
    answered.wait()

    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == signal.SIGKILL
    assert uffd.read_events() == []
    gone = uffd.copy(start + PAGE, bytes(2 * PAGE))
    assert (gone.status, gone.error, gone.done) == (Status.CLIENT_GONE, errno.ESRCH, 0)
    assert not gone.complete
    for result in (
        uffd.zeropage(start + PAGE, PAGE),
        uffd.write_protect(start, PAGE),
        uffd.poison(start + PAGE, PAGE),
        uffd.continue_(start + PAGE, PAGE),
    ):
        assert result.status is Status.CLIENT_GONE, result


# -- from another process ----------------------------------------------------------------------


@kernel_test()
def test_a_descriptor_is_taken_from_a_process() -> None:
    with Userfaultfd.open(Features.SIGBUS) as uffd:
        number = uffd.fileno()
        process = in_child(signal.pause)
    assert uffd.closed
    taken = Userfaultfd.from_process(process.pid, number)
    assert taken.features == Features.SIGBUS
    assert not taken.same_process

    with pytest.raises(NotAUserfaultfd):
        Userfaultfd.from_process(process.pid, 0)
    with pytest.raises(OpenRefused, match=rf"descriptor 999 of process {process.pid}") as bad:
        Userfaultfd.from_process(process.pid, 999)
    assert bad.value.errno == errno.EBADF

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(OpenRefused, match=f"process {process.pid}") as gone:
        Userfaultfd.from_process(process.pid, number)
    assert gone.value.errno == errno.ESRCH


@kernel_test()
def test_taking_from_a_process_takes_the_right_to_trace_it() -> None:
    needs_root()
    number = Userfaultfd.open().fileno()
    parent = os.getpid()

    def take() -> str:
        become_nobody()
        with pytest.raises(PermissionRefused) as caught:
            Userfaultfd.from_process(parent, number)
        return str(caught.value)

    assert f"descriptor {number} of process {parent}" in in_child(take).result()
