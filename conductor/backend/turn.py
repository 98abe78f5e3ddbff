"""One turn of one agent: prompt in, tokens out, the conversation kept whole.

A turn runs on a worker thread in a live context that may hold less than the agent's window. Where the context ends the turn
stops, whole, and goes on in a larger one, as the same turn: sampler, text and stream are those it began with. No thread
waits for room in between.

A turn that ends before its first token, by an error or a cancellation, leaves the conversation as it was, and so does one
that is taken back while it stands still; later, what was made stays.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from conductor.backend.conversation import Conversation, Prompter, common_prefix, first_to_drop
from conductor.backend.generation import Generation, Reading
from conductor.backend.llama import Context
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
    prefill_s_per_token: float | None  #: None if too few tokens were read to tell


@dataclass(frozen=True, slots=True)
class Outgrown:
    """The turn stands still: its context is full. It goes on with the next order for it, or is dropped."""

    required_tokens: int  #: that a context must have room for, for the turn to go on at all
    desired_tokens: int  #: that it may need until its end


@dataclass(frozen=True, slots=True)
class TurnOrder:
    """What a turn is to do and with what. `emit` gets chunks at most every `chunk_interval_s`, from the worker thread."""

    agent_id: AgentId
    request: DecodeRequest  #: the very object is the turn: an order with another one begins another turn
    window: int  #: that the agent was admitted for
    room: int  #: tokens that the live context holds
    context_shift: bool
    stopped: Callable[[], bool]
    emit: Callable[[Chunk], None] | None = None
    chunk_interval_s: float = 0.02


@dataclass(frozen=True, slots=True)
class _Target:
    """The conversation as it is to stand before the answer."""

    tokens: list[int]
    known: int  #: how many of the conversation's tokens it began with
    first: int = 0
    dropped: int = 0  #: how many of those, from `first` on, a context shift then took out


class TurnRun:
    """A turn from its first order to its end; close it. Between two orders it knows no context: even its model may be gone."""

    def __init__(self, conversation: Conversation, request: DecodeRequest) -> None:
        self.request = request
        self._conversation = conversation
        self._before = list(conversation.tokens)
        #: how many tokens at the cache's start are still those of `_before`, were it to hold as many
        self._untouched = len(self._before)
        self._seed = request.seed if request.seed is not None else secrets.randbelow(MAX_SEED + 1)
        self._reading = Reading()
        self._target: _Target | None = None
        self._generation: Generation | None = None
        self._length = self._prompt_tokens = self._reused = self._recomputed = 0

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()

    @property
    def text(self) -> str:
        """What has been made so far."""
        return "".join(self._generation.text) if self._generation else ""

    def take_back(self) -> None:
        """Leave the conversation as it was before the turn. Does not touch the context: another thread may be saving it."""
        self._conversation.tokens = self._before
        self._conversation.valid = min(self._conversation.valid, self._untouched)

    def go_on(self, context: Context, prompter: Prompter, order: TurnOrder) -> TurnOutcome | Outgrown:
        """As far as the context goes. Raises InvalidRequest, ChatTemplateFailed, WindowFull, TurnCancelled, LlamaError."""
        if self._target is None:
            self._target = _fit_window(context, self._conversation, prompter, order)
            self._length = len(self._target.tokens)  # the list itself becomes the conversation's, and grows
        desired = min(order.window, self._length + self.request.max_tokens)
        if self._generation is None:
            if self._length >= order.room:  # nothing was decoded or dropped yet
                return Outgrown(self._length + 1, desired)
            self._read_prompt(context, self._target, order)
            self._generation = self._begin()
        reason = self._generation.go_on(context, order)
        if reason is None:
            return Outgrown(len(self._conversation.tokens) + 1, desired)
        return self._outcome(self._generation, reason)

    def _read_prompt(self, context: Context, target: _Target, order: TurnOrder) -> None:
        try:
            known = self._shift(context, target)
            self._feed(context, target.tokens, known, order)
        except BaseException:
            self.take_back()
            raise

    def _shift(self, context: Context, target: _Target) -> int:
        """Take out of the conversation what the target lacks; returns how many tokens both begin with."""
        self._untouched = target.known
        if not target.dropped:
            return target.known
        conversation = self._conversation
        self._untouched = target.first
        conversation.rewind(context, target.known)
        conversation.drop(context, target.first, target.dropped)
        return common_prefix(conversation.tokens, target.tokens)

    def _feed(self, context: Context, tokens: list[int], known: int, order: TurnOrder) -> None:
        """Decode what of the target the cache does not hold."""
        conversation = self._conversation
        conversation.rewind(context, min(known, len(tokens) - 1))  # the last token's logits are needed: decode it again
        conversation.tokens = tokens
        reused = conversation.cached
        conversation.has_decoded(reused + self._reading.feed(context, tokens[reused:], order.stopped))
        if conversation.cached < len(tokens):
            raise TurnCancelled(order.agent_id, "it ended while its prompt was being decoded")
        self._prompt_tokens, self._reused = len(tokens) - reused, reused
        self._recomputed = max(0, known - 1 - reused)

    def _begin(self) -> Generation:
        continues = self.request.prompt is None and self.request.messages is None
        partial = self._conversation.partial if continues else b""
        return Generation(self._conversation, self.request, self._seed, self._reading, partial=partial)

    def _outcome(self, generation: Generation, reason: FinishReason) -> TurnOutcome:
        return TurnOutcome(
            text=self.text,
            tokens=tuple(generation.made),
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_reused=self._reused,
            recomputed_tokens=self._recomputed + generation.recomputed,
            finish_reason=reason,
            seed=self._seed,
            first_token_at=generation.first_token_at,
            prefill_s_per_token=self._reading.s_per_token,
        )


def _fit_window(context: Context, conversation: Conversation, prompter: Prompter, order: TurnOrder) -> _Target:
    """The target, if it and one token more fit the window; with a context shift, less what has to be dropped of its history."""
    tokens = prompter.target(conversation, order.request)
    known = common_prefix(conversation.tokens, tokens)
    excess = len(tokens) + 1 - order.window
    if excess <= 0:
        return _Target(tokens, known)
    first = first_to_drop(context)
    droppable = prompter.history(conversation, order.request, tokens) - first
    if not order.context_shift or excess > droppable:
        raise WindowFull(order.agent_id, order.window, known, len(tokens) - known)
    drop = max(excess, droppable // 2)
    rest = tokens[:first] + tokens[first + drop :]
    if known >= first + drop:
        return _Target(rest, known, first, drop)
    # A chat's messages begin before what the session still holds: its history is read again.
    return _Target(rest, common_prefix(conversation.tokens, rest))
