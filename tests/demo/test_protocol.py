"""The packets: messages are decoded as they were encoded; anything else is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.demo.errors import DemoError
from uffdaemon.demo.protocol import LIMIT, Json, Message, ProtocolError, decode, encode

VALUES: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.dictionaries(st.text().filter(lambda name: name != "kind"), VALUES, max_size=5)


@given(st.text(), FIELDS)
def test_round_trip(kind: str, fields: dict[str, Json]) -> None:
    assert decode(encode(kind, fields)) == Message(kind, fields)


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused(packet: bytes) -> None:
    try:
        message = decode(packet)
    except ProtocolError:
        return
    assert "kind" in json.loads(packet)
    assert isinstance(message.kind, str)


@given(VALUES)
def test_a_field_of_the_wrong_type_is_refused(value: Json) -> None:
    message = Message("test", {"field": value})
    for read in (message.integer, message.real, message.text, message.texts, message.messages):
        try:
            found = read("field")
        except ProtocolError:
            continue
        if read == message.messages:
            assert isinstance(value, list)
            assert [item.fields for item in message.messages("field")] == value
        else:
            assert found == value
            assert not isinstance(value, bool)


def test_a_missing_field() -> None:
    with pytest.raises(DemoError, match="'pid'"):
        Message("hello", {}).integer("pid")


def test_a_packet_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="too long"):
        encode("answers", {"text": "x" * LIMIT})
