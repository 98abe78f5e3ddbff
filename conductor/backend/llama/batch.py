"""The tokens of one decode: which, where in which sequence, and whose logits are wanted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Tokens

import llama_cpp.llama_cpp as ll
import numpy as np


class Batch:
    """A `llama_batch` over arrays of this object's own, so that writing a token costs no call and nothing is to be freed.

    Each sequence's tokens must be in one piece, continue what the sequence holds, and ask for one output at most; `Context`
    sees to the rest of what would abort llama.cpp.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self._token, self._position, self._sequence = (np.zeros(capacity, np.int32) for _ in range(3))
        self._output = np.zeros(capacity, np.int8)
        self._one = np.ones(capacity, np.int32)  # each token is one sequence's
        self._sequences = self._sequence.ctypes.data + np.arange(capacity, dtype=np.uint64) * self._sequence.itemsize
        int32, int8 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        self._batch = ll.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            embd=None,
            pos=self._position.ctypes.data_as(int32),
            n_seq_id=self._one.ctypes.data_as(int32),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._output.ctypes.data_as(int8),
        )

    def clear(self) -> None:
        self.count = 0

    def add_one(self, token: int, position: int, sequence: int) -> int:
        """A token whose logits are wanted; returns its place."""
        place = self.count
        self._token[place], self._position[place], self._sequence[place], self._output[place] = token, position, sequence, 1
        self.count = place + 1
        return place

    def add(self, tokens: Tokens[int], position: int, sequence: int, *, output: bool) -> int:
        """Tokens that follow each other; returns the last one's place, whose logits are wanted if `output`."""
        start, end = self.count, self.count + len(tokens)
        self._token[start:end] = tokens
        self._position[start:end] = np.arange(position, position + len(tokens), dtype=np.int32)
        self._sequence[start:end] = sequence
        self._output[start:end] = 0
        self._output[end - 1] = output
        self.count = end
        return end - 1

    def filled(self) -> ll.llama_batch:
        """As llama.cpp takes it."""
        self._batch.n_tokens = self.count
        return self._batch
