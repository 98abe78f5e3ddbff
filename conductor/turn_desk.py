"""Turns on their way between callers, policy and engine: one `PendingTurn` for each caller who waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future

from conductor.backend.engine import Engine
from conductor.backend.turn import Outgrown, Paused, TurnEnd, TurnOrder, TurnOutcome
from conductor.chunk_stream import ChunkStream
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.events import TurnId
from conductor.core.state import State
from conductor.errors import ConductorError, InternalError, TurnCancelled, WindowRefused
from conductor.pending_turn import PendingTurn
from conductor.types import AgentId, DecodeRequest, DecodeResult, FinishReason

log = logging.getLogger("conductor")

#: of all streams together
_CHUNKS_PER_S = 200


class TurnDesk:
    """`ids`: what turns are numbered by. `dispatch`: tells the policy what happened."""

    def __init__(
        self, config: Config, state: State, engine: Engine, *, ids: Iterator[int], dispatch: Callable[..., None]
    ) -> None:
        self._config, self._state, self._engine = config, state, engine
        self._ids, self._dispatch = ids, dispatch
        self._loop = asyncio.get_running_loop()
        self._turns: dict[TurnId, PendingTurn] = {}

    # --- callers ----------------------------------------------------------------------------------------------------

    def id(self) -> TurnId:
        """The id of a new turn, or of what waits like one."""
        return TurnId(next(self._ids))

    async def turn(
        self,
        agent_id: AgentId,
        request: DecodeRequest,
        *,
        reader: ChunkStream | None = None,
        wait_s: float | None = None,
        timeout_s: float | None = None,
    ) -> DecodeResult:
        """Queue a turn and await its end; cancelled, it is ended after the step it is in.

        `wait_s` goes before what the configuration says about waiting for a seat and for room to grow; after `timeout_s` the
        turn ends with what it made.
        """
        id, config = self.id(), self._config
        turn = self._turns[id] = PendingTurn(
            agent_id=agent_id,
            request=request,
            reader=reader,
            arrived_at=time.monotonic(),
            wait_s=config.turn_wait_s if wait_s is None else wait_s,
            growth_wait_s=config.growth_wait_s if wait_s is None else wait_s,
            result=self._loop.create_future(),
        )
        if reader is not None:
            reader.on_hold = lambda held: self._hold(id, turn, held)
        if timeout_s is not None:
            turn.end = self._loop.call_later(timeout_s, self._dispatch, events.TurnOverdue(id))
        try:
            self._dispatch(events.TurnRequested(id, agent_id))
            if turn.began_at is None and turn.wait_s is not None:
                self._set_deadline(id, turn, turn.wait_s)
            return await turn.result
        except asyncio.CancelledError:
            self._dispatch(events.TurnAbandoned(id))
            raise
        finally:
            self._set_deadline(id, turn, None)
            if turn.end is not None:
                turn.end.cancel()
            del self._turns[id]

    def _hold(self, id: TurnId, turn: PendingTurn, held: bool) -> None:
        """The turn's reader fell behind, or caught up; one whose turn is over may do so during its agent's next."""
        known = self._state.rotation.turns.get(id)
        if known is not None and known.running:
            self._engine.hold_turn(turn.agent_id, held)
        self._dispatch(events.TurnHeld(id, held))

    def _set_deadline(self, id: TurnId, turn: PendingTurn, wait_s: float | None) -> None:
        if turn.deadline is not None:
            turn.deadline.cancel()
        expired = events.TurnExpired(id)
        turn.deadline = None if wait_s is None else self._loop.call_later(wait_s, self._dispatch, expired)

    def expires_in_s(self, id: TurnId) -> float | None:
        """How long a waiting turn will go on waiting."""
        turn = self._turns.get(id)
        return turn.deadline.when() - self._loop.time() if turn is not None and turn.deadline is not None else None

    def give_up(self, bug: ConductorError) -> None:
        """The policy is broken: whoever waits would wait for ever."""
        for turn in self._turns.values():
            turn.failed(bug)

    # --- what the policy asks for -------------------------------------------------------------------------------------

    def fail(self, id: TurnId, error: ConductorError) -> None:
        if (turn := self._turns.get(id)) is not None:
            turn.failed(self._with_text(error))

    def _with_text(self, error: ConductorError) -> ConductorError:
        """A turn that could not go on tells what it had made."""
        if not isinstance(error, WindowRefused):
            return error
        text = self._engine.suspended_text(error.agent_id)
        return WindowRefused(error.agent_id, error.window, error.needed_tokens, error.refusal, text)

    def run(self, run: actions.RunTurn) -> Coroutine[None, None, None]:
        """Hand the turn to the engine at once, so that whatever is said of it next meets it there; await how it ends."""
        turn = self._turns[run.turn_id]
        self._set_deadline(run.turn_id, turn, None)
        turn.began_at, turn.run = turn.began_at or time.monotonic(), run
        return self._outcome(run, turn, self._engine.run_turn(self._order(run, turn)))

    async def _outcome(self, run: actions.RunTurn, turn: PendingTurn, ends: Future[TurnEnd]) -> None:
        outcome: TurnEnd | ConductorError
        try:
            outcome = await asyncio.wrap_future(ends)
        except Exception as error:
            outcome = own(error)
        match outcome:
            case Outgrown():
                self._outgrew(run, turn, outcome)
            case Paused(computed, has_made):
                agent_id = run.agent_id
                tokens, state_bytes = self._engine.tokens(agent_id), self._engine.state_bytes(agent_id)
                self._dispatch(events.TurnPaused(run.turn_id, tokens, state_bytes, computed, has_made))
            case TurnOutcome():
                self._dispatch(self._finished(run, outcome))
                turn.ended(outcome)
            case TurnCancelled() if self._state.rotation.turns[run.turn_id].stopping is FinishReason.TIMEOUT:
                self._dispatch(self._finished(run))
                turn.ended_unheard(FinishReason.TIMEOUT)
            case _:
                told = {"agent": run.agent_id, "request": run.turn_id}
                log.info("the turn failed: %s", type(outcome).__name__, extra=told)  # its text may have the caller's words in it
                self._dispatch(self._finished(run))
                turn.failed(outcome)

    def end(self, end: actions.EndTurn) -> None:
        """A turn that waits or stands still ends with what it made."""
        turn = self._turns.get(end.turn_id)
        begun = turn is not None and turn.began_at is not None
        outcome = self._engine.end_turn(end.agent_id, end.reason) if begun else None
        if turn is not None and outcome is not None:
            turn.ended(outcome)
        elif turn is not None:
            turn.ended_unheard(end.reason)

    def _order(self, run: actions.RunTurn, turn: PendingTurn) -> TurnOrder:
        return TurnOrder(
            agent_id=run.agent_id,
            request=turn.request,
            window=self._state.agents[run.agent_id].spec.context.window,
            room=run.room,
            context_shift=self._shifts(run.agent_id, turn.request),
            emit=turn.reader.emit if turn.reader is not None else None,
            chunk_interval_s=self._chunk_interval_s(),
        )

    def _chunk_interval_s(self) -> float:
        """Many readers get their text less often: each message costs the process that decodes some tenths of a millisecond."""
        readers = sum(turn.reader is not None for turn in self._turns.values())
        return max(self._config.stream_interval_ms / 1000, readers / _CHUNKS_PER_S)

    def _finished(self, run: actions.RunTurn, outcome: TurnOutcome | None = None) -> events.TurnFinished:
        return events.TurnFinished(
            run.turn_id,
            self._engine.tokens(run.agent_id),
            self._engine.state_bytes(run.agent_id),
            outcome.prefill_s_per_token if outcome else None,
            outcome.computed_tokens if outcome else 0,
        )

    def _outgrew(self, run: actions.RunTurn, turn: PendingTurn, outgrown: Outgrown) -> None:
        self._set_deadline(run.turn_id, turn, turn.growth_wait_s)
        self._dispatch(
            events.TurnOutgrew(
                run.turn_id,
                self._engine.tokens(run.agent_id),
                self._engine.state_bytes(run.agent_id),
                outgrown.required_tokens,
                outgrown.desired_tokens,
                outgrown.computed_tokens,
                outgrown.has_made,
            )
        )

    def _shifts(self, agent_id: AgentId, request: DecodeRequest) -> bool:
        if request.context_shift is not None:
            return request.context_shift
        return self._config.context_shift(self._state.agents[agent_id].spec.model.key)


def own(error: Exception) -> ConductorError:
    """The error itself if it is one of ours; anything else is our bug, told as such."""
    if isinstance(error, ConductorError):
        return error
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
