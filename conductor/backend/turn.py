"""One turn of one agent in its live context: prompt in, tokens out, the conversation kept whole.

Runs on a worker thread. A turn that ends before its first token, by an error or a cancellation, leaves the
conversation as it was; later, what was made stays.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from conductor.backend.conversation import Conversation, Prompter, common_prefix
from conductor.backend.llama import Context, Sampler
from conductor.backend.text import TextAssembler
from conductor.errors import TurnCancelled, WindowFull
from conductor.types import MAX_SEED, AgentId, Chunk, DecodeRequest, FinishReason


@dataclass(frozen=True, slots=True)
class TurnOutcome:
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_tokens_reused: int
    recomputed_tokens: int
    finish_reason: FinishReason
    seed: int
    first_token_at: float  #: time.monotonic()


@dataclass(frozen=True, slots=True)
class TurnOrder:
    """What a turn is to do and with what. `emit` gets chunks at most every `chunk_interval_s`, from the worker thread."""

    agent_id: AgentId
    request: DecodeRequest
    window: int
    context_shift: bool
    stopped: Callable[[], bool]
    emit: Callable[[Chunk], None] | None = None
    chunk_interval_s: float = 0.02


def run_turn(context: Context, conversation: Conversation, prompter: Prompter, order: TurnOrder) -> TurnOutcome:
    """Carry out a turn. Raises InvalidRequest, ChatTemplateFailed, WindowFull, TurnCancelled, llama.LlamaError."""
    before = list(conversation.tokens)
    target = _fit_window(context, conversation, prompter, order)
    known = common_prefix(conversation.tokens, target)
    continues = order.request.prompt is None and order.request.messages is None
    partial = conversation.partial if continues else b""
    shifted = len(conversation.tokens) < len(before)
    try:
        reused = _feed_prompt(context, conversation, target, known, order)
    except BaseException:
        conversation.tokens = before
        _rewind(context, conversation, min(known, _first_to_drop(context)) if shifted else known)
        raise
    decoded = len(target) - reused  # the list itself grows from here on
    seed = order.request.seed if order.request.seed is not None else secrets.randbelow(MAX_SEED + 1)
    generation = _Generation(context, conversation, order, TextAssembler(order.request.stop, partial=partial))
    sampler = Sampler(order.request, seed)
    try:
        reason = generation.run(sampler)
    finally:
        sampler.close()
    return TurnOutcome(
        text="".join(generation.text),
        tokens=tuple(generation.made),
        prompt_tokens=decoded,
        prompt_tokens_reused=reused,
        recomputed_tokens=max(0, known - 1 - reused),
        finish_reason=reason,
        seed=seed,
        first_token_at=generation.first_token_at,
    )


def _fit_window(context: Context, conversation: Conversation, prompter: Prompter, order: TurnOrder) -> list[int]:
    """The target, if it and one token more fit the window; with a context shift, less what had to be dropped of its history."""
    tokens = prompter.target(conversation, order.request)
    excess = len(tokens) + 1 - order.window
    if excess <= 0:
        return tokens
    first, held = _first_to_drop(context), common_prefix(conversation.tokens, tokens)
    droppable = prompter.history(conversation, order.request, tokens) - first
    if not order.context_shift or excess > droppable:
        raise WindowFull(order.agent_id, order.window, held, len(tokens) - held)
    drop = max(excess, droppable // 2)
    if held >= first + drop:  # else a chat's messages begin before what the session still holds: its history is read again
        _rewind(context, conversation, held)
        _drop(context, conversation, first, drop)
    return tokens[:first] + tokens[first + drop :]


def _feed_prompt(context: Context, conversation: Conversation, target: list[int], known: int, order: TurnOrder) -> int:
    """Decode what of the target the cache does not hold; returns how many tokens it did hold."""
    _rewind(context, conversation, min(known, len(target) - 1))  # the last token's logits are needed: decode it again
    reused = conversation.cached
    conversation.tokens = target
    conversation.cached += context.feed(target[reused:], order.stopped)
    if conversation.cached < len(target):
        raise TurnCancelled(order.agent_id, "it ended while its prompt was being decoded")
    return reused


def _rewind(context: Context, conversation: Conversation, n_tokens: int) -> None:
    """Let the cache hold no more than the first `n_tokens`; where the architecture cannot, nothing."""
    if conversation.cached > n_tokens:
        conversation.cached = n_tokens if context.truncate(n_tokens) else 0


def _first_to_drop(context: Context) -> int:
    return 1 if context.model.adds_bos else 0


def _drop(context: Context, conversation: Conversation, first: int, count: int) -> None:
    """Forget `count` tokens of the conversation from `first` on, by moving the cache if the architecture can."""
    if context.can_shift and conversation.cached >= first + count:
        context.shift(first, first + count)
        conversation.cached -= count
    else:
        _rewind(context, conversation, first)
    del conversation.tokens[first : first + count]


class _Generation:
    """The loop of a turn: sample, keep, show, decode. A tiny model goes round it thousands of times a second."""

    def __init__(self, context: Context, conversation: Conversation, order: TurnOrder, assembler: TextAssembler) -> None:
        self._context, self._conversation, self._order, self._assembler = context, conversation, order, assembler
        self._ends = context.model.end_tokens
        self.made: list[int] = []
        self.text: list[str] = []
        self.first_token_at = 0.0
        self._next_chunk_at = 0.0
        self._tokens_shown = 0

    def run(self, sampler: Sampler) -> FinishReason:
        conversation, context, order = self._conversation, self._context, self._order
        while True:
            token = context.sample(sampler)
            conversation.tokens.append(token)
            self.made.append(token)
            if not self.first_token_at:
                self.first_token_at = time.monotonic()
            reason = self._take(token)
            if reason is not None:
                break
            if len(conversation.tokens) >= order.window:
                first = _first_to_drop(context)
                _drop(context, conversation, first, max(1, (len(conversation.tokens) - first) // 2))
            if conversation.cached == len(conversation.tokens) - 1:
                context.feed_one(token)
            else:  # after a drop that had to clear the cache
                context.feed(conversation.tokens[conversation.cached :])
            conversation.cached = len(conversation.tokens)
        conversation.partial = self._assembler.finish()
        self._show(time.monotonic())
        return reason

    def _take(self, token: int) -> FinishReason | None:
        """Turn the token into text; the reason if it was the last one."""
        order = self._order
        if token in self._ends:
            return FinishReason.EOS
        stopped = self._assembler.add(self._context.model.piece(token))
        if order.emit is not None and (now := time.monotonic()) >= self._next_chunk_at:
            self._show(now)
        if stopped:
            return FinishReason.STOP
        if len(self.made) >= order.request.max_tokens:
            return FinishReason.LENGTH
        if len(self._conversation.tokens) >= order.window and not order.context_shift:
            return FinishReason.WINDOW
        return FinishReason.CANCELLED if order.stopped() else None

    def _show(self, now: float) -> None:
        """Hand on what became text: at once the first time, later by time, so that nobody gets a message for each token."""
        text = self._assembler.take()
        if not text:
            return
        self.text.append(text)
        if self._order.emit is not None:
            self._order.emit(Chunk(text, len(self.made) - self._tokens_shown))
            self._tokens_shown, self._next_chunk_at = len(self.made), now + self._order.chunk_interval_s
