"""Many sequences in one bare context, each step one token of each: the limit of batched decoding.

Greedy, by numpy's argmax over the rows of logits; the batch is built once and written through numpy views. Prompts are read
before anything is generated, as many whole ones at a time as fit a batch.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from benchmarks.bare import BareModel
from benchmarks.readings import Reading
from conductor.types import ContextSpec

Ints = npt.NDArray[np.int32]


class BareBatch:
    """A context with `spec.slots` sequences and a batch for it; close it."""

    def __init__(self, model: BareModel, spec: ContextSpec, *, n_threads: int) -> None:
        assert spec.slots <= spec.n_batch, "a step takes a token of each sequence"
        self._n_vocab, self._n_batch = model.n_vocab, spec.n_batch
        self._context = model.context(spec, n_threads=n_threads)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = batch = llama.llama_batch_init(spec.n_batch, 0, 1)
        self._token, self._pos = self._view(batch.token, ctypes.c_int32), self._view(batch.pos, ctypes.c_int32)
        self._wanted = self._view(batch.logits, ctypes.c_int8)
        self._view(batch.n_seq_id, ctypes.c_int32)[:] = 1
        # One array of sequence numbers instead of an allocation for each token; llama_batch_free wants the originals.
        self._sequence: Ints = np.zeros(spec.n_batch, np.int32)
        self._pointers = self._view(batch.seq_id, ctypes.c_uint64)
        self._own_pointers = self._pointers.copy()
        self._pointers[:] = self._sequence.ctypes.data + 4 * np.arange(spec.n_batch, dtype=np.uint64)

    def _view(self, pointer: Any, kind: Any) -> npt.NDArray[Any]:
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (self._n_batch,))

    def close(self) -> None:
        self._pointers[:] = self._own_pointers
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[Reading], list[list[int]]]:
        """A sequence for each prompt, `max_tokens` of each: when they came, and the tokens. The end of a text is no end."""
        count = len(prompts)
        llama.llama_memory_clear(self._memory, False)
        made: Ints = np.empty((max_tokens, count), np.int32)
        began_at = time.perf_counter()
        readings = [Reading(began_at) for _ in prompts]
        done = 0
        for rows in self._read(prompts):
            made[0, done : done + rows.size] = rows
            for reading in readings[done : done + rows.size]:
                reading.arrived(1)
            done += rows.size
        prompts_read_at = time.perf_counter()
        self._sequence[:count] = np.arange(count)
        self._pos[:count] = [len(prompt) for prompt in prompts]
        self._wanted[:count] = 1
        stamps = [prompts_read_at]
        for step in range(1, max_tokens):
            self._token[:count] = made[step - 1]
            made[step] = self._decode(count, count)
            self._pos[:count] += 1
            stamps.append(time.perf_counter())
        for reading in readings:
            reading.arrivals += [(stamp, 1) for stamp in stamps[1:]]
            reading.prompts_read_at = prompts_read_at
            reading.ended(max_tokens, stamps[-1])
        return readings, made.T.tolist()

    def _read(self, prompts: Sequence[Sequence[int]]) -> Iterator[Ints]:
        """Read the prompts, whole ones together where they fit a batch; yields the first tokens of those that are done."""
        start = 0
        while start < len(prompts):
            end, size = start + 1, len(prompts[start])
            while end < len(prompts) and size + len(prompts[end]) <= self._n_batch:
                size += len(prompts[end])
                end += 1
            yield self._read_group(prompts[start:end], start)
            start = end

    def _read_group(self, group: Sequence[Sequence[int]], first: int) -> Ints:
        tokens = np.concatenate([np.asarray(prompt, np.int32) for prompt in group])
        sequences = np.repeat(np.arange(first, first + len(group), dtype=np.int32), [len(prompt) for prompt in group])
        positions = np.concatenate([np.arange(len(prompt), dtype=np.int32) for prompt in group])
        wanted = np.zeros(tokens.size, np.int8)
        wanted[np.cumsum([len(prompt) for prompt in group]) - 1] = 1
        rows: Ints = np.empty(0, np.int32)
        for start in range(0, tokens.size, self._n_batch):
            part = slice(start, start + self._n_batch)
            size = tokens[part].size
            self._token[:size], self._pos[:size], self._sequence[:size] = tokens[part], positions[part], sequences[part]
            self._wanted[:size] = wanted[part]
            rows = self._decode(size, int(wanted[part].sum()))
        return rows

    def _decode(self, size: int, outputs: int) -> Ints:
        """Decode the first `size` entries of the batch; the likeliest token of each row that was wanted, in their order."""
        self._batch.n_tokens = size
        code = llama.llama_decode(self._context, self._batch)
        assert code == 0, f"llama_decode gave {code}"
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(
            llama.llama_get_logits(self._context), (max(outputs, 1), self._n_vocab)
        )
        best: Ints = logits[:outputs].argmax(axis=1).astype(np.int32)
        return best
