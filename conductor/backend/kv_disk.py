"""Files for the saved KVs that host memory has no room for. A cache: a file lost is a session recomputed, so nothing is synced.

Covers the byte budget, writing and reading. What counts towards the budget is payload, as in everybody's books; a header is
some 200 bytes. Where the files lie and when they go is `kv_directory`'s, whether a payload is still what was written is
`kv_seal`'s. Safe to use from any thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conductor.backend.kv_directory import KvDirectory, delete
from conductor.backend.kv_seal import DamagedBlob, Seal
from conductor.errors import InternalError

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray

_log = logging.getLogger(__name__)

_MAGIC, _VERSION = b"VRAMKV\r\n", 1
#: magic, version, length of the label's JSON (which follows), length of the payload (which ends the file), its checksum
_HEADER = struct.Struct("<8sIIQQ")
_READ_BYTES = 64 << 20  # one system call moves 2 GiB at most


@dataclass(frozen=True, slots=True, eq=False)
class KvFile:
    """A place on disk: booked when taken, written once."""

    path: Path
    bytes: int


class KvDisk:
    def __init__(self, directory: Path, *, budget_bytes: int) -> None:
        """Raises OSError if the directory cannot be made, written or locked in."""
        self.budget_bytes = budget_bytes
        self._directory = KvDirectory(directory)
        self._closed = False
        self._files: set[KvFile] = set()
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # the table of files; held for moments

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._booked()

    def take(self, bytes: int) -> KvFile | None:
        """Book a file; None if it does not fit the budget, or after `close`. Nothing is on disk yet."""
        with self._lock:
            if self._closed or self._booked() + bytes > self.budget_bytes:
                return None
            file = KvFile(self._directory.path / f"{next(self._numbers)}.kv", bytes)
            self._files.add(file)
            return file

    def save(self, file: KvFile, seal: Seal, pieces: Iterable[ByteArray]) -> bool:
        """Write the file. False, with nothing on disk, if the disk is full or else says no. Booked it is until `release`."""
        part = file.path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb", buffering=0) as out:
                _write(out.fileno(), memoryview(_header(seal)))
                for piece in pieces:
                    _write(out.fileno(), piece.data)
            part.rename(file.path)
        except OSError as error:
            _log.warning("a saved KV of %d bytes could not be written to disk: %s", file.bytes, error)
            return False
        finally:
            delete(part)
        return True

    def read(self, file: KvFile, seal: Seal) -> ByteArray:
        """The payload, in memory of its own. Raises DamagedBlob unless header and length are what was written.

        Not a memory map: where a mapped file was cut short or its disk fails, the process dies of SIGBUS instead of an
        OSError, and what was checked might not be what is used.
        """
        header = _header(seal)
        try:
            with open(os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as source:
                size = os.fstat(source.fileno()).st_size
                if size != len(header) + seal.bytes:
                    raise DamagedBlob(f"its file has {size} of {len(header) + seal.bytes} bytes")
                if source.read(len(header)) != header:
                    raise DamagedBlob("its file does not begin with the header that was written")
                payload = np.empty(seal.bytes, np.uint8)
                _read(source.fileno(), payload.data)
        except (OSError, MemoryError) as error:
            raise DamagedBlob(f"its file cannot be read: {error}") from error
        return payload

    def release(self, file: KvFile) -> None:
        """Delete the file, if there is one, then forget its bytes."""
        with self._lock:
            if file not in self._files:
                raise InternalError(f"a KV file of {file.bytes} bytes released twice, or not of this disk")
        delete(file.path)
        with self._lock:
            self._files.discard(file)

    def close(self) -> None:
        """Delete all files of this process: what is still booked reads as damaged from now on."""
        with self._lock:
            self._closed = True
        self._directory.close()

    def check(self) -> None:
        """Raise InternalError if more is booked than may be."""
        if self.used_bytes > self.budget_bytes:
            raise InternalError(f"{self.used_bytes} bytes of KV files booked, {self.budget_bytes} allowed")

    def _booked(self) -> int:
        return sum(file.bytes for file in self._files)


def _header(seal: Seal) -> bytes:
    """The same seal gives the same bytes: a header is checked by comparing it, and no file is ever parsed."""
    label = json.dumps(dataclasses.asdict(seal.label), sort_keys=True).encode()
    return _HEADER.pack(_MAGIC, _VERSION, len(label), seal.bytes, seal.checksum) + label


def _write(fd: int, piece: memoryview) -> None:
    while piece.nbytes:
        piece = piece[os.write(fd, piece) :]


def _read(fd: int, buffer: memoryview) -> None:
    while buffer.nbytes:
        got = os.readv(fd, [buffer[:_READ_BYTES]])
        if got == 0:
            raise OSError("it ends early")
        buffer = buffer[got:]
