"""The loop of a turn: sample, keep, show, decode. It can stop for want of room and go on in another context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conductor.backend.conversation import Conversation, first_to_drop
from conductor.backend.llama import Context, Sampler
from conductor.backend.text import TextAssembler
from conductor.types import Chunk, DecodeRequest, FinishReason

if TYPE_CHECKING:
    from conductor.backend.turn import TurnOrder

#: fewer tokens say more about the beginning of a decode than about reading
_WORTH_TIMING = 32


@dataclass(slots=True)
class Reading:
    """Decoding tokens that are known already, and how long it takes."""

    tokens: int = 0
    seconds: float = 0.0

    def feed(self, context: Context, tokens: Sequence[int], stopped: Callable[[], bool]) -> int:
        """Returns how many were decoded before `stopped`. Raises LlamaError."""
        began = time.monotonic()
        count = context.feed(tokens, stopped)
        context.synchronize()
        self.seconds += time.monotonic() - began
        self.tokens += count
        return count

    @property
    def s_per_token(self) -> float | None:
        return self.seconds / self.tokens if self.tokens >= _WORTH_TIMING else None


class Generation:
    """The answer of one turn in the making; close it. A tiny model goes round the loop thousands of times a second."""

    def __init__(
        self, conversation: Conversation, request: DecodeRequest, seed: int, reading: Reading, *, partial: bytes
    ) -> None:
        self._conversation, self._request, self._reading = conversation, request, reading
        self._sampler = Sampler(request, seed)
        self._assembler = TextAssembler(request.stop, partial=partial)
        self.made: list[int] = []
        self.text: list[str] = []
        self.recomputed = 0  #: tokens decoded again because their KV was lost since the prompt
        self.first_token_at = 0.0
        self._next_chunk_at = 0.0
        self._tokens_shown = 0

    def close(self) -> None:
        self._sampler.close()

    def go_on(self, context: Context, order: TurnOrder) -> FinishReason | None:
        """Why the answer ended; None if it has not, and the context has no room for another token. Raises LlamaError."""
        try:
            reason = self._loop(context, order)
        except BaseException:
            self._conversation.partial = self._assembler.finish()  # what was made stays
            raise
        if reason is not None:
            self._conversation.partial = self._assembler.finish()
        self._show(time.monotonic(), order)  # without room it may be a while until the next token
        return reason

    def _loop(self, context: Context, order: TurnOrder) -> FinishReason | None:
        conversation, ends, model = self._conversation, context.model.end_tokens, context.model
        while True:
            length = len(conversation.tokens)
            if conversation.cached < length:
                if order.room <= length < order.window:
                    return None
                if not self._decode(context, order):
                    return FinishReason.CANCELLED
            token = context.sample(self._sampler)
            conversation.tokens.append(token)
            self.made.append(token)
            if not self.first_token_at:
                self.first_token_at = time.monotonic()
            reason = FinishReason.EOS if token in ends else self._take(model.piece(token), order)
            if reason is not None:
                return reason

    def _decode(self, context: Context, order: TurnOrder) -> bool:
        """Decode what the cache lacks: one token, or more if the cache was lost; False if that was stopped in the middle."""
        conversation = self._conversation
        lost = len(conversation.tokens) - 1 - conversation.cached  # since the last token; a shift that follows loses more
        if len(conversation.tokens) >= order.window:
            first = first_to_drop(context)
            conversation.drop(context, first, max(1, (len(conversation.tokens) - first) // 2))
        cached, length = conversation.cached, len(conversation.tokens)
        if cached == length - 1:
            context.feed_one(conversation.tokens[-1])
            conversation.has_decoded(length)
            return True
        count = self._reading.feed(context, conversation.tokens[cached:], order.stopped)
        conversation.has_decoded(cached + count)
        self.recomputed += min(lost, count)
        return cached + count == length

    def _take(self, piece: bytes, order: TurnOrder) -> FinishReason | None:
        """Turn the newest token into text; the reason if it was the last one."""
        stopped = self._assembler.add(piece)
        if order.emit is not None and (now := time.monotonic()) >= self._next_chunk_at:
            self._show(now, order)
        if stopped:
            return FinishReason.STOP
        if len(self.made) >= self._request.max_tokens:
            return FinishReason.LENGTH
        if len(self._conversation.tokens) >= order.window and not order.context_shift:
            return FinishReason.WINDOW
        return FinishReason.CANCELLED if order.stopped() else None

    def _show(self, now: float, order: TurnOrder) -> None:
        """Hand on what became text: at once the first time, later by time, so that nobody gets a message for each token."""
        text = self._assembler.take()
        if not text:
            return
        self.text.append(text)
        if order.emit is not None:
            order.emit(Chunk(text, len(self.made) - self._tokens_shown))
            self._tokens_shown, self._next_chunk_at = len(self.made), now + order.chunk_interval_s
