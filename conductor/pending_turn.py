"""A turn as its caller waits for it: what was asked, for how long it may wait and last, and what it came to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from conductor.backend.turn import TurnOutcome
from conductor.chunk_stream import ChunkStream
from conductor.core import actions
from conductor.errors import ConductorError, TurnCancelled
from conductor.types import AgentId, DecodeRequest, DecodeResult, FinishReason


@dataclass(slots=True, eq=False)
class PendingTurn:
    agent_id: AgentId
    request: DecodeRequest
    reader: ChunkStream | None
    arrived_at: float  #: time.monotonic()
    #: how long it may wait for its seat, and for room when it outgrows its window; None: as long as it takes
    wait_s: float | None
    growth_wait_s: float | None
    result: asyncio.Future[DecodeResult]
    #: tells the policy when it has waited long enough
    deadline: asyncio.TimerHandle | None = None
    #: tells the policy when it has lasted long enough
    end: asyncio.TimerHandle | None = None
    began_at: float | None = None
    #: the last order to run it: what was moved for it so far
    run: actions.RunTurn | None = None

    def ended_unheard(self, reason: FinishReason) -> None:
        """It made nothing: the session is as it was."""
        if reason is FinishReason.CANCELLED:
            self.failed(TurnCancelled(self.agent_id, "cancel was called"))
        else:
            self.ended(TurnOutcome.nothing(reason, seed=self.request.seed or 0))

    def failed(self, error: ConductorError) -> None:
        if not self.result.done():
            self.result.set_exception(error)

    def ended(self, outcome: TurnOutcome) -> None:
        if not self.result.done():
            self.result.set_result(self._told(outcome, time.monotonic()))

    def _told(self, outcome: TurnOutcome, ended_at: float) -> DecodeResult:
        """What the caller gets to hear of a turn that ended now."""
        began_at, run = ended_at if self.began_at is None else self.began_at, self.run
        return DecodeResult(
            agent_id=self.agent_id,
            text=outcome.text,
            tokens=outcome.tokens,
            prompt_tokens=outcome.prompt_tokens,
            prompt_tokens_reused=outcome.prompt_tokens_reused,
            prefix_tokens_reused=outcome.prefix_tokens_reused,
            generated_tokens=len(outcome.tokens),
            stopped_on_eos=outcome.finish_reason is FinishReason.EOS,
            finish_reason=outcome.finish_reason,
            seed=outcome.seed,
            elapsed_ms=(ended_at - self.arrived_at) * 1000,
            queue_ms=(began_at - self.arrived_at) * 1000,
            time_to_first_token_ms=((outcome.first_token_at or ended_at) - self.arrived_at) * 1000,
            longest_stall_ms=outcome.longest_stall_s * 1000,
            kv_swap_evicted=run.evicted if run else None,
            kv_swap_restored=run.restored if run else False,
            swap_bytes=run.swap_bytes if run else 0,
            window_growths=run.growths if run else 0,
            pauses=run.pauses if run else 0,
            recomputed_tokens=outcome.recomputed_tokens,
        )
