"""A turn as its caller waits for it: what was asked, for how long it may wait, and what it came to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from conductor.backend.turn import TurnOutcome
from conductor.core import actions
from conductor.types import AgentId, Chunk, DecodeRequest, DecodeResult, FinishReason


@dataclass(slots=True)
class PendingTurn:
    agent_id: AgentId
    request: DecodeRequest
    emit: Callable[[Chunk], None] | None
    arrived_at: float  #: time.monotonic()
    #: how long it may wait for its place, and for room when it outgrows its context; None: as long as it takes
    wait_s: float | None
    growth_wait_s: float | None
    result: asyncio.Future[DecodeResult]
    #: tells the policy when it has waited long enough
    deadline: asyncio.TimerHandle | None = None
    began_at: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def told(self, run: actions.RunTurn, outcome: TurnOutcome, ended_at: float) -> DecodeResult:
        """What the caller gets to hear of a turn that ended now."""
        began_at = ended_at if self.began_at is None else self.began_at
        return DecodeResult(
            agent_id=run.agent_id,
            text=outcome.text,
            tokens=outcome.tokens,
            prompt_tokens=outcome.prompt_tokens,
            prompt_tokens_reused=outcome.prompt_tokens_reused,
            generated_tokens=len(outcome.tokens),
            stopped_on_eos=outcome.finish_reason is FinishReason.EOS,
            finish_reason=outcome.finish_reason,
            seed=outcome.seed,
            elapsed_ms=(ended_at - self.arrived_at) * 1000,
            queue_ms=(began_at - self.arrived_at) * 1000,
            time_to_first_token_ms=(outcome.first_token_at - self.arrived_at) * 1000,
            kv_swap_evicted=run.evicted,
            kv_swap_restored=run.restored,
            swap_bytes=run.swap_bytes,
            window_growths=run.growths,
            recomputed_tokens=outcome.recomputed_tokens,
        )
