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
from conductor.backend.llama import Unmovable
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.events import RequestId
from conductor.core.state import State
from conductor.errors import ConductorError
from conductor.history import History
from conductor.turn_desk import TurnDesk, own
from conductor.types import AgentId, KvPlace, LedgerEntry, PoolId

log = logging.getLogger("conductor")

#: Threads are made when they are needed: so many pools may be made or freed at once.
_MOST_AT_ONCE = 256
#: While turns wait, the policy hears at most and at least this often how those that run get on: who had its minimum makes way.
_PROGRESS_S = (0.01, 0.1)
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
        self._pool_threads = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="pool")
        #: whoever waits for a pool's bytes waits for a reading, and must not wait for models to be loaded first
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._ids = itertools.count(1)
        self._answers: dict[RequestId, asyncio.Future[Any]] = {}
        #: the ledger's log, one line for each change, the oldest forgotten
        self.ledger_log: deque[LedgerEntry] = deque(maxlen=_LOG_LINES)
        self._began_at = time.monotonic()
        self.history = History(state, clock=time.monotonic)
        self._patience: dict[RequestId, asyncio.TimerHandle] = {}
        self.turns = TurnDesk(config, state, engine, ids=self._ids, dispatch=self.dispatch)
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_progress: asyncio.TimerHandle | None = None

    async def idle(self) -> None:
        """Wait until no work is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        if self._next_progress is not None:
            self._next_progress.cancel()
        self._pool_threads.shutdown(wait=False)
        self._device_thread.shutdown(wait=False)

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

    async def read_device(self) -> None:
        """Ask the device what is free now, off the loop, and tell the policy."""
        reading = await self._in(self._device_thread, self._read_device)
        self.dispatch(reading)

    def _read_device(self) -> events.DeviceRead:
        reading = self._engine.device.read()
        return events.DeviceRead(cap_bytes(reading, self._config.admission_percent), physical_bytes(reading))

    def dispatch(self, *happened: events.Event) -> None:
        """Tell the state machine what happened and carry out its answer."""
        revision = self._state.ledger.revision
        try:
            self.history.heard(happened)
            todo = self._state.handle(*happened, at=time.monotonic())
            self.history.decided(todo)
            for action in todo:
                log.debug("%s -> %s", happened, action)
                self._carry_out(action)
        except Exception as bug:
            log.exception("the state machine failed on %r, or one of its actions", happened)
            self._give_up(own(bug))
            raise
        if self._state.ledger.revision != revision:
            self._engine.external_bytes = self._state.books.external.bytes
            self._log_ledger(happened)
            self._on_change()
        if self._next_progress is None and self._state.rotation.waiting():
            least, most = _PROGRESS_S
            period_s = min(most, max(least, self._config.min_turn_ms / 4000))
            self._next_progress = self._loop.call_later(period_s, self._progress)

    def _progress(self) -> None:
        self._next_progress = None
        if self._state.rotation.waiting():
            self.dispatch(events.TurnsProgressed(self._engine.progress()))

    def _give_up(self, bug: ConductorError) -> None:
        """The policy is broken: whoever waits would wait for ever."""
        self.turns.give_up(bug)
        for future in self._answers.values():
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
                self._answer(admit.request_id, admit)
            case actions.Refuse(request, error) | actions.FailRequest(request, error):
                self._fail(request, error)
            case actions.AnswerUnregister(request):
                self._answer(request, None)
            case actions.AnswerCancel(request, turns):
                self._answer(request, turns)
            case actions.AnswerReserve(request, reservation):
                self._answer(request, reservation)
            case actions.AnswerRelease(request, released):
                self._answer(request, released)
            case actions.LoadModel() as load:
                self._spawn(self._load(load))
            case actions.UnloadModel() as unload:
                self._spawn(self._unload(unload))
            case actions.OpenPool() as opening:
                self._spawn(self._open_pool(opening))
            case actions.ClosePool(pool_id):
                self._spawn(self._close_pool(pool_id))
            case actions.TakeSeat(agent_id, pool_id):
                self._spawn(self._take_seat(agent_id, pool_id))
            case actions.LeaveSeat(agent_id, to):
                self._spawn(self._leave_seat(agent_id, to))
            case actions.MoveKv(agent_id):
                self._spawn(self._move_kv(agent_id))
            case actions.CopyKv() as copy:
                self._spawn(self._copy_kv(copy))
            case actions.AnswerFork(request, tokens):
                self._answer(request, tokens)
            case actions.DropKv(agent_id):
                self._engine.drop_kv(agent_id)
            case actions.RunTurn() as run:
                self._spawn(self.turns.run(run))
            case actions.PauseTurn(_, agent_id):
                self._engine.pause_turn(agent_id)
            case actions.StopTurn(_, agent_id, reason):
                self._engine.stop_turn(agent_id, reason)
            case actions.EndTurn() as end:
                self.turns.end(end)
            case actions.FailTurn(turn_id, error):
                self.turns.fail(turn_id, error)
            case actions.DropTurn(agent_id):
                self._engine.drop_turn(agent_id)
            case actions.Forget(agent_id):
                self._engine.forget(agent_id)
            case _:
                assert_never(action)

    def _answer(self, request: RequestId, value: object) -> None:
        if (future := self._answers.get(request)) is not None and not future.done():
            future.set_result(value)

    def _fail(self, request: RequestId, error: ConductorError) -> None:
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

    async def _load(self, load: actions.LoadModel) -> None:
        event: events.Event
        id = load.model.id
        try:
            weights = await self._in(self._io_threads, self._engine.load, load.model, load.placement)
            event = events.ModelLoaded(id, weights, at_home=self._engine.is_at_home(id))
        except Exception as error:
            unmovable = isinstance(error.__cause__, Unmovable)
            event = events.ModelLoadFailed(id, own(error), at_home=self._engine.is_at_home(id), unmovable=unmovable)
        self.dispatch(event)

    async def _unload(self, unload: actions.UnloadModel) -> None:
        step_s: float | None = None
        try:
            # Not behind loads: whoever waits for these bytes waits for milliseconds.
            step_s = await self._in(self._pool_threads, self._engine.unload, unload.model_id, unload.keep_home)
        except Exception as error:  # whoever waits for the bytes must not wait for ever
            log.error("unloading a model", exc_info=error)
        await self._gave_back(events.ModelUnloaded(unload.model_id, step_s))

    async def _open_pool(self, opening: actions.OpenPool) -> None:
        event: events.Event
        try:
            event = events.PoolOpened(opening.pool_id, await self._in(self._pool_threads, self._make_pool, opening))
        except Exception as error:
            event = events.PoolOpenFailed(opening.pool_id, own(error))
        self.dispatch(event)

    def _make_pool(self, opening: actions.OpenPool) -> int | None:
        return self._engine.open_pool(opening.pool_id, opening.model_id, opening.context, for_agent=opening.agent_id)

    async def _close_pool(self, pool_id: PoolId) -> None:
        try:
            await self._in(self._pool_threads, self._engine.close_pool, pool_id)
        except Exception as error:  # whoever waits for the bytes must not wait for ever
            log.error("closing %s", pool_id, exc_info=error)
        await self._gave_back(events.PoolClosed(pool_id))

    async def _take_seat(self, agent_id: AgentId, pool_id: PoolId) -> None:
        event: events.Event
        try:
            event = events.SeatTaken(agent_id, await asyncio.wrap_future(self._engine.take_seat(agent_id, pool_id)))
        except Exception as error:
            event = events.SeatNotTaken(agent_id, own(error))
        self.dispatch(event)

    async def _leave_seat(self, agent_id: AgentId, to: KvPlace) -> None:
        left = Closed(KvPlace.TOKENS, 0)
        try:
            left = await asyncio.wrap_future(self._engine.leave_seat(agent_id, to=to))
        except Exception as error:  # the seat is free all the same, and the tokens are kept
            log.error("saving the KV of %s", agent_id, exc_info=error)
        self.dispatch(events.SeatLeft(agent_id, left.place, left.saved_bytes))

    async def _copy_kv(self, copy: actions.CopyKv) -> None:
        copied = Closed(KvPlace.TOKENS, 0)
        try:
            copied = await asyncio.wrap_future(self._engine.copy_kv(copy.source, copy.new, to=copy.to))
        except Exception as error:  # the clone is computed again from its tokens
            log.error("copying the KV of %s for %s", copy.source, copy.new, exc_info=error)
        self.dispatch(events.KvCopied(copy.turn_id, self._engine.tokens(copy.new), copied.place, copied.saved_bytes))

    async def _gave_back(self, event: events.Event) -> None:
        """Memory that the device does not say is free is not: what did not come back lowers the cap before it is given away."""
        try:
            reading = await self._in(self._device_thread, self._read_device)
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
