"""Opening a userfaultfd: the ways in, the handshake, and what refusals say."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Literal

import pytest

from tests.kernel.privileges import become_nobody, needs_root
from tests.support.calls import in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.page_contents import PAGE
from uffdaemon import Memory, native
from uffdaemon.errors import ClosedDescriptor, FeatureMissing, PermissionRefused
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd, supported_features
from uffdaemon.uapi.outcomes import Code, Operation, Status

How = Literal["auto", "syscall", "device"]
_CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION_3 = 0x20080522


def _drop_ptrace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("=6I", data.raw))
    words[0] &= ~(1 << _CAP_SYS_PTRACE)
    assert libc.capset(header, struct.pack("=6I", *words)) == 0


def _write_from(address: int) -> int:
    """Let write(2) touch a byte; return the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    read_end, write_end = os.pipe()
    try:
        return ctypes.get_errno() if libc.write(write_end, address, 1) < 0 else 0
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["auto", "syscall", "device"])
@kernel_test()
def test_every_way_of_opening_serves_faults_of_system_calls(how: How) -> None:
    with Userfaultfd.open(how=how) as uffd, Memory.map(PAGE) as memory:
        assert uffd.same_process
        assert not os.get_blocking(uffd.fileno())
        assert not os.get_inheritable(uffd.fileno())
        uffd.register(memory.start, PAGE)
        call = in_thread(_write_from, memory.start)
        assert next_fault(uffd).address == memory.start
        uffd.zeropage(memory.start, PAGE)
        assert call.result() == 0


@pytest.mark.parametrize("how", ["auto", "syscall"])
@kernel_test(user_mode_only=True)
def test_user_mode_only_leaves_system_calls_with_efault(how: How) -> None:
    _leaves_system_calls_with_efault(how)


@kernel_test()
def test_user_mode_only_goes_by_the_device_too() -> None:
    _leaves_system_calls_with_efault("device")


def _leaves_system_calls_with_efault(how: How) -> None:
    with Userfaultfd.open(user_mode_only=True, how=how) as uffd, Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE)
        assert _write_from(memory.start) == errno.EFAULT
        assert uffd.read_events() == []
        reader = in_thread(memory.read, 0, 1)
        assert next_fault(uffd).address == memory.start
        uffd.copy(memory.start, b"x" * PAGE)
        assert reader.result() == b"x"


@kernel_test()
def test_without_privilege_the_refusal_says_what_mends_it() -> None:
    needs_root()
    with open("/proc/sys/vm/unprivileged_userfaultfd") as setting:
        if int(setting.read()):
            pytest.skip("vm.unprivileged_userfaultfd is 1 here: nobody is refused")

    def try_all() -> dict[str, tuple[int, str, str]]:
        become_nobody()
        refused = {}
        for how in ("auto", "syscall", "device"):
            try:
                Userfaultfd.open(how=how)
            except PermissionRefused as error:
                refused[how] = (error.number, error.advice, str(error))
        # And this is open to everybody.
        Userfaultfd.open(user_mode_only=True).close()
        assert supported_features() != Features(0)
        return refused

    refused = in_child(try_all).result()
    assert refused.keys() == {"auto", "syscall", "device"}
    for number, advice, text in refused.values():
        assert number in (errno.EPERM, errno.EACCES)
        assert advice in text
    assert "sysctl vm.unprivileged_userfaultfd=1" in refused["auto"][1]
    assert "sysctl vm.unprivileged_userfaultfd=1" in refused["syscall"][1]
    assert "chmod 666 /dev/userfaultfd" in refused["device"][1]
    assert "/dev/userfaultfd" in refused["device"][2]


@kernel_test(features=Features.EVENT_FORK)
def test_fork_events_without_their_capability_are_refused_by_name() -> None:
    needs_root()
    _drop_ptrace()
    with pytest.raises(PermissionRefused, match="EVENT_FORK") as caught:
        Userfaultfd.open(Features.EVENT_FORK, how="device")
    assert "CAP_SYS_PTRACE" in caught.value.advice


@kernel_test()
def test_what_is_granted_is_what_was_asked_for() -> None:
    supported = supported_features()
    for feature in Features:
        if feature not in supported:
            with pytest.raises(FeatureMissing, match=str(feature.name)) as caught:
                Userfaultfd.open(feature)
            assert caught.value.missing == feature
        else:
            with Userfaultfd.open(feature) as uffd:
                assert uffd.features == feature


@kernel_test()
def test_missing_features_are_named_and_those_that_are_there_are_not() -> None:
    with pytest.raises(FeatureMissing, match=r"this kernel does not have it: bit 40, bit 63$"):
        Userfaultfd.open(Features(1 << 63 | 1 << 40) | Features.SIGBUS)


@kernel_test()
def test_rwp_is_known_by_name_and_refused() -> None:
    if Features.RWP in supported_features():
        pytest.skip("this kernel has RWP")
    with pytest.raises(FeatureMissing, match="this kernel does not have it: RWP"):
        Userfaultfd.open(Features.RWP)
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        for refused in (
            lambda: uffd.register(memory.start, PAGE, RegisterMode.RWP),
            lambda: uffd.rwprotect(memory.start, PAGE),
            lambda: uffd.set_mode(1),
        ):
            with pytest.raises(FeatureMissing, match="this kernel does not have it: RWP") as caught:
                refused()
            assert caught.value.missing == Features.RWP


@kernel_test()
def test_closing_waits_for_calls_that_are_under_way() -> None:
    uffd = Userfaultfd.open()
    fd = uffd.fileno()
    with Memory.map(PAGE) as memory:
        uffd.register(memory.start, PAGE)

        def close_first(array: native.OperationArray, count: int) -> None:
            in_thread(uffd.close).result()
            assert uffd.closed
            array.execute(fd, count)

        [result] = uffd.execute([Operation(Code.ZEROPAGE, memory.start, PAGE)], close_first)
        assert result.status is Status.DONE
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@kernel_test()
def test_a_closed_userfaultfd_says_so() -> None:
    uffd = Userfaultfd.open()
    fd = uffd.fileno()
    uffd.close()
    uffd.close()
    assert uffd.closed
    # The number is somebody else's now, and nothing may touch it.
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == fd
    uffd.close()
    os.fstat(other)
    for call in (
        uffd.fileno,
        uffd.read_events,
        lambda: uffd.zeropage(0, PAGE),
        lambda: uffd.execute([]),
        lambda: uffd.register(0, PAGE),
        lambda: uffd.unregister(0, PAGE),
    ):
        with pytest.raises(ClosedDescriptor):
            call()


@kernel_test()
def test_a_userfaultfd_reads_well() -> None:
    with Userfaultfd.open(Features.THREAD_ID) as uffd:
        fd = uffd.fileno()
        assert repr(uffd) == f"<Userfaultfd fd={fd} of this process, THREAD_ID>"
        assert uffd.user_mode_only is False
        with Userfaultfd.adopt(os.dup(fd)) as other:
            names = "|".join(other.features.names)
            assert repr(other) == (
                f"<Userfaultfd fd={other.fileno()} of another process, {names or 'no features'}>"
            )
            assert other.user_mode_only is None
    assert repr(uffd) == "<Userfaultfd closed of this process, THREAD_ID>"


def test_a_userfaultfd_shows_that_it_is_for_user_mode_only() -> None:
    try:
        uffd = Userfaultfd.open(user_mode_only=True)
    except PermissionRefused as refused:
        pytest.skip(str(refused))
    with uffd:
        fd = uffd.fileno()
        assert repr(uffd) == (f"<Userfaultfd fd={fd} of this process, USER_MODE_ONLY, no features>")
