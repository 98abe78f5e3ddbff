"""Metadata by name, each value held against the type and the range it must have. Knows no key of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from conductor.backend.gguf_file import Array, Malformed, Value

MAX_WIDTH = 1 << 24


class Keys:
    """Those of `metadata` that begin with `prefix`. All methods raise Malformed, with a sentence that names the key."""

    def __init__(self, metadata: Mapping[str, Value], *, prefix: str = "") -> None:
        self.metadata = metadata
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def get(self, key: str) -> Value | None:
        """As it stands in the file."""
        return self.metadata.get(self.prefix + key)

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "text", value)
        return value

    def integer(self, key: str, *, default: int | None = None, least: int = 1, most: int = MAX_WIDTH) -> int:
        return self._checked(key, self._value(key, default), least, most)

    def per_layer(self, key: str, n_layer: int, *, default: int | None = None, most: int = MAX_WIDTH) -> tuple[int, ...]:
        """One number for all layers, or a list with one for each."""
        value = self._value(key, default)
        if not isinstance(value, Array):
            return (self._checked(key, value, 0, most),) * n_layer
        if value.count != n_layer or value.values is None:
            raise Malformed(f"{self.prefix}{key} lists {value.count} values for {n_layer} layers")
        return tuple(self._checked(key, item, 0, most) for item in value.values)

    def check_small_fraction(self, key: str) -> None:
        """What a norm adds lest it divide by zero."""
        value = self.get(key)
        if value is None:
            return
        if not isinstance(value, float):
            raise self.wrong(key, "a fraction", value)
        if not math.isfinite(value) or value < 0:
            raise Malformed(f"{self.prefix}{key} must be a small number, not {value}")

    def wrong(self, key: str, wanted: str, value: Value) -> Malformed:
        found = "a list" if isinstance(value, Array) else repr(value)[:60]
        return Malformed(f"{self.prefix}{key} must be {wanted}, not {found}")

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise Malformed(f"the metadata key {self.prefix}{key} is missing")
        return value

    def _checked(self, key: str, value: Value, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number", value)
        if not least <= value <= most:
            raise Malformed(f"{self.prefix}{key} is {value}, not between {least} and {most}")
        return value
