"""Patterns of the language itself, of struct, ctypes and cffi."""

from __future__ import annotations

import copy
import ctypes
import struct
import threading
from array import array
from typing import Any

import cffi

from tests.hangs.pattern import PAGE, Guarded, numbers, pages, pattern, text

_ffi = cffi.FFI()
_ffi.cdef("void *memcpy(void *, const void *, size_t); int memcmp(void *, void *, size_t);")
_lib: Any = _ffi.dlopen(None)
_libc = ctypes.CDLL(None)  # lets go of the GIL around each call
_libc_held = ctypes.PyDLL(None)  # keeps it
for _memcpy in (_libc.memcpy, _libc_held.memcpy):
    _memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _memcpy.restype = ctypes.c_void_p

NEW = b"new bytes"


def _changed(guarded: Guarded, offset: int, new: bytes) -> None:
    """The memory holds its data but for `new`."""
    expected = guarded.data[:offset] + new + guarded.data[offset + len(new) :]
    assert ctypes.string_at(guarded.address, guarded.length) == expected


# -- memoryview --------------------------------------------------------------------------------


@pattern("held")
def memoryview_index(guarded: Guarded) -> None:
    assert guarded.buffer[PAGE + 5] == guarded.data[PAGE + 5]


@pattern("held")
def memoryview_index_assign(guarded: Guarded) -> None:
    guarded.buffer[5] = guarded.data[5]
    _changed(guarded, 0, b"")


@pattern("held", writes=True)
def memoryview_slice_assign(guarded: Guarded) -> None:
    guarded.buffer[PAGE - 4 : PAGE - 4 + len(NEW)] = NEW
    _changed(guarded, PAGE - 4, NEW)


@pattern("held")
def memoryview_slice_compared(guarded: Guarded) -> None:
    assert guarded.buffer[10:-10] == guarded.data[10:-10]


@pattern("held", pages(2))
def memoryview_step(guarded: Guarded) -> None:
    assert bytes(guarded.buffer[::-97]) == guarded.data[::-97]


@pattern("held")
def bytes_of(guarded: Guarded) -> None:
    assert bytes(guarded.buffer) == guarded.data


@pattern("held")
def bytearray_of(guarded: Guarded) -> None:
    assert bytearray(guarded.buffer) == guarded.data


@pattern("held")
def bytearray_extend(guarded: Guarded) -> None:
    found = bytearray(b"before")
    found += guarded.buffer
    assert found == b"before" + guarded.data


@pattern("held")
def tobytes(guarded: Guarded) -> None:
    assert guarded.buffer.tobytes() == guarded.data


@pattern("held")
def hexadecimal(guarded: Guarded) -> None:
    assert guarded.buffer.hex() == guarded.data.hex()


@pattern("held")
def equal_to_bytes(guarded: Guarded) -> None:
    assert guarded.buffer == guarded.data


@pattern("held", pages(1))
def to_list(guarded: Guarded) -> None:
    assert guarded.buffer.tolist() == list(guarded.data)


@pattern("held", pages(1))
def list_of(guarded: Guarded) -> None:
    assert list(guarded.buffer) == list(guarded.data)


@pattern("held", pages(1))
def sorted_of(guarded: Guarded) -> None:
    assert sorted(guarded.buffer) == sorted(guarded.data)


@pattern("held", pages(1))
def sum_of(guarded: Guarded) -> None:
    assert sum(guarded.buffer) == sum(guarded.data)


@pattern("held", pages(1))
def iteration(guarded: Guarded) -> None:
    for found, expected in zip(guarded.buffer, guarded.data, strict=True):
        assert found == expected


@pattern("held")
def membership(guarded: Guarded) -> None:
    assert guarded.data[-1] in guarded.buffer[PAGE:]


@pattern("held", numbers(1000))
def cast_to_doubles(guarded: Guarded) -> None:
    assert guarded.buffer.cast("d")[600] == struct.unpack_from("d", guarded.data, 4800)[0]


@pattern("held")
def joined(guarded: Guarded) -> None:
    assert b"".join([guarded.buffer, b"after"]) == guarded.data + b"after"


@pattern("held")
def copied_by_copy(guarded: Guarded) -> None:
    # A memoryview is not copied, an array of its bytes is.
    assert copy.copy(array("B", guarded.buffer)).tobytes() == guarded.data


@pattern("held")
def array_from_bytes(guarded: Guarded) -> None:
    found = array("B")
    found.frombytes(guarded.buffer)
    assert found.tobytes() == guarded.data


@pattern("held")
def int_from_bytes(guarded: Guarded) -> None:
    found = int.from_bytes(guarded.buffer[PAGE - 8 : PAGE + 8], "big")
    assert found == int.from_bytes(guarded.data[PAGE - 8 : PAGE + 8], "big")


@pattern("held", text(b"some words of ASCII; ", 400))
def decoded(guarded: Guarded) -> None:
    assert str(guarded.buffer, "ascii") == guarded.data.decode("ascii")


# -- struct ------------------------------------------------------------------------------------


@pattern("held")
def struct_unpack_from(guarded: Guarded) -> None:
    found = struct.unpack_from("<Q", guarded.buffer, PAGE + 8)
    assert found == struct.unpack_from("<Q", guarded.data, PAGE + 8)


@pattern("held", writes=True)
def struct_pack_into(guarded: Guarded) -> None:
    struct.pack_into("<9s", guarded.buffer, PAGE - 5, NEW)
    _changed(guarded, PAGE - 5, NEW)


@pattern("held", pages(1))
def struct_iter_unpack(guarded: Guarded) -> None:
    found = list(struct.iter_unpack("<Q", guarded.buffer))
    assert found == list(struct.iter_unpack("<Q", guarded.data))


# -- ctypes ------------------------------------------------------------------------------------


@pattern("held")
def ctypes_from_address(guarded: Guarded) -> None:
    assert ctypes.c_ubyte.from_address(guarded.address + PAGE).value == guarded.data[PAGE]


@pattern("held")
def ctypes_from_buffer(guarded: Guarded) -> None:
    found = (ctypes.c_ubyte * guarded.length).from_buffer(guarded.buffer)
    assert found[3 * PAGE] == guarded.data[3 * PAGE]


@pattern("held")
def ctypes_string_at(guarded: Guarded) -> None:
    assert ctypes.string_at(guarded.address, guarded.length) == guarded.data


@pattern("held", writes=True)
def ctypes_memmove(guarded: Guarded) -> None:
    ctypes.memmove(guarded.address + PAGE - 4, NEW, len(NEW))
    _changed(guarded, PAGE - 4, NEW)


@pattern("held", writes=True)
def ctypes_memset(guarded: Guarded) -> None:
    ctypes.memset(guarded.address + PAGE - 4, 7, 9)
    _changed(guarded, PAGE - 4, bytes([7] * 9))


@pattern("released")
def ctypes_cdll_call(guarded: Guarded) -> None:
    found = ctypes.create_string_buffer(guarded.length)
    _libc.memcpy(found, guarded.address, guarded.length)
    assert found.raw == guarded.data


@pattern("held")
def ctypes_pydll_call(guarded: Guarded) -> None:
    found = ctypes.create_string_buffer(guarded.length)
    _libc_held.memcpy(found, guarded.address, guarded.length)
    assert found.raw == guarded.data


# -- cffi --------------------------------------------------------------------------------------


@pattern("held")
def cffi_pointer_index(guarded: Guarded) -> None:
    assert _ffi.cast("unsigned char *", guarded.address)[PAGE] == guarded.data[PAGE]


@pattern("held")
def cffi_buffer(guarded: Guarded) -> None:
    pointer = _ffi.cast("char *", guarded.address)
    assert _ffi.buffer(pointer, guarded.length)[:] == guarded.data


@pattern("held", writes=True)
def cffi_memmove(guarded: Guarded) -> None:
    _ffi.memmove(_ffi.cast("char *", guarded.address + PAGE - 4), NEW, len(NEW))
    _changed(guarded, PAGE - 4, NEW)


@pattern("held")
def cffi_unpack(guarded: Guarded) -> None:
    pointer = _ffi.cast("char *", guarded.address)
    assert _ffi.unpack(pointer, guarded.length) == guarded.data


@pattern("released")
def cffi_lib_call(guarded: Guarded) -> None:
    expected = _ffi.from_buffer(guarded.data)
    pointer = _ffi.cast("void *", guarded.address)
    assert _lib.memcmp(pointer, expected, guarded.length) == 0


# -- mmap --------------------------------------------------------------------------------------


@pattern("held")
def mmap_slice(guarded: Guarded) -> None:
    assert guarded.mapping[10:-10] == guarded.data[10:-10]


@pattern("held", writes=True)
def mmap_slice_assign(guarded: Guarded) -> None:
    guarded.mapping[PAGE - 4 : PAGE - 4 + len(NEW)] = NEW
    _changed(guarded, PAGE - 4, NEW)


@pattern("held")
def mmap_find(guarded: Guarded) -> None:
    last = guarded.data[-64:]
    assert guarded.mapping.find(last, 0) == guarded.data.find(last)


@pattern("held")
def mmap_read(guarded: Guarded) -> None:
    guarded.mapping.seek(PAGE)
    assert guarded.mapping.read(PAGE) == guarded.data[PAGE : 2 * PAGE]


# -- threads -----------------------------------------------------------------------------------


@pattern("held")
def background_thread(guarded: Guarded) -> None:
    """This thread computes, and would never notice but for the GIL."""
    found: list[bytes] = []

    def background_thread() -> None:  # by this name it is found in the stack
        found.append(bytes(guarded.buffer))

    toucher = threading.Thread(target=background_thread)
    toucher.start()
    total = 0
    while toucher.is_alive():
        total += sum(range(1000))
    assert found == [guarded.data]
