"""What a turn is told and what it comes to. How it runs is `turn_run`'s, with whom together `pool`'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from conductor.types import AgentId, Chunk, DecodeRequest, FinishReason


@dataclass(frozen=True, slots=True)
class TurnOutcome:
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int  #: that had to be decoded
    prompt_tokens_reused: int  #: that the session's own KV held
    recomputed_tokens: int
    finish_reason: FinishReason
    seed: int
    first_token_at: float  #: time.monotonic()
    prefill_s_per_token: float | None  #: None if too few tokens were read to tell
    prefix_tokens_reused: int  #: of the prompt, that another agent's KV held
    longest_stall_s: float  #: between two of its tokens, while it ran and was not held
    computed_tokens: int  #: decoded for it, of its prompt and its answer, what had to be decoded again included

    @classmethod
    def nothing(cls, reason: FinishReason, *, seed: int) -> TurnOutcome:
        """Of a turn that ended before its first token."""
        return cls("", (), 0, 0, 0, reason, seed, 0.0, None, 0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Outgrown:
    """The turn stands still: its context is full. It goes on with the next order for it, or is dropped or ended."""

    required_tokens: int  #: that a context must have room for, for the turn to go on at all
    desired_tokens: int  #: that it may need until its end
    computed_tokens: int  #: so far, of its prompt and its answer
    has_made: bool  #: at least a token of its answer


@dataclass(frozen=True, slots=True)
class Paused:
    """The turn stands still because it was asked to, and goes on as an outgrown one does."""

    computed_tokens: int
    has_made: bool


TurnEnd: TypeAlias = TurnOutcome | Outgrown | Paused


@dataclass(frozen=True, slots=True)
class TurnOrder:
    """What a turn is to do and with what. `emit` gets chunks at most every `chunk_interval_s`, from the pool's thread."""

    agent_id: AgentId
    request: DecodeRequest  #: the very object is the turn: an order with another one begins another turn
    window: int  #: that the agent was admitted for
    room: int  #: tokens that its slot holds
    context_shift: bool
    emit: Callable[[Chunk], None] | None = None
    chunk_interval_s: float = 0.02
