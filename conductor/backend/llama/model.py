"""Loaded weights and their vocabulary."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as ll

from conductor.backend.deep_stack import on_a_deep_stack
from conductor.backend.llama.binding import LlamaError
from conductor.backend.llama.context import Context
from conductor.backend.llama.movable import MovableWeights
from conductor.core.estimate import Footprint
from conductor.types import ContextSpec, DeviceKind

if TYPE_CHECKING:
    from conductor.backend.llama.library import Llama

_TOKEN_ATTR_UNKNOWN, _TOKEN_ATTR_CONTROL = 1 << 0, 1 << 3


class Model:
    """Loaded weights and their vocabulary."""

    def __init__(self, llama: Llama, handle: Any, kind: DeviceKind, name: str, *, movable: bool = False) -> None:
        """`movable`: take its weights home. Raises Unmovable, LlamaError; llama.cpp's model is the caller's to free then."""
        self.name = name
        self._llama, self._handle, self._kind = llama, handle, kind
        self._vocab = ll.llama_model_get_vocab(handle)
        self.n_vocab = int(ll.llama_vocab_n_tokens(self._vocab))
        self._pieces: dict[int, bytes] = {}
        #: a sequence of it cannot be cut back to any token: its state is recurrent, or its layers slide
        self.forgets = bool(
            ll.llama_model_is_recurrent(handle) or ll.llama_model_is_hybrid(handle) or ll.llama_model_n_swa(handle) > 0
        )
        #: None: all of the weights are on the device until the model is closed
        self.weights = MovableWeights(handle, kind) if movable else None

    def close(self) -> None:
        if self.weights is not None:
            self.weights.close()
        ll.llama_model_free(self._handle)
        self._handle = None

    def footprint(self, spec: ContextSpec, *, step: int | None = None) -> Footprint | None:
        """What the weights and a context take on the device; None if this llama.cpp does not tell. Raises LlamaError.

        `step`: as if so many tokens were in work at once, instead of what the parameters say.
        """
        context = Context(self._llama, self, self._handle, self._kind, spec, n_threads=1, step=step)
        try:
            return context.footprint()
        finally:
            context.close()

    def context(self, spec: ContextSpec, *, n_threads: int) -> Context:
        """A live context for `spec.slots` sequences. Raises LlamaError if it does not fit the device, or cannot be."""
        ring = self.weights.ring if self.weights is not None else None
        return Context(self._llama, self, self._handle, self._kind, spec, n_threads=n_threads, ring=ring)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. `parse_special`: control strings such as <|im_end|> become their tokens."""
        raw = text.encode("utf-8")
        try:
            return on_a_deep_stack(len(raw), lambda: self._tokenize(raw, add_special, parse_special))
        except RuntimeError as error:
            raise LlamaError(f"a text of {len(raw)} bytes is too long to be tokenised here") from error

    def _tokenize(self, raw: bytes, add_special: bool, parse_special: bool) -> list[int]:
        room = len(raw) + 8
        while True:
            buffer = (ll.llama_token * room)()
            count = ll.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; empty for control tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._render(token, special=False)
        return known

    def _render(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:  # llama.cpp would abort
            raise LlamaError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = ll.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return frozenset(token for token in range(self.n_vocab) if ll.llama_vocab_is_eog(self._vocab, token))

    @functools.cached_property
    def chat_template(self) -> str | None:
        raw = ll.llama_model_chat_template(self._handle, None)
        return raw.decode("utf-8", "replace") if raw else None

    @functools.cached_property
    def bos(self) -> str:
        return self._special(ll.llama_vocab_bos(self._vocab))

    @functools.cached_property
    def eos(self) -> str:
        return self._special(ll.llama_vocab_eos(self._vocab))

    @functools.cached_property
    def adds_bos(self) -> bool:
        return bool(ll.llama_vocab_get_add_bos(self._vocab))

    def _special(self, token: int) -> str:
        return self._render(token, special=True).decode("utf-8", "replace") if 0 <= token < self.n_vocab else ""

    @functools.cached_property
    def control_strings(self) -> tuple[str, ...]:
        """What a user's text must not be able to say as a control token, longest first.

        Not what the model's makers call user-defined: llama.cpp reads those as tokens in any text.
        """
        control = _TOKEN_ATTR_UNKNOWN | _TOKEN_ATTR_CONTROL
        tokens = (t for t in range(self.n_vocab) if ll.llama_vocab_get_attr(self._vocab, t) & control)
        return tuple(sorted({text for t in tokens if (text := self._special(t))}, key=len, reverse=True))
