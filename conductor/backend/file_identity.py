"""Which content a model file has: what answers about it are kept under.

A `ModelId` comes from the directory's entry alone (device, inode, size, mtime) and says which file; a file that was
rewritten within the clock's grain, or that had its times put back, would keep it. The header is cheap to read again (some
milliseconds with the largest vocabularies), and it decides the layout.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import BinaryIO, NewType

from conductor.backend.gguf_file import MAX_HEADER_BYTES
from conductor.core.estimate import ModelPlan
from conductor.errors import BadModelFile

#: size, mtime and a hash of the header
FileIdentity = NewType("FileIdentity", str)

_LEAST_BYTES = 1 << 16
_PART_BYTES = 1 << 20


def file_identity(plan: ModelPlan) -> FileIdentity:
    """Of the file as it is now. Raises BadModelFile if it cannot be read any more."""
    try:
        with open(os.open(plan.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would be waited for
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadModelFile(plan.path, "is not a regular file")
            # What lies before the tensors. A few bytes less where the file packs them closer than ggml's buffers do.
            header_bytes = found.st_size - plan.geometry.weights_bytes_host
            digest = _hash(file, min(max(header_bytes, _LEAST_BYTES), MAX_HEADER_BYTES))
    except OSError as error:
        raise BadModelFile(plan.path, f"cannot be opened: {error.strerror}") from error
    return FileIdentity(f"{found.st_size}-{found.st_mtime_ns}-{digest}")


def _hash(file: BinaryIO, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while size > 0 and (part := file.read(min(size, _PART_BYTES))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()
