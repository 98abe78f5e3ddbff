"""Wrong bytes, counts, lengths, and tensors."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import TypeAlias

import gguf

from tests.support.anatomy import ALIGNMENT, ARRAY, STRING, U32, Anatomy, Info
from tests.support.mutations import Edit, pick

U32_MAX, U64_MAX = 2**32 - 1, 2**64 - 1
LENGTHS = (0, 2**20, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, U64_MAX - 7, U64_MAX)
I32 = 26  #: ggml's, as many bytes as F32

#: changes the file's bytes and says where
Damage: TypeAlias = Callable[[bytearray, Anatomy, random.Random, int], str]

# --- bytes --------------------------------------------------------------------------------------------------------------


def boundaries(anatomy: Anatomy) -> Iterator[tuple[int, str]]:
    """Where each part of the header ends, where it is cut in two, and places in the data."""
    position = 0
    for name, part in anatomy.parts():
        if len(part) > 4:
            yield position + len(part) // 2, f"inside the {name}"
        position += len(part)
        yield position, f"after the {name}"
    data = position + -position % ALIGNMENT
    yield from ((data - 1, "in the padding"), (data, "after the padding"), (data + len(anatomy.data) // 2, "in the weights"))
    yield data + len(anatomy.data) - 1, "before the last byte"


def cut_at_a_boundary(raw: bytearray, anatomy: Anatomy, _: random.Random, number: int) -> str:
    position, where = pick(list(boundaries(anatomy)), number * 7)
    del raw[position:]
    return where


def cut_anywhere(raw: bytearray, _: Anatomy, chance: random.Random, __: int) -> str:
    position = chance.randrange(len(raw))
    del raw[position:]
    return f"at {position}"


def section(anatomy: Anatomy, name: str) -> range:
    sizes = [len(part) for _, part in anatomy.parts()]
    table, header = sum(sizes[: 4 + 3 * len(anatomy.entries)]), sum(sizes)
    return {
        "header": range(header),
        "metadata": range(table),
        "tensor table": range(table, header),
        "weights": range(header, header + len(anatomy.data)),
    }[name]


def flips(where: str, most: int = 1) -> Damage:
    def damage(raw: bytearray, anatomy: Anatomy, chance: random.Random, _: int) -> str:
        places = [chance.choice(section(anatomy, where)) for _ in range(chance.randint(1, most))]
        for place in places:
            raw[place] ^= 1 << chance.randrange(8)
        return f"bits at {', '.join(map(str, places[:4]))}"

    return damage


def noise(raw: bytearray, anatomy: Anatomy, chance: random.Random, _: int) -> str:
    place, length = chance.choice(section(anatomy, "header")), chance.choice((1, 4, 8, 64))
    fill = chance.choice((b"\x00", b"\xff", b"\x7f", None))
    raw[place : place + length] = fill * length if fill else chance.randbytes(length)
    return f"{length} bytes at {place}"


def moved(raw: bytearray, anatomy: Anatomy, chance: random.Random, _: int) -> str:
    """A piece removed, doubled or elsewhere: everything after it lies where it should not."""
    begin, place = chance.sample(section(anatomy, "header"), 2)
    piece, how = bytes(raw[begin : begin + chance.randint(1, 200)]), chance.choice(("removed", "doubled", "elsewhere"))
    if how != "doubled":
        del raw[begin : begin + len(piece)]
    if how != "removed":
        raw[place:place] = piece
    return f"{len(piece)} bytes at {begin} {how}"


DAMAGES: dict[str, Damage] = {
    "cut at a boundary": cut_at_a_boundary,
    "cut anywhere": cut_anywhere,
    "a bit of the metadata": flips("metadata"),
    "a bit of the tensor table": flips("tensor table"),
    "a bit of the weights": flips("weights"),
    "many bits": flips("header", 64),
    "noise in the header": noise,
    "pieces moved": moved,
}

# --- counts and lengths -------------------------------------------------------------------------------------------------


def counts(anatomy: Anatomy, _: random.Random, number: int) -> str:
    which = pick(("tensors", "keys"), number)
    true = len(anatomy.infos if which == "tensors" else anatomy.entries)
    anatomy.counts[which] = pick((true - 1, true + 1, *LENGTHS), number // 2)
    return f"{anatomy.counts[which]} {which}"


def lengths(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    type_id, length = pick((STRING, ARRAY), number), pick(LENGTHS, number // 2)
    entry = chance.choice([entry for entry in anatomy.entries if entry.type_id == type_id])
    before = 4 if type_id == ARRAY else 0  # the type of its elements
    entry.raw = entry.raw[:before] + struct.pack("<Q", length) + entry.raw[before + 8 :]
    return f"{entry.key.decode()} of {length}"


def version_or_alignment(anatomy: Anatomy, _: random.Random, number: int) -> str:
    if number % 2:
        anatomy.version = pick((0, 1, 2, 4, 3 << 24, U32_MAX), number // 2)
        return f"version {anatomy.version}"
    alignment = pick((0, 1, 8, 31, 64, 2**31, U32_MAX), number // 2)
    anatomy.put("general.alignment", U32, alignment)
    return f"alignment {alignment}"


# --- tensors ------------------------------------------------------------------------------------------------------------


def rearranged(anatomy: Anatomy, pieces: dict[bytes, bytes]) -> None:
    """The data as the infos have it now, with new bytes for some, everything where it must be."""
    data = bytearray()
    ends = [info.offset for info in anatomy.infos[1:]] + [len(anatomy.data)]
    for info, end in zip(anatomy.infos, ends, strict=True):
        piece = pieces.get(info.name, anatomy.data[info.offset : end])
        info.offset = len(data)
        data += piece + bytes(-len(piece) % ALIGNMENT)
    anatomy.data = bytes(data)


def missing(anatomy: Anatomy, chance: random.Random, _: int) -> str:
    gone = chance.choice(anatomy.infos)
    rearranged(anatomy, {gone.name: b""})
    anatomy.infos.remove(gone)
    return gone.name.decode()


def added(anatomy: Anatomy, name: bytes, dims: list[int], number: bytes) -> None:
    """A tensor of one number, many times."""
    anatomy.infos.append(Info(name, dims, 0, len(anatomy.data)))
    piece = number * math.prod(dims)
    anatomy.data += piece + bytes(-len(piece) % ALIGNMENT)


def twice(anatomy: Anatomy, chance: random.Random, _: int) -> str:
    info = chance.choice(anatomy.infos)
    added(anatomy, info.name, info.dims, bytes(4))
    return info.name.decode()


def unasked(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    names = (
        "rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "cls.weight", "blk.0.attn_sinks.weight", "extra",
        "blk.0.attn_q_norm.weight", "output.bias", "blk.0.attn_q.scale", "blk.0.attn_rot_k.weight",
    )  # fmt: skip
    dims = chance.choice(([32], [8], [1], [32, 32], [16]))
    added(anatomy, pick(names, number).encode(), dims, struct.pack("<f", chance.choice((1.0, math.nan))))
    return f"{pick(names, number)} {dims}"


def names(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    info = chance.choice(anatomy.infos)
    was = info.name.decode()
    info.name = pick(
        (b"", b"blk.99999999999.attn_q.weight", b"x" * 64, b"\xff", info.name + b"\x00", b"blk.-1.ffn_up.weight", b"%s%n"), number
    )
    return f"{was} is {info.name[:30]!r}"


def offsets(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    info = chance.choice(anatomy.infos[1:])
    true = info.offset
    info.offset = pick((0, true - 32, true + 1, true + 32, 2**40, 2**63, U64_MAX, U64_MAX - 31), number)
    return f"{info.name.decode()} at {info.offset}"


def dimensions(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    info = chance.choice(anatomy.infos)
    true = info.dims
    info.dims = pick(
        ([], [0], [*true, 1], true[::-1], [2**63, 2], [U64_MAX], [2**31] * 4, [1, *true], true + [1] * 4, [math.prod(true)],
         [2**32, 2**32]), number,
    )  # fmt: skip
    return f"{info.name.decode()} {info.dims}"


def types(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    """Now and then one with as many bytes, so that nothing else is wrong with the file."""
    info = chance.choice(anatomy.infos)
    info.type_id = I32 if number % 3 == 0 else chance.choice((*range(45), 2**31, U32_MAX))
    return f"{info.name.decode()} as {info.type_id}"


def retyped(of: Callable[[Info], bool]) -> Edit:
    """One tensor in another type, with as many bytes as that needs: a file in order but for that."""

    def edit(anatomy: Anatomy, chance: random.Random, number: int) -> str:
        type_id = pick(list(gguf.GGML_QUANT_SIZES), number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_id]
        info = chance.choice([info for info in anatomy.infos if of(info)])
        info.dims[0] += -info.dims[0] % block
        info.type_id = int(type_id)
        rearranged(anatomy, {info.name: chance.randbytes(math.prod(info.dims) // block * block_bytes)})
        return f"{info.name.decode()} in {type_id.name}"

    return edit


def no_numbers(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    info = chance.choice(anatomy.infos)
    word = pick((*(struct.pack("<f", value) for value in (math.nan, math.inf, 3e38, 0.0)), b"\xff" * 4), number)
    count = 1 if number % 2 else math.prod(info.dims)
    end = info.offset + 4 * count
    anatomy.data = anatomy.data[: info.offset] + word * count + anatomy.data[end:]
    return f"{count} of {info.name.decode()} = {word.hex()}"


EDITS: dict[str, Edit] = {
    "absurd counts": counts,
    "absurd lengths": lengths,
    "version and alignment": version_or_alignment,
    "tensors missing": missing,
    "tensors twice": twice,
    "tensors that nobody asked for": unasked,
    "names of tensors": names,
    "offsets of tensors": offsets,
    "dimensions of tensors": dimensions,
    "types of tensors": types,
    "matrices of another type": retyped(lambda info: len(info.dims) > 1),
    "vectors of another type": retyped(lambda info: len(info.dims) == 1),
    "weights that are no numbers": no_numbers,
}
