"""A live `llama_context`: sequences side by side, decoded together.

Validates whatever would make llama.cpp abort the process. Knows nothing of agents, ledgers or queues; one thread at a time.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from conductor.backend.llama import row_search
from conductor.backend.llama.batch import Batch
from conductor.backend.llama.binding import KV_TYPES, LlamaError, function, quick
from conductor.backend.llama.sequence import Sequence
from conductor.backend.llama.streams import Streams
from conductor.core.estimate import Footprint, batch_tokens, refusal, slot_cells, step_tokens
from conductor.types import ContextSpec, DeviceKind

if TYPE_CHECKING:
    from conductor.backend.llama.layer_ring import LayerRing
    from conductor.backend.llama.library import Llama
    from conductor.backend.llama.model import Model

_decode = function("llama_decode", ctypes.c_int32, ctypes.c_void_p, ll.llama_batch)
_logits = quick("llama_get_logits", ctypes.c_void_p, ctypes.c_void_p)

#: what llama_decode returns where the KV cache has no room; nothing was changed then
_NO_ROOM = 1
_MEANING = {_NO_ROOM: "no room in the KV cache", -1: "invalid batch"}


class NoRoom(LlamaError):
    """The cache of one of the batch's sequences is full; nothing was decoded, nothing was changed."""


class Context:
    """`spec.slots` sequences of `spec.window` tokens each; `sequence` tells of one of them."""

    def __init__(
        self,
        llama: Llama,
        model: Model,
        model_handle: Any,
        kind: DeviceKind,
        spec: ContextSpec,
        *,
        n_threads: int,
        step: int | None = None,
        ring: LayerRing | None = None,
    ) -> None:
        if why := refusal(spec):
            raise LlamaError(why)
        params = ll.llama_context_default_params()
        params.n_ctx = spec.slots * slot_cells(spec)
        params.n_batch = batch_tokens(spec)
        params.n_ubatch = step or step_tokens(spec)
        params.n_seq_max = params.n_outputs_max = spec.slots  # fewer outputs than sequences abort the process
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(spec.flash_attention)
        params.type_k = params.type_v = KV_TYPES[spec.kv_type]
        params.swa_full = False
        params.offload_kqv = params.op_offload = kind is DeviceKind.CUDA
        if ring is not None:
            params.cb_eval = ring.callback
        handle = ll.llama_init_from_model(model_handle, params)
        if not handle:
            raise llama.complaint("llama_init_from_model returned nothing")
        self.model, self.handle = model, handle
        self.n_slots, self.window = spec.slots, slot_cells(spec)  #: tokens of each slot
        self.memory = ll.llama_get_memory(handle)
        self.sliding_window = int(ll.llama_model_n_swa(model_handle))
        recurrent, hybrid = (bool(of(model_handle)) for of in (ll.llama_model_is_recurrent, ll.llama_model_is_hybrid))
        #: a state cannot be cut back: a part of what it has seen cannot be forgotten
        self.recurrent = recurrent or hybrid
        caches = 2 if self.sliding_window else 1
        self.streams = Streams(spec.slots, 0 if recurrent and not hybrid else caches, hybrid)
        #: a GPU works on after `decode` has returned
        self.works_on = kind is DeviceKind.CUDA
        #: sequences were copied or shifted: llama.cpp does that with the next decode, and shows it as done before
        self.pending = False
        self._llama, self._kind, self._ring = llama, kind, ring
        self._n_batch = int(ll.llama_n_batch(handle))
        self._rows: dict[tuple[int, int], npt.NDArray[np.float32]] = {}

    def close(self) -> None:
        ll.llama_free(self.handle)
        self.handle = None

    def footprint(self) -> Footprint | None:
        """What this context and its model take on the device; None if this llama.cpp does not tell."""
        breakdown = self._llama.breakdown
        return breakdown.of(self.handle, self._kind) if breakdown.available else None

    def complaint(self, what: str) -> LlamaError:
        return self._llama.complaint(what)

    # --- decoding ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def batch(self) -> Batch:
        """What the next `decode` takes; its capacity is the most tokens of one."""
        return Batch(self._n_batch)

    def decode(self) -> None:
        """Decode the batch. Raises NoRoom, LlamaError. A batch with more tokens or outputs than there are slots would abort."""
        if self._ring is None:
            code = _decode(self.handle, self.batch.filled())
        else:
            with self._ring as ring:
                code = _decode(self.handle, self.batch.filled())
                ring.check()
                if self.batch.count <= self.n_slots:
                    ring.was_step()
        if code == 0:
            self.pending = False
        elif code == _NO_ROOM:
            self.pending = False
            raise NoRoom(_MEANING[code])
        else:
            raise self.complaint(_MEANING.get(code, f"llama_decode gave {code}"))

    def synchronize(self) -> None:
        """Wait until what was decoded is computed."""
        if self.works_on:
            ll.llama_synchronize(self.handle)

    def likeliest(self, outputs: int) -> list[int]:
        """After each token of the last batch whose logits were wanted, in their order, the first with the highest logit.

        As llama.cpp's greedy sampler says, which writes a candidate for each token of the vocabulary first.
        """
        if outputs == 1:  # a tiny model comes here thousands of times a second
            return [int(self.logits(1)[0].argmax())]
        if not outputs:
            return []
        rows = self.logits(outputs)
        return row_search.shared()(rows) if self.works_on else rows.argmax(axis=1).tolist()

    def logits(self, outputs: int) -> npt.NDArray[np.float32]:
        """(outputs, vocabulary): llama.cpp's own, until the next decode. Synchronize before."""
        address = _logits(self.handle)
        if not address:
            raise self.complaint("there are no logits")
        rows = self._rows.get((address, outputs))
        if rows is None:
            values = (ctypes.c_float * (self.model.n_vocab * outputs)).from_address(address)
            rows = np.ctypeslib.as_array(values).reshape(outputs, self.model.n_vocab)
            self._rows[address, outputs] = rows  # as often as llama.cpp gives that address
        return rows

    # --- sequences --------------------------------------------------------------------------------------------------

    def sequence(self, slot: int) -> Sequence:
        return Sequence(self, slot)

    def valid(self, slot: int) -> int:
        """The slot itself. Raises LlamaError if there is none such: llama.cpp would abort."""
        if not 0 <= slot < self.n_slots:
            raise LlamaError(f"slot {slot} of {self.n_slots}")
        return slot

    def empty(self, slot: int) -> None:
        """Forget what is in a slot."""
        ll.llama_memory_seq_rm(self.memory, self.valid(slot), -1, -1)

    def wipe(self) -> None:
        """Forget all that is in all slots, and zero their memory: no trace is left, whatever it was."""
        ll.llama_memory_clear(self.memory, True)

    def copy(self, source: int, target: int) -> None:
        """All that is in a slot, on the device, over what is in another one. Done with the next decode, exact everywhere.

        Only ever the whole: a part of another slot's cells aborts llama.cpp, and of a hybrid's state is silently wrong.
        """
        if self.valid(source) == self.valid(target):
            return
        self.empty(target)
        ll.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self.pending = True
