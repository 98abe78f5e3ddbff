"""What stands where a model is expected, and what may become of a good one between its price and its load."""

from __future__ import annotations

import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tests.support.anatomy import ALIGNMENT, ARRAY, STRING, U32, Anatomy, Entry

#: does something to a path
Act: TypeAlias = Callable[[Path], object]


def written(content: bytes) -> Act:
    return lambda path: path.write_bytes(content)


def sparse(content: bytes, size: int) -> Act:
    def place(path: Path) -> None:
        path.write_bytes(content)
        os.truncate(path, size)

    return place


def unreadable(content: bytes) -> Act:
    def place(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(0)

    return place


def link(target: str) -> Act:
    return lambda path: path.symlink_to(target)


def loop(path: Path) -> None:
    path.symlink_to(path)


def two_tebibytes(anatomy: Anatomy) -> bytes:
    """A matrix so wide that the weights are more than any device has; all offsets are right."""
    wide = next(info for info in anatomy.infos if info.name in (b"blk.0.ffn_up.weight", b"blk.0.ssm_in.weight"))
    wide.dims = [2**20, 2**19]
    offset = 0
    for info in anatomy.infos:
        info.offset = offset
        offset += -(-4 * math.prod(info.dims) // ALIGNMENT) * ALIGNMENT
    return anatomy.written()


def claims(type_id: int, value: bytes) -> bytes:
    """A header of one key, whose value goes on for ever."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + Entry(b"general.name", type_id, value).written()


def odd_files(anatomy: Anatomy) -> list[tuple[str, Act]]:
    """(in words, what makes it)."""
    raw = anatomy.written()
    return [
        ("nothing", lambda path: None),
        ("an empty file", Path.touch),
        ("a directory", Path.mkdir),
        ("a pipe", os.mkfifo),
        ("a file that may not be read", unreadable(raw)),
        ("a link to itself", loop),
        ("a link to nowhere", link("nowhere.gguf")),
        ("a link to /dev/zero", link("/dev/zero")),
        ("weights of 2 TiB in a sparse file", sparse(two_tebibytes(anatomy.copy()), (2 << 40) + (1 << 30))),
        ("a text of 1 GiB in a sparse file", sparse(claims(STRING, struct.pack("<Q", 1 << 30)), 2 << 30)),
        ("a text of 200 MiB in a sparse file", sparse(claims(STRING, struct.pack("<Q", 200 << 20)), 2 << 30)),
        ("a list of 2^21 empty texts", sparse(claims(ARRAY, struct.pack("<IQ", STRING, 1 << 21)), 1 << 30)),
        ("1 TiB of zeros", sparse(b"", 1 << 40)),
        ("a model and 1 TiB of zeros after it", sparse(raw, 1 << 40)),
        ("a part of a header and zeros", sparse(raw[:2000], len(raw))),
        ("a zip archive", written(b"PK\x03\x04" + bytes(1000))),
        ("a web page", written(b"<!DOCTYPE html><html></html>")),
        ("a Git LFS pointer", written(b"version https://git-lfs.github.com/spec/v1\n")),
        ("the magic alone", written(b"GGUF")),
        ("two models in one", written(raw + raw)),
        ("a big-endian header", written(b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(900))),
        ("noise", written(random.Random(0).randbytes(5000))),
        ("a text in another encoding", written(raw.replace(b"tiny", b"t\xff\xfey"))),
    ]


def replaced(content: bytes) -> Act:
    """By another file, as a download or `mv` does it."""

    def later(path: Path) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        os.replace(fresh, path)

    return later


def overwritten(begin: int, content: bytes) -> Act:
    def later(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(content)

    return later


def became(make: Act) -> Act:
    def later(path: Path) -> None:
        path.unlink()
        make(path)

    return later


def changes(anatomy: Anatomy, chance: random.Random) -> list[tuple[str, Act]]:
    """(in words, what is done to the file after it was priced)."""
    raw, other = anatomy.written(), anatomy.copy()
    other.put(f"{other.architecture}.block_count", U32, 0)
    return [
        ("replaced by one that llama.cpp does not survive", replaced(other.written())),
        ("gone", Path.unlink),
        ("cut short in place", lambda path: os.truncate(path, len(raw) // 2)),
        ("cut to nothing in place", lambda path: os.truncate(path, 0)),
        ("replaced by noise", replaced(chance.randbytes(3000))),
        ("replaced by a pipe", became(os.mkfifo)),
        ("replaced by a directory", became(Path.mkdir)),
        ("replaced by a truncated one", replaced(raw[: chance.randrange(len(raw))])),
        ("longer in place", lambda path: os.truncate(path, 1 << 30)),
        ("replaced by itself", replaced(raw)),
        ("weights overwritten in place", overwritten(len(raw) - 5000, chance.randbytes(5000))),
        ("replaced by an empty file", replaced(b"")),
        ("a link to itself", became(loop)),
    ]
