"""The messages between the daemon's side and the worker.

Each message is one JSON object in one packet of a Unix socket of type SOCK_SEQPACKET.  The message
"memory" carries the userfaultfd as SCM_RIGHTS.

    worker                                    daemon's side
    hello {pid}                      ->
                                     <-       start {mode, image, size, queries}
    memory {base, length, pid} + fd  ->       (lazy only)
                                     <-       served
    answers {...}                    ->
                                     <-       read {passages}
                                     <-       enough
    reads {...}                      ->
                                     <-       verify {image}
    verified {...}                   ->
    failed {error}                   ->       (at any time, instead)

The worker exits when the daemon's side closes the connection.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from uffdaemon.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

__all__ = ["LIMIT", "Json", "Message", "ProtocolError", "decode", "encode", "short_name"]

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

LIMIT: Final = 1 << 16
"""The maximum length of a packet, in bytes."""


class ProtocolError(DemoError):
    """The other side sent an unexpected or malformed message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message.  Reading a field of the wrong type raises `ProtocolError`."""

    kind: str
    fields: Mapping[str, Json]

    def integer(self, name: str) -> int:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name)
        return value

    def real(self, name: str) -> float:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name)
        return float(value)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def texts(self, name: str) -> list[str]:
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self._wrong(name)
        found = [item for item in value if isinstance(item, str)]
        if len(found) != len(value):
            raise self._wrong(name)
        return found

    def messages(self, name: str) -> list[Message]:
        """A list of objects, each as a message of the kind `name`."""
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self._wrong(name)
        found = [Message(name, item) for item in value if isinstance(item, dict)]
        if len(found) != len(value):
            raise self._wrong(name)
        return found

    def _wrong(self, name: str) -> ProtocolError:
        return ProtocolError(
            f"message {self.kind!r}: field {name!r} is missing or has the wrong type"
        )


def encode(kind: str, fields: Mapping[str, Json] | None = None) -> bytes:
    """Encode a message as a packet.  Raises `ProtocolError` if it is longer than `LIMIT`."""
    packet = json.dumps({"kind": kind, **(fields or {})}).encode()
    if len(packet) > LIMIT:
        raise ProtocolError(f"message {kind!r} of {len(packet)} bytes is too long")
    return packet


def decode(packet: bytes) -> Message:
    """Decode a packet.  Raises `ProtocolError` if it is not a message."""
    try:
        value: Json = json.loads(packet)
    except ValueError as error:
        raise ProtocolError(f"the packet is not JSON: {packet[:60]!r}") from error
    kind = value.pop("kind", None) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise ProtocolError(f"the packet is not a message: {packet[:60]!r}")
    return Message(kind, value)


@contextmanager
def short_name(path: str) -> Generator[str]:
    """A short name for `path`, valid inside of the block.

    sun_path has 108 bytes (unix(7)), and temporary directories can have longer paths.
    """
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
