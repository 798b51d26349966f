"""Patterns of numpy.

numpy lets go of the GIL around the inner loops of what is long enough, and of what knows no
Python objects; everything that is done element by element or for a few elements keeps it.
"""

from __future__ import annotations

import io
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.hangs.pattern import PAGE, Guarded, numbers, padded, pages, pattern

Doubles: TypeAlias = NDArray[np.float64]

_FEW, _MORE, _MANY = 8, 100, 100_000


def _doubles(guarded: Guarded, count: int) -> tuple[Doubles, Doubles]:
    """The first numbers of the memory, and what they are to be."""
    memory = np.frombuffer(guarded.buffer, "f8", count)
    return memory, np.frombuffer(guarded.data, "f8", count).copy()


def _bytes(guarded: Guarded) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.frombuffer(guarded.buffer, "u1"), np.frombuffer(guarded.data, "u1")


def _words() -> bytes:
    return padded(np.array([b"word%d" % number for number in range(1000)], "S8").tobytes())


# -- whole arrays ------------------------------------------------------------------------------


@pattern("released")
def numpy_copy(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    assert memory.copy().tobytes() == expected.tobytes()


@pattern("released")
def numpy_copyto_from(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    found = np.empty_like(expected)
    np.copyto(found, memory)
    assert found.tobytes() == guarded.data


@pattern("released", writes=True)
def numpy_copyto_into(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    np.copyto(memory, expected[::-1])
    assert bytes(guarded.buffer) == guarded.data[::-1]


@pattern("released", writes=True)
def numpy_slice_assign(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    memory[:] = expected[::-1]
    assert bytes(guarded.buffer) == guarded.data[::-1]


@pattern("released", numbers(2000), writes=True)
def numpy_sort_in_place(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, 2000)
    memory.sort()
    assert memory.tolist() == sorted(expected.tolist())


@pattern("released", numbers(2000))
def numpy_argmax(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, 2000)
    assert memory.argmax() == expected.argmax()


@pattern("released", writes=True)
def numpy_fill(guarded: Guarded) -> None:
    memory, _ = _bytes(guarded)
    memory.fill(7)
    assert bytes(guarded.buffer) == bytes([7]) * guarded.length


@pattern("released")
def numpy_array_equal(guarded: Guarded) -> None:
    assert np.array_equal(*_bytes(guarded))


@pattern("held")
def numpy_tobytes(guarded: Guarded) -> None:
    memory, _ = _bytes(guarded)
    assert memory.tobytes() == guarded.data


@pattern("held", pages(1))
def numpy_tolist(guarded: Guarded) -> None:
    memory, _ = _bytes(guarded)
    assert memory.tolist() == list(guarded.data)


@pattern("released")
def numpy_array_of_memoryview(guarded: Guarded) -> None:
    assert np.array(guarded.buffer).tobytes() == guarded.data


@pattern("released")
def numpy_concatenate(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    assert np.concatenate([memory, expected]).tobytes() == 2 * guarded.data


# -- element by element ------------------------------------------------------------------------


@pattern("held")
def numpy_scalar_index(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    assert memory[PAGE + 5] == expected[PAGE + 5]


@pattern("held", writes=True)
def numpy_scalar_assign(guarded: Guarded) -> None:
    memory, _ = _bytes(guarded)
    memory[PAGE] = guarded.data[PAGE] ^ 0xFF
    assert guarded.buffer[PAGE] == guarded.data[PAGE] ^ 0xFF


@pattern("held")
def numpy_fancy_index(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    chosen = np.array([5, 2 * PAGE, PAGE, 5])
    assert memory[chosen].tolist() == expected[chosen].tolist()


@pattern("held", writes=True)
def numpy_fancy_assign(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    chosen = np.array([5, 2 * PAGE, PAGE])
    memory[chosen] = ~expected[chosen]
    assert [guarded.buffer[each] for each in chosen] == (~expected[chosen]).tolist()


@pattern("released")
def numpy_take(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    chosen = np.arange(0, guarded.length, 31)
    assert memory.take(chosen).tolist() == expected[chosen].tolist()


@pattern("released")
def numpy_boolean_mask(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    mask = np.arange(guarded.length) % 3 == 0
    assert memory[mask].tolist() == expected[mask].tolist()


@pattern("released")
def numpy_where(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    found = np.where(np.arange(guarded.length) % 2, memory, np.uint8(0))
    assert found[1::2].tolist() == expected[1::2].tolist()


@pattern("released")
def numpy_nonzero(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    assert memory.nonzero()[0].tolist() == expected.nonzero()[0].tolist()


@pattern("released")
def numpy_count_nonzero(guarded: Guarded) -> None:
    memory, expected = _bytes(guarded)
    assert np.count_nonzero(memory) == np.count_nonzero(expected)


# -- ufuncs and reductions ---------------------------------------------------------------------


@pattern("held", numbers(_FEW))
def numpy_ufunc_of_8(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _FEW)
    assert (memory + 1.0).tolist() == [each + 1 for each in expected.tolist()]


@pattern("held", numbers(_MORE))
def numpy_ufunc_of_100(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MORE)
    assert (memory * 2.0).tolist() == [each * 2 for each in expected.tolist()]


@pattern("released", numbers(_MANY))
def numpy_ufunc_of_100_000(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MANY)
    assert np.array_equal(memory * 2.0, expected + expected)


@pattern("held", numbers(_MORE), writes=True)
def numpy_ufunc_in_place_of_100(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MORE)
    memory += 1.0
    assert memory.tolist() == [each + 1 for each in expected.tolist()]


@pattern("released", numbers(_MANY), writes=True)
def numpy_ufunc_into_100_000(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MANY)
    np.add(expected, 1.0, out=memory)
    assert np.array_equal(memory, expected + 1.0)


@pattern("held", numbers(_MORE))
def numpy_sum_of_100(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MORE)
    assert memory.sum() == sum(expected.tolist())


@pattern("released", numbers(_MANY))
def numpy_sum(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MANY)
    assert memory.sum() == sum(expected.tolist())


@pattern("held", numbers(_MANY))
def numpy_max(guarded: Guarded) -> None:
    """The GIL is let go of for the loop, but not while the first element is looked at."""
    memory, expected = _doubles(guarded, _MANY)
    assert memory.max() == max(expected.tolist())


@pattern("released", numbers(_MANY))
def numpy_mean(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, _MANY)
    assert memory.mean() == expected.mean()


@pattern("released", numbers(2000))
def numpy_dot_1d(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, 2000)
    assert np.dot(memory, memory) == sum(each * each for each in expected.tolist())


@pattern("released", numbers(64 * 64))
def numpy_dot_2d(guarded: Guarded) -> None:
    memory, expected = (each.reshape(64, 64) for each in _doubles(guarded, 64 * 64))
    assert np.array_equal(np.dot(memory, memory), np.dot(expected, expected))


@pattern("released", numbers(64 * 64))
def numpy_matmul(guarded: Guarded) -> None:
    memory, expected = (each.reshape(64, 64) for each in _doubles(guarded, 64 * 64))
    assert np.array_equal(memory @ memory, expected @ expected)


# -- other types, files, strings ---------------------------------------------------------------


@pattern("released", numbers(2000))
def numpy_astype(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, 2000)
    assert memory.astype("i4").tolist() == [int(each) for each in expected.tolist()]


@pattern("held", numbers(2000))
def numpy_view_index(guarded: Guarded) -> None:
    memory, _ = _doubles(guarded, 2000)
    assert memory.view("u1")[PAGE + 6] == guarded.data[PAGE + 6]


@pattern("held", numbers(2000))
def numpy_save(guarded: Guarded) -> None:
    memory, expected = _doubles(guarded, 2000)
    file = io.BytesIO()
    np.save(file, memory)
    file.seek(0)
    assert np.array_equal(np.load(file), expected)


@pattern("released", _words)
def numpy_string_compare(guarded: Guarded) -> None:
    memory = np.frombuffer(guarded.buffer, "S8", 1000)
    expected = np.frombuffer(guarded.data, "S8", 1000)
    assert (memory == expected).all()


@pattern("released", _words)
def numpy_string_find(guarded: Guarded) -> None:
    memory = np.frombuffer(guarded.buffer, "S8", 1000)
    assert np.strings.find(memory, b"7").tolist() == [
        (b"word%d" % number).find(b"7") for number in range(1000)
    ]


@pattern("held", _words)
def numpy_char_upper(guarded: Guarded) -> None:
    memory = np.frombuffer(guarded.buffer, "S8", 1000)
    assert np.char.upper(memory).tolist() == [b"WORD%d" % number for number in range(1000)]
