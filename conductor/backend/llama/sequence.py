"""One slot of a context: an agent's past, as llama.cpp keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as ll

from conductor.backend.llama.binding import ByteArray, LlamaError, pointer
from conductor.backend.llama.streams import Form

if TYPE_CHECKING:
    from conductor.backend.llama.context import Context
    from conductor.backend.llama.model import Model

#: of a state: only what a cache forgets as it goes, sliding or recurrent; where there is none of that, all of it
_PARTIAL = 1
_HEADER_BYTES = 8


class Sequence:
    """Used by the thread that has the context. `slot` changes when its owner is moved to another one."""

    __slots__ = ("context", "slot")

    def __init__(self, context: Context, slot: int) -> None:
        self.context, self.slot = context, context.valid(slot)

    @property
    def model(self) -> Model:
        return self.context.model

    def truncate(self, n_tokens: int) -> bool:
        """Forget all but the first `n_tokens`; False if this architecture cannot (the cache is then cleared)."""
        if self._holds_window_before(n_tokens) and ll.llama_memory_seq_rm(self.context.memory, self.slot, n_tokens, -1):
            return True
        self.clear()
        return n_tokens == 0

    def can_truncate(self, n_tokens: int) -> bool:
        """Whether a copy of it could forget all but the first `n_tokens`."""
        return not self.context.recurrent and self._holds_window_before(n_tokens)

    def _holds_window_before(self, n_tokens: int) -> bool:
        """Sliding layers forget what left their window; cut back to before that, they would attend to nothing, silently."""
        window = self.context.sliding_window
        if not window:
            return True
        return int(ll.llama_memory_seq_pos_min(self.context.memory, self.slot)) <= max(0, n_tokens - window)

    def clear(self) -> None:
        self.context.empty(self.slot)

    def shift(self, start: int, end: int) -> bool:
        """Drop the tokens from `start` to before `end` and move the later ones down.

        False if this architecture cannot: a recurrent state cannot forget a part of what it has seen. It is as it was then.
        """
        memory = self.context.memory
        if not ll.llama_memory_can_shift(memory) or not ll.llama_memory_seq_rm(memory, self.slot, start, end):
            return False
        ll.llama_memory_seq_add(memory, self.slot, end, -1, start - end)
        self.context.pending = True
        return True

    def state_bytes(self) -> int:
        """What `save` needs; the same in a context of any number of slots."""
        return self.context.streams.bytes(self._size(0))

    def _size(self, flags: int) -> int:
        return int(ll.llama_state_seq_get_size_ext(self.context.handle, self.slot, flags))

    def save(self, buffer: ByteArray) -> Form | None:
        """Copy the sequence's KV into `buffer`, which has `state_bytes()` bytes. Raises LlamaError.

        Pack the form before anything else is done with it. None: only a context of as many slots can take it.
        """
        if self.context.pending:  # what llama.cpp would give is from before, and labelled as from after
            raise LlamaError("its cells were moved and nothing was decoded since")
        streams = self.context.streams
        size = buffer.nbytes - streams.slack  # asking for it anew would take as long as many small copies
        state = buffer[streams.offset : streams.offset + size]
        written = ll.llama_state_seq_get_data(self.context.handle, pointer(state), size, self.slot)
        if written != size or state.nbytes != size:
            raise self.context.complaint(f"saved {written} of {size} bytes")
        parted = streams.hybrid or streams.caches == 2
        second = self._size(_PARTIAL) - _HEADER_BYTES if parted else 0
        return streams.form(buffer, size, second=second, slot=self.slot)

    def restore(self, buffer: ByteArray, form: Form | None) -> bool:
        """Bring a saved KV back; False (and an empty sequence) if llama.cpp does not take it."""
        if form is not None:
            start, size = form.opened(buffer, self.context.n_slots)
        else:
            start, size = self.context.streams.offset, buffer.nbytes - self.context.streams.slack
        state = buffer[start : start + size]
        if ll.llama_state_seq_set_data(self.context.handle, pointer(state), size, self.slot) == size:
            return True
        self.clear()
        return False
