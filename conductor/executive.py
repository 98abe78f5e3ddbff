"""Carries out what the state machine asks for: actions become work in threads, its results become events.

One writer: everything here runs on one asyncio loop; what blocks runs in worker threads and returns as an event.

    event → State.handle → actions → Engine (threads) → event → …
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from typing_extensions import assert_never

from conductor.backend.engine import Closed, Engine
from conductor.backend.turn import TurnOrder, TurnOutcome
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.estimate import ModelPlan
from conductor.core.events import RequestId, TurnId
from conductor.core.state import State
from conductor.errors import ConductorError, InternalError
from conductor.types import AgentId, Chunk, DecodeRequest, DecodeResult, FinishReason, KvPlace, ModelId

log = logging.getLogger("conductor")
T = TypeVar("T")


@dataclass(slots=True)
class _PendingTurn:
    agent_id: AgentId
    request: DecodeRequest
    emit: Callable[[Chunk], None] | None
    arrived_at: float
    result: asyncio.Future[DecodeResult]
    stop: threading.Event = field(default_factory=threading.Event)


class Executive:
    """Joins the policy and the engine. `on_change` is called whenever the ledger changed."""

    def __init__(
        self, config: Config, state: State, engine: Engine, *, io_threads: Executor, on_change: Callable[[], None]
    ) -> None:
        self._config, self._state, self._engine, self._on_change = config, state, engine, on_change
        self._loop = asyncio.get_running_loop()
        self._io_threads = io_threads
        self._turn_threads = ThreadPoolExecutor(config.live_contexts, thread_name_prefix="turn")
        self._ids = itertools.count(1)
        self._answers: dict[RequestId, asyncio.Future[Any]] = {}
        self._turns: dict[TurnId, _PendingTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def stop_turns(self) -> None:
        """Ask every running turn to end after the step it is in."""
        for turn in self._turns.values():
            turn.stop.set()

    def close(self) -> None:
        self._turn_threads.shutdown(wait=False)

    def request(self) -> RequestId:
        """The id of a new request."""
        return RequestId(next(self._ids))

    async def ask(self, request: RequestId, event: events.Event) -> Any:
        """Dispatch an event and await the action that answers it."""
        answer = self._answers[request] = self._loop.create_future()
        try:
            self.dispatch(event)
            return await answer
        finally:
            del self._answers[request]

    async def turn(self, agent_id: AgentId, request: DecodeRequest, *, emit: Callable[[Chunk], None] | None) -> DecodeResult:
        """Queue a turn and await its end; cancelled, it is ended after the step it is in."""
        id = TurnId(next(self._ids))
        turn = self._turns[id] = _PendingTurn(agent_id, request, emit, time.monotonic(), self._loop.create_future())
        try:
            self.dispatch(events.TurnRequested(id, agent_id))
            return await turn.result
        except asyncio.CancelledError:
            self.dispatch(events.TurnAbandoned(id))
            raise
        finally:
            turn.stop.set()
            del self._turns[id]

    def dispatch(self, event: events.Event) -> None:
        """Tell the state machine what happened and carry out its answer."""
        revision = self._state.ledger.revision
        try:
            todo = self._state.handle(event)
        except Exception:
            log.exception("the state machine failed on %r", event)
            raise
        for action in todo:
            log.debug("%s -> %s", event, action)
            self._carry_out(action)
        if self._state.ledger.revision != revision:
            self._on_change()

    def _carry_out(self, action: actions.Action) -> None:
        match action:
            case actions.Admit() as admit:
                log.info("admitted %s on %s", admit.agent.id, admit.agent.model.key)
                self._answer(admit.request_id, admit)
            case actions.Refuse(request, error) | actions.FailRequest(request, error):
                self._fail(request, error)
            case actions.AnswerUnregister(request):
                self._answer(request, None)
            case actions.AnswerReserve(request, reservation):
                self._answer(request, reservation)
            case actions.AnswerRelease(request, released):
                self._answer(request, released)
            case actions.LoadModel(plan):
                self._spawn(self._load(plan))
            case actions.UnloadModel(model_id):
                self._spawn(self._unload(model_id))
            case actions.OpenContext() as opening:
                self._spawn(self._open(opening))
            case actions.CloseContext(agent_id, save):
                self._spawn(self._close(agent_id, save))
            case actions.RunTurn() as run:
                self._spawn(self._run(run))
            case actions.StopTurn(turn_id):
                if (turn := self._turns.get(turn_id)) is not None:
                    turn.stop.set()
            case actions.FailTurn(turn_id, error):
                if (turn := self._turns.get(turn_id)) is not None and not turn.result.done():
                    turn.result.set_exception(error)
            case actions.Forget(agent_id):
                log.info("forgot %s", agent_id)
                self._engine.forget(agent_id)
            case _:
                assert_never(action)

    def _answer(self, request: RequestId, value: object) -> None:
        if (future := self._answers.get(request)) is not None and not future.done():
            future.set_result(value)

    def _fail(self, request: RequestId, error: ConductorError) -> None:
        log.info("refused: %s", str(error).splitlines()[0])
        if (future := self._answers.get(request)) is not None and not future.done():
            future.set_exception(error)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work ended with an error that no caller hears of", exc_info=error)

    async def _in(self, threads: Executor, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(threads, function, *arguments)

    # --- work -------------------------------------------------------------------------------------------------------

    async def _load(self, plan: ModelPlan) -> None:
        event: events.Event
        try:
            event = events.ModelLoaded(plan.id, await self._in(self._io_threads, self._engine.load, plan))
        except Exception as error:
            event = events.ModelLoadFailed(plan.id, _own(error))
        self.dispatch(event)

    async def _unload(self, model_id: ModelId) -> None:
        try:
            await self._in(self._io_threads, self._engine.unload, model_id)
        except Exception as error:  # whoever waits for the bytes must not wait for ever
            log.error("unloading a model", exc_info=error)
        self.dispatch(events.ModelUnloaded(model_id))

    async def _open(self, opening: actions.OpenContext) -> None:
        agent_id = opening.agent_id
        event: events.Event
        try:
            opened = await self._in(self._turn_threads, self._engine.open_context, agent_id, opening.model_id, opening.context)
            estimated = self._state.agents[agent_id].context_bytes
            taken = estimated if opened.context_bytes is None else opened.context_bytes
            event = events.ContextOpened(agent_id, taken, opened.restored_bytes)
        except Exception as error:
            event = events.ContextOpenFailed(agent_id, _own(error), self._state.agents[agent_id].place)
        self.dispatch(event)

    async def _close(self, agent_id: AgentId, save: bool) -> None:
        closed = Closed(KvPlace.TOKENS, 0)
        try:
            closed = await self._in(self._turn_threads, lambda: self._engine.close_context(agent_id, save=save))
        except Exception as error:  # the context is freed all the same, and the tokens are kept
            log.error("closing the context of %s", agent_id, exc_info=error)
        self.dispatch(events.ContextClosed(agent_id, closed.place, closed.saved_bytes))

    async def _run(self, run: actions.RunTurn) -> None:
        turn = self._turns.get(run.turn_id)
        if turn is None:  # its caller went away between the plan and now
            self.dispatch(events.TurnFinished(run.turn_id, self._engine.tokens(run.agent_id)))
            return
        began_at = time.monotonic()
        order = TurnOrder(
            agent_id=run.agent_id,
            request=turn.request,
            window=self._state.agents[run.agent_id].spec.context.window,
            context_shift=self._shifts(run.agent_id, turn.request),
            stopped=turn.stop.is_set,
            emit=turn.emit,
            chunk_interval_s=self._config.stream_interval_ms / 1000,
        )
        outcome: TurnOutcome | ConductorError
        try:
            outcome = await self._in(self._turn_threads, self._engine.run_turn, order)
        except Exception as error:
            outcome = _own(error)
        ended_at = time.monotonic()
        self.dispatch(events.TurnFinished(run.turn_id, self._engine.tokens(run.agent_id)))
        if turn.result.done():
            return
        if isinstance(outcome, ConductorError):
            turn.result.set_exception(outcome)
        else:
            turn.result.set_result(_result(run, turn, outcome, began_at, ended_at))

    def _shifts(self, agent_id: AgentId, request: DecodeRequest) -> bool:
        if request.context_shift is not None:
            return request.context_shift
        return self._config.context_shift(self._state.agents[agent_id].spec.model.key)


def _result(run: actions.RunTurn, turn: _PendingTurn, outcome: TurnOutcome, began_at: float, ended_at: float) -> DecodeResult:
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
        elapsed_ms=(ended_at - turn.arrived_at) * 1000,
        queue_ms=(began_at - turn.arrived_at) * 1000,
        time_to_first_token_ms=(outcome.first_token_at - turn.arrived_at) * 1000,
        kv_swap_evicted=run.evicted,
        kv_swap_restored=run.restored,
        swap_bytes=run.swap_bytes,
        recomputed_tokens=outcome.recomputed_tokens,
    )


def _own(error: Exception) -> ConductorError:
    """The error itself if it is one of ours; anything else is our bug, told as such."""
    if isinstance(error, ConductorError):
        return error
    log.error("unexpected %r", error, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
