"""Carries out what the state machine asks for: actions become work in threads, its results become events.

One writer: everything here runs on one asyncio loop; what blocks runs in worker threads and returns as an event.

    event → State.handle → actions → Engine (threads) → event → …
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from typing_extensions import assert_never

from conductor.backend.device import cap_bytes, physical_bytes
from conductor.backend.engine import Closed, Engine, Moved
from conductor.backend.turn import Outgrown, TurnOrder, TurnOutcome
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.estimate import ModelPlan
from conductor.core.events import RequestId, TurnId
from conductor.core.state import State
from conductor.errors import ConductorError, InternalError, WindowRefused
from conductor.pending_turn import PendingTurn
from conductor.types import AgentId, Chunk, DecodeRequest, DecodeResult, KvPlace, LedgerEntry, ModelId

log = logging.getLogger("conductor")

#: Threads are made when they are needed: `live_contexts`, and one for each guaranteed agent, may work at once.
_MOST_AT_ONCE = 256
_LOG_LINES = 16_384
T = TypeVar("T")


class Executive:
    """Joins the policy and the engine. `on_change` is called whenever the ledger changed."""

    def __init__(
        self, config: Config, state: State, engine: Engine, *, io_threads: Executor, on_change: Callable[[], None]
    ) -> None:
        self._config, self._state, self._engine, self._on_change = config, state, engine, on_change
        self._loop = asyncio.get_running_loop()
        self._io_threads = io_threads
        self._turn_threads = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="turn")
        self._ids = itertools.count(1)
        self._answers: dict[RequestId, asyncio.Future[Any]] = {}
        #: the ledger's log, one line for each change, the oldest forgotten
        self.ledger_log: deque[LedgerEntry] = deque(maxlen=_LOG_LINES)
        self._began_at = time.monotonic()
        self._patience: dict[RequestId, asyncio.TimerHandle] = {}
        self._turns: dict[TurnId, PendingTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def stop_turns(self) -> None:
        """Ask every running turn to end after the step it is in."""
        for turn in self._turns.values():
            turn.stop.set()

    async def idle(self) -> None:
        """Wait until no work is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        self._turn_threads.shutdown(wait=False)

    def request(self) -> RequestId:
        """The id of a new request."""
        return RequestId(next(self._ids))

    async def ask(self, request: RequestId, event: events.Event, *, until: asyncio.TimerHandle | None = None) -> Any:
        """Dispatch an event and await the action that answers it. `until`: when whoever asks will have had enough."""
        answer = self._answers[request] = self._loop.create_future()
        if until is not None:
            self._patience[request] = until
        try:
            self.dispatch(event)
            return await answer
        finally:
            del self._answers[request]
            self._patience.pop(request, None)

    def answer_expires_in_s(self, request: RequestId) -> float | None:
        """How long whoever asked will go on waiting."""
        until = self._patience.get(request)
        return until.when() - self._loop.time() if until is not None else None

    async def turn(
        self, agent_id: AgentId, request: DecodeRequest, *, emit: Callable[[Chunk], None] | None, wait_s: float | None = None
    ) -> DecodeResult:
        """Queue a turn and await its end; cancelled, it is ended after the step it is in.

        `wait_s` goes before what the configuration says about waiting for a place and for room to grow.
        """
        id, config = TurnId(next(self._ids)), self._config
        turn = self._turns[id] = PendingTurn(
            agent_id=agent_id,
            request=request,
            emit=emit,
            arrived_at=time.monotonic(),
            wait_s=config.turn_wait_s if wait_s is None else wait_s,
            growth_wait_s=config.growth_wait_s if wait_s is None else wait_s,
            result=self._loop.create_future(),
        )
        try:
            self.dispatch(events.TurnRequested(id, agent_id))
            if turn.began_at is None and turn.wait_s is not None:
                self._set_deadline(id, turn, turn.wait_s)
            return await turn.result
        except asyncio.CancelledError:
            self.dispatch(events.TurnAbandoned(id))
            raise
        finally:
            turn.stop.set()
            self._set_deadline(id, turn, None)
            del self._turns[id]

    def _set_deadline(self, id: TurnId, turn: PendingTurn, wait_s: float | None) -> None:
        if turn.deadline is not None:
            turn.deadline.cancel()
        expired = events.TurnExpired(id)
        turn.deadline = None if wait_s is None else self._loop.call_later(wait_s, self.dispatch, expired)

    def expires_in_s(self, id: TurnId) -> float | None:
        """How long a waiting turn will go on waiting."""
        turn = self._turns.get(id)
        return turn.deadline.when() - self._loop.time() if turn is not None and turn.deadline is not None else None

    async def read_device(self) -> None:
        """Ask the device what is free now, off the loop, and tell the policy."""
        reading = await self._in(self._io_threads, self._read_device)
        self.dispatch(reading)

    def _read_device(self) -> events.DeviceRead:
        reading = self._engine.device.read()
        return events.DeviceRead(cap_bytes(reading, self._config.admission_percent), physical_bytes(reading))

    def dispatch(self, *happened: events.Event) -> None:
        """Tell the state machine what happened and carry out its answer."""
        revision = self._state.ledger.revision
        try:
            todo = self._state.handle(*happened, at=time.monotonic())
        except Exception as bug:
            log.exception("the state machine failed on %r", happened)
            self._give_up(_own(bug))
            raise
        for action in todo:
            log.debug("%s -> %s", happened, action)
            self._carry_out(action)
        if self._state.ledger.revision != revision:
            self._log_ledger(happened)
            self._on_change()

    def _give_up(self, bug: ConductorError) -> None:
        """The policy is broken: whoever waits would wait for ever."""
        turns = (turn.result for turn in self._turns.values())
        for future in (*self._answers.values(), *turns):
            if not future.done():
                future.set_exception(bug)

    def _log_ledger(self, happened: tuple[events.Event, ...]) -> None:
        ledger, cause = self._state.ledger, type(happened[0]).__name__
        at_s = time.monotonic() - self._began_at
        entry = LedgerEntry(at_s, cause, ledger.cap_bytes, ledger.allocated_bytes, ledger.overdrawn_bytes)
        self.ledger_log.append(entry)

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
            case actions.CloseContext(agent_id, to):
                self._spawn(self._close(agent_id, to))
            case actions.MoveKv(agent_id):
                log.info("moving the KV of %s to disk", agent_id)
                self._spawn(self._move_kv(agent_id))
            case actions.DropKv(agent_id):
                log.info("dropped the KV of %s: it will be recomputed from its tokens", agent_id)
                self._engine.drop_kv(agent_id)
            case actions.RunTurn() as run:
                self._spawn(self._run(run))
            case actions.StopTurn(turn_id):
                if (turn := self._turns.get(turn_id)) is not None:
                    turn.stop.set()
            case actions.FailTurn(turn_id, error):
                if (turn := self._turns.get(turn_id)) is not None and not turn.result.done():
                    turn.result.set_exception(self._with_text(error))
            case actions.DropTurn(agent_id):
                self._engine.drop_turn(agent_id)
            case actions.Forget(agent_id):
                log.info("forgot %s", agent_id)
                self._engine.forget(agent_id)
            case _:
                assert_never(action)

    def _with_text(self, error: ConductorError) -> ConductorError:
        """A turn that could not go on tells what it had made."""
        if not isinstance(error, WindowRefused):
            return error
        text = self._engine.suspended_text(error.agent_id)
        return WindowRefused(error.agent_id, error.window, error.needed_tokens, error.refusal, text)

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
        await self._gave_back(events.ModelUnloaded(model_id))

    async def _open(self, opening: actions.OpenContext) -> None:
        agent_id = opening.agent_id
        event: events.Event
        try:
            opened = await self._in(self._turn_threads, self._engine.open_context, agent_id, opening.model_id, opening.context)
            event = events.ContextOpened(agent_id, opened.context_bytes, opened.restored_bytes)
        except Exception as error:
            event = events.ContextOpenFailed(agent_id, _own(error))
        self.dispatch(event)

    async def _close(self, agent_id: AgentId, to: KvPlace) -> None:
        closed = Closed(KvPlace.TOKENS, 0)
        try:
            closed = await self._in(self._turn_threads, lambda: self._engine.close_context(agent_id, to=to))
        except Exception as error:  # the context is freed all the same, and the tokens are kept
            log.error("closing the context of %s", agent_id, exc_info=error)
        await self._gave_back(events.ContextClosed(agent_id, closed.place, closed.saved_bytes))

    async def _gave_back(self, event: events.Event) -> None:
        """Memory that the device does not say is free is not: what did not come back lowers the cap before it is given away."""
        try:
            reading = await self._in(self._io_threads, self._read_device)
        except Exception:
            log.exception("reading the device")
            self.dispatch(event)
        else:
            self.dispatch(event, reading)

    async def _move_kv(self, agent_id: AgentId) -> None:
        moved = Moved(KvPlace.TOKENS, 0.0)
        try:
            moved = await self._in(self._io_threads, self._engine.move_kv, agent_id)
        except Exception as error:  # it is recomputed from the tokens
            log.error("moving the KV of %s to disk", agent_id, exc_info=error)
            self._engine.drop_kv(agent_id)
        self.dispatch(events.KvMoved(agent_id, moved.place, moved.elapsed_s))

    async def _run(self, run: actions.RunTurn) -> None:
        turn = self._turns.get(run.turn_id)
        if turn is None:  # its caller went away between the plan and now
            self._engine.drop_turn(run.agent_id)
            self.dispatch(self._finished(run))
            return
        self._set_deadline(run.turn_id, turn, None)
        turn.began_at = turn.began_at or time.monotonic()
        outcome: TurnOutcome | Outgrown | ConductorError
        try:
            outcome = await self._in(self._turn_threads, self._engine.run_turn, self._order(run, turn))
        except Exception as error:
            outcome = _own(error)
        if isinstance(outcome, Outgrown):
            self._outgrew(run, turn, outcome)
            return
        self.dispatch(self._finished(run, outcome if isinstance(outcome, TurnOutcome) else None))
        if turn.result.done():
            return
        if isinstance(outcome, ConductorError):
            turn.result.set_exception(outcome)
        else:
            turn.result.set_result(turn.told(run, outcome, time.monotonic()))

    def _order(self, run: actions.RunTurn, turn: PendingTurn) -> TurnOrder:
        return TurnOrder(
            agent_id=run.agent_id,
            request=turn.request,
            window=self._state.agents[run.agent_id].spec.context.window,
            room=run.room,
            context_shift=self._shifts(run.agent_id, turn.request),
            stopped=turn.stop.is_set,
            emit=turn.emit,
            chunk_interval_s=self._config.stream_interval_ms / 1000,
        )

    def _finished(self, run: actions.RunTurn, outcome: TurnOutcome | None = None) -> events.TurnFinished:
        return events.TurnFinished(
            run.turn_id,
            self._engine.tokens(run.agent_id),
            self._engine.state_bytes(run.agent_id),
            outcome.prefill_s_per_token if outcome else None,
        )

    def _outgrew(self, run: actions.RunTurn, turn: PendingTurn, outgrown: Outgrown) -> None:
        tokens = self._engine.tokens(run.agent_id)
        event = events.TurnOutgrew(
            run.turn_id, tokens, self._engine.state_bytes(run.agent_id), outgrown.required_tokens, outgrown.desired_tokens
        )
        log.info("%s outgrew its window of %d tokens", run.agent_id, run.room)
        self._set_deadline(run.turn_id, turn, turn.growth_wait_s)
        self.dispatch(event)

    def _shifts(self, agent_id: AgentId, request: DecodeRequest) -> bool:
        if request.context_shift is not None:
            return request.context_shift
        return self._config.context_shift(self._state.agents[agent_id].spec.model.key)


def _own(error: Exception) -> ConductorError:
    """The error itself if it is one of ours; anything else is our bug, told as such."""
    if isinstance(error, ConductorError):
        return error
    log.error("unexpected %r", error, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
