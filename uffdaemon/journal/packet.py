"""JSON objects whose fields are read with their types checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


class Packet:
    """A JSON object.  Reading a field that is missing, or has another type, raises ValueError."""

    def __init__(self, fields: Mapping[str, Json]) -> None:
        self.fields = fields

    @classmethod
    def decode(cls, data: bytes) -> Packet:
        """Decode a packet.  Raises ValueError if it is not a JSON object."""
        value: Json = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"not a packet: {data[:60]!r}")  # noqa: TRY004  # as json raises
        return cls(value)

    def _wrong(self, name: str) -> ValueError:
        return ValueError(
            f"field {name!r} is missing or has the wrong type: {self.fields.get(name)!r:.100}"
        )

    def text(self, name: str) -> str:
        """A string."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def real(self, name: str) -> float:
        """A number."""
        value = self.fields.get(name)
        if not isinstance(value, int | float):
            raise self._wrong(name)
        return value

    def integer(self, name: str) -> int:
        """An integer."""
        value = self.fields.get(name)
        if not isinstance(value, int):
            raise self._wrong(name)
        return value

    def items(self, name: str) -> list[Json]:
        """A list of anything."""
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self._wrong(name)
        return value

    def reals(self, name: str) -> list[float]:
        """A list of numbers."""
        found: list[float] = [v for v in self.items(name) if isinstance(v, int | float)]
        if len(found) != len(self.items(name)):
            raise self._wrong(name)
        return found

    def integers(self, name: str) -> list[int]:
        """A list of integers."""
        found = [value for value in self.items(name) if isinstance(value, int)]
        if len(found) != len(self.items(name)):
            raise self._wrong(name)
        return found

    def packet(self, name: str) -> Packet:
        """An object."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name)
        return Packet(value)

    def packets(self, name: str) -> list[Packet]:
        """A list of objects."""
        found = [Packet(value) for value in self.items(name) if isinstance(value, dict)]
        if len(found) != len(self.items(name)):
            raise self._wrong(name)
        return found
