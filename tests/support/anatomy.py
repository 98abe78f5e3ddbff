"""A GGUF file taken apart so that a test can put it together wrong. Trusts its input; shares no code with `gguf_file`."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

#: GGUF value type -> struct code
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32

Value = "int | float | bool | bytes | tuple[int, list[int | float | bytes]]"


def text(raw: bytes) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(raw)) + raw


def pack(type_id: int, value: object) -> bytes:
    """A value without its type; a list is (type of its elements, elements)."""
    if type_id == STRING:
        assert isinstance(value, bytes)
        return text(value)
    if type_id == ARRAY:
        assert isinstance(value, tuple)
        element, items = value
        return struct.pack("<IQ", element, len(items)) + b"".join(pack(element, item) for item in items)
    return struct.pack(f"<{SCALARS[type_id]}", value)


@dataclass(slots=True)
class Entry:
    """A metadata key with its value as it stands in the file."""

    key: bytes
    type_id: int
    raw: bytes

    def written(self) -> bytes:
        return text(self.key) + struct.pack("<I", self.type_id) + self.raw


@dataclass(slots=True)
class Info:
    """What the tensor table says of a tensor."""

    name: bytes
    dims: list[int]
    type_id: int
    offset: int

    def written(self) -> bytes:
        return text(self.name) + struct.pack(f"<I{len(self.dims)}QIQ", len(self.dims), *self.dims, self.type_id, self.offset)


@dataclass(slots=True)
class Anatomy:
    entries: list[Entry]
    infos: list[Info]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    #: what the file says instead of the truth
    counts: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Anatomy:
        return copy.deepcopy(self)

    def written(self) -> bytes:
        header = b"".join(part for _, part in self.parts())
        return header + bytes(-len(header) % ALIGNMENT) + self.data

    def parts(self) -> Iterator[tuple[str, bytes]]:
        """The header, piece by piece."""
        yield "magic", self.magic
        yield "version", struct.pack("<I", self.version)
        yield "tensor count", struct.pack("<Q", self.counts.get("tensors", len(self.infos)))
        yield "key count", struct.pack("<Q", self.counts.get("keys", len(self.entries)))
        for entry in self.entries:
            name = entry.key.decode(errors="replace")
            yield f"name of {name}", text(entry.key)
            yield f"type of {name}", struct.pack("<I", entry.type_id)
            yield f"value of {name}", entry.raw
        for info in self.infos:
            yield f"entry of tensor {info.name.decode(errors='replace')}", info.written()

    @property
    def architecture(self) -> str:
        return self.get("general.architecture").raw[8:].decode()

    def get(self, key: str) -> Entry:
        """By its whole name, or by what follows the architecture in it."""
        [found] = [entry for entry in self.entries if entry.key.decode().endswith(key)]
        return found

    def put(self, key: str, type_id: int, value: object) -> None:
        """Add a key or replace it."""
        entry = Entry(key.encode(), type_id, pack(type_id, value))
        for i, known in enumerate(self.entries):
            if known.key == entry.key:
                self.entries[i] = entry
                return
        self.entries.append(entry)


def take_apart(raw: bytes) -> Anatomy:
    position = 24
    _, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", raw)

    def step(layout: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{layout}", raw, position)
        position += struct.calcsize(f"<{layout}")
        return values

    def string() -> bytes:
        nonlocal position
        [length] = step("Q")
        position += length
        return raw[position - length : position]

    def skip(type_id: int) -> None:
        nonlocal position
        if type_id == STRING:
            string()
        elif type_id == ARRAY:
            element, count = step("IQ")
            for _ in range(count):
                skip(element)
        else:
            position += struct.calcsize(SCALARS[type_id])

    entries = []
    for _ in range(n_keys):
        key, [type_id] = string(), step("I")
        begin = position
        skip(type_id)
        entries.append(Entry(key, type_id, raw[begin:position]))
    infos = []
    for _ in range(n_tensors):
        name, [n_dims] = string(), step("I")
        dims = list(step(f"{n_dims}Q"))
        type_id, offset = step("IQ")
        infos.append(Info(name, dims, type_id, offset))
    return Anatomy(entries, infos, raw[-(-position // ALIGNMENT) * ALIGNMENT :], version=version)
