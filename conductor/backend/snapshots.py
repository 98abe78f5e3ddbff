"""States at the end of system messages, for agents that begin with the same one later.

For models whose slots cannot be cut back to there: recurrent ones, and those whose layers slide. In host memory, not in the
books of saved KV: at most `PREFIX_BYTES` in a process, taken when the first one is kept, the least recently used replaced.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import replace

import numpy as np

from conductor.backend.kv_seal import DamagedBlob, Label
from conductor.backend.kv_store import Blob, KvStore
from conductor.backend.llama import LlamaError, Sequence
from conductor.errors import InternalError

log = logging.getLogger("conductor")

#: of the states of all models together
PREFIX_BYTES = 32 << 20
#: their tokens take memory too
_MOST = 64


class Snapshots:
    """Safe to use from any thread. Labels say whose the states are; the number of slots does not matter."""

    def __init__(self, budget_bytes: int = PREFIX_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._store: KvStore | None = None
        self._blobs: OrderedDict[tuple[Label, tuple[int, ...]], Blob] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, label: Label, tokens: Tokens[int]) -> bool:
        return _key(label, tokens) in self._blobs

    def longest(self, label: Label, tokens: Tokens[int]) -> int:
        """How many of the tokens, from the start, there is a state of."""
        with self._lock:
            lengths = {len(kept) for of, kept in self._blobs if replace(of, tokens=0) == replace(label, tokens=0, slots=0)}
            return max((n for n in lengths if n <= len(tokens) and self.has(replace(label, tokens=n), tokens[:n])), default=0)

    def keep(self, label: Label, tokens: Tokens[int], sequence: Sequence) -> bool:
        """Keep the state of a sequence that holds just these tokens; False if it is too large, or cannot be kept."""
        key, size = _key(label, tokens), sequence.state_bytes()
        with self._lock:
            if size > self._budget_bytes:
                return False
            if self._store is None:
                self._store = KvStore(np.empty(self._budget_bytes, np.uint8), pinned=False)
            if key in self._blobs:
                return True
            while len(self._blobs) >= _MOST or self._store.used_bytes + size > self._budget_bytes:
                if not self._blobs:
                    return False  # of one that was freed while it was sealed
                self._forget(next(iter(self._blobs)))
            try:
                blob = self._store.write(size, key[0], sequence.save)
            except LlamaError as error:
                log.warning("the beginning of a conversation could not be kept: %s", error)
                return False
            if blob is None:
                return False
            if blob.form is None:
                self._store.free(blob)  # only a context of as many slots could take it
                return False
            self._blobs[key] = blob
            return True

    def restore(self, label: Label, tokens: Tokens[int], sequence: Sequence) -> bool:
        """Bring the state of these tokens into a sequence; False, and the sequence empty, if it is not to be had."""
        key = _key(label, tokens)
        with self._lock:
            blob, restored = self._blobs.get(key), False
            if blob is not None:
                self._blobs.move_to_end(key)
                try:
                    restored = self._of(blob, sequence)
                except DamagedBlob as damage:
                    log.warning("the kept beginning of a conversation is not used: %s", damage)
                if not restored:
                    self._forget(key)
        if not restored:
            sequence.clear()
        return restored

    def close(self) -> None:
        with self._lock:
            self._blobs.clear()
            if self._store is not None:
                self._store.close()

    def _of(self, blob: Blob, sequence: Sequence) -> bool:
        if self._store is None:
            raise InternalError("a state that is kept nowhere")
        return self._store.read(blob, blob.label, lambda state: sequence.restore(state, blob.form))

    def _forget(self, key: tuple[Label, tuple[int, ...]]) -> None:
        if self._store is not None:
            self._store.free(self._blobs.pop(key))


def _key(label: Label, tokens: Tokens[int]) -> tuple[Label, tuple[int, ...]]:
    return replace(label, slots=0), tuple(tokens)
