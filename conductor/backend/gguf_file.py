"""The GGUF container: bytes in, metadata and tensor table out. Says nothing about what the keys mean.

No length in the file is believed before it is held against what is left of it, so any bytes end in a `GgufFile` or in
`Malformed`, quickly and in little memory. Tensor data is not read. The rules are those of ggml's own reader (gguf.cpp),
versions 2 and 3, with narrower limits. See also: `gguf_header.py`, the meaning.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from typing import TypeAlias

MAX_HEADER_BYTES = 256 << 20
MAX_KEYS = 1 << 12  #: real files have fewer than 100
MAX_TENSORS = 1 << 17  #: the largest mixtures of experts have 2^16, unmerged
MAX_STRINGS = 1 << 22  #: in all arrays together; the largest vocabularies have 2^18 tokens and 2^19 merges
MAX_VALUES_KEPT = 512  #: longer arrays of numbers are counted, not kept; as many as the layers that a model may have
MAX_TEXT_BYTES_KEPT = 1 << 12  #: of longer texts, such as chat templates, only the beginning is kept
MAX_KEY_BYTES = 1 << 16
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
_READ_BYTES = 1 << 20

STRING, ARRAY, UINT32 = 8, 9, 4
SCALARS = {
    type_id: struct.Struct(f"<{code}")
    for type_id, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
_U32, _U64 = SCALARS[UINT32], SCALARS[10]

#: ggml type -> (elements in a block, bytes of a block); a test holds it against ggml
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip

#: how files begin that people take for models
LOOKALIKES = {
    b"vers": "a Git LFS pointer: the real file was not downloaded",
    b"<!DO": "a web page: the download went wrong",
    b"<htm": "a web page: the download went wrong",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"ggml": "the format before GGUF; convert it",
    b"ggjt": "the format before GGUF; convert it",
}


class Malformed(Exception):
    """What is wrong with the file, as a sentence. Internal to `backend`; `read_header` adds the path."""


@dataclass(frozen=True, slots=True)
class Array:
    """`values` is None for strings and for long arrays; `begin` is where the elements begin in the file."""

    type_id: int
    count: int
    values: tuple[int | float | bool, ...] | None
    begin: int


Value: TypeAlias = int | float | bool | str | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dims: tuple[int, ...]  #: the row length first
    type_id: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    header: bytearray  #: the file as far as it was read

    def strings(self, key: str, *, most: int = MAX_HEADER_BYTES) -> Iterator[bytes]:
        """The elements of an array of strings, but not those of more than `most` bytes."""
        array, header, unpack = self.metadata[key], self.header, _U64.unpack_from
        assert isinstance(array, Array)
        position = array.begin
        for _ in range(array.count):
            length = unpack(header, position)[0]
            position += 8 + length
            if length <= most:
                yield bytes(header[position - length : position])


class _Reader:
    """A position in the header that cannot leave it.

    The file is read as far as that and no further. Not mapped: a mapped file that somebody cuts short ends the process.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.end = min(self.file_bytes, MAX_HEADER_BYTES)
        self.content = bytearray()
        self.position = 0
        self.strings_left = MAX_STRINGS

    def claim(self, count: int) -> int:
        """Step over `count` bytes; where they begin."""
        begin = self.position
        self.position = begin + count
        if self.position > len(self.content):
            self.fetch(self.position)
        return begin

    def fetch(self, position: int) -> int:
        """Read on until all before `position` is there; how much is there."""
        if position > self.end:
            raise Malformed(
                f"truncated: its header goes on to byte {position} at least, the file has {self.file_bytes} in all"
                if self.end == self.file_bytes
                else f"the header is longer than {MAX_HEADER_BYTES} bytes"
            )
        while len(self.content) < position:
            piece = self._file.read(max(position - len(self.content), _READ_BYTES))
            if not piece:
                raise Malformed("truncated: the file became shorter while it was read")
            self.content += piece
        return len(self.content)

    def scalar(self, layout: struct.Struct) -> int | float | bool:
        value: int | float | bool = layout.unpack_from(self.content, self.claim(layout.size))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def string(self, most: int) -> bytearray:
        """The first `most` bytes of it."""
        length = self.u64()
        begin = self.claim(length)
        return self.content[begin : begin + min(length, most)]

    def name(self, what: str) -> str:
        raw = self.string(MAX_KEY_BYTES + 1)
        if not 0 < len(raw) <= MAX_KEY_BYTES:
            raise Malformed(f"the name of a {what} is {'too long' if raw else 'empty'}")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Malformed(f"the name of a {what} is not UTF-8: {bytes(raw[:40])!r}") from None

    def skip_strings(self, count: int) -> None:
        """Written out because vocabularies have 10^5 strings."""
        content, position, unpack, last = self.content, self.position, _U64.unpack_from, len(self.content) - 8
        for _ in range(count):
            if position > last:
                last = self.fetch(position + 8) - 8
            position += 8 + unpack(content, position)[0]
        self.claim(position - self.position)


def parse(file: FileIO) -> GgufFile:
    """Raises Malformed, OSError. Reads as far as the header goes."""
    reader = _Reader(file)
    _check_magic(reader)
    n_tensors, n_keys = reader.u64(), reader.u64()
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise Malformed(f"absurd counts: {n_tensors} tensors and {n_keys} metadata keys")
    metadata = _read_metadata(reader, n_keys)
    alignment = _alignment(metadata)
    return GgufFile(metadata, _read_tensors(reader, n_tensors, alignment), reader.content)


def _check_magic(reader: _Reader) -> None:
    magic = bytes(reader.content[: reader.fetch(min(4, reader.end))][:4])
    if magic != b"GGUF":
        looks = LOOKALIKES.get(magic)
        raise Malformed(f"not a GGUF file: it begins with {magic!r}" + (f" ({looks})" if looks else ""))
    reader.claim(4)
    version = reader.u32()
    if version not in (2, 3):
        swapped = version != 0 and version & 0xFFFF == 0
        raise Malformed(
            "byte order is big-endian; only little-endian GGUF is supported"
            if swapped
            else f"GGUF version {version} is not supported, only 2 and 3"
        )


def _read_metadata(reader: _Reader, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = reader.name("metadata key")
        if key in metadata:
            raise Malformed(f"metadata key {key[:80]!r} appears twice")
        metadata[key] = _read_value(reader, key)
    return metadata


def _read_value(reader: _Reader, key: str) -> Value:
    type_id = reader.u32()
    if type_id == STRING:
        return reader.string(MAX_TEXT_BYTES_KEPT).decode(errors="replace")
    if type_id == ARRAY:
        return _read_array(reader, key)
    if type_id not in SCALARS:
        raise Malformed(f"metadata key {key[:80]!r} has the unknown value type {type_id}")
    return reader.scalar(SCALARS[type_id])


def _read_array(reader: _Reader, key: str) -> Array:
    type_id, count = reader.u32(), reader.u64()
    if type_id == STRING:
        reader.strings_left -= count
        if reader.strings_left < 0:
            raise Malformed(f"absurd count: metadata key {key[:80]!r} lists {count} strings")
        begin = reader.position
        reader.skip_strings(count)
        return Array(type_id, count, None, begin)
    if type_id not in SCALARS:
        raise Malformed(f"metadata key {key[:80]!r} is a list of the unknown or unsupported type {type_id}")
    layout = SCALARS[type_id]
    begin = reader.claim(count * layout.size)
    kept = struct.unpack_from(f"<{count}{layout.format[1:]}", reader.content, begin) if count <= MAX_VALUES_KEPT else None
    return Array(type_id, count, kept, begin)


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise Malformed(f"general.alignment must be a power of two, not {alignment!r}")
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    next_offset = end = 0  # in the data section: tensors follow each other without gaps, each aligned
    for _ in range(count):
        tensor, offset = _read_tensor(reader)
        if tensor.name in tensors:
            raise Malformed(f"tensor {tensor.name[:80]!r} appears twice")
        if offset != next_offset:
            raise Malformed(f"tensor {tensor.name[:80]!r} lies at offset {offset} of the data, expected {next_offset}")
        tensors[tensor.name] = tensor
        end = offset + tensor.bytes
        next_offset = aligned(end, alignment)
    expected, actual = (aligned(reader.position, alignment) + end if tensors else reader.position), reader.file_bytes
    if expected > actual:
        raise Malformed(f"truncated: {expected} bytes expected, the file has {actual}; was it downloaded or copied completely?")
    return tensors


def _read_tensor(reader: _Reader) -> tuple[Tensor, int]:
    name = reader.name("tensor")
    shown = repr(name[:80])
    n_dims = reader.u32()
    if not 1 <= n_dims <= MAX_DIMS:
        raise Malformed(f"tensor {shown} has {n_dims} dimensions")
    dims = tuple(reader.u64() for _ in range(n_dims))
    type_id, offset = reader.u32(), reader.u64()
    if type_id not in BLOCKS:
        raise Malformed(f"tensor {shown} has the unknown type {type_id}; the file may be newer than this program")
    elements = math.prod(dims)
    if not 0 < elements < 1 << 63:
        raise Malformed(f"tensor {shown} has absurd dimensions {dims}")
    if dims[0] % BLOCKS[type_id][0]:
        raise Malformed(f"tensor {shown} has rows of {dims[0]} elements, not a multiple of its type's block")
    return Tensor(name, dims, type_id, row_bytes(type_id, elements)), offset


def row_bytes(type_id: int, elements: int) -> int:
    """Bytes of whole blocks."""
    block, block_bytes = BLOCKS[type_id]
    return elements // block * block_bytes


def aligned(offset: int, alignment: int) -> int:
    """Rounded up."""
    return -(-offset // alignment) * alignment
