"""The plain class behind the actor: calls become events, actions become work, results become events again.

One writer: everything here runs on one asyncio loop; what blocks runs in worker threads and returns as an event.
Knows nothing of Ray: `actors.conductor_actor` wraps it, tells it when an owner dies and mirrors `bookings()`.

    call → event → core.State.handle → actions → backend.Engine (threads) → event → …
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, assert_never

from conductor import __version__, requests
from conductor.backend.catalog import Catalog
from conductor.backend.engine import Engine
from conductor.backend.turn import TurnOrder, TurnOutcome
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.estimate import context_bytes
from conductor.core.events import AgentSpec, ModelPlan, RequestId, TurnId
from conductor.core.ledger import OverCap
from conductor.core.sessions import Phase, Stage
from conductor.core.state import State
from conductor.errors import ConductorError, ConfigError, InternalError
from conductor.types import (
    Admission,
    AgentId,
    AgentStatus,
    Chunk,
    DecodeRequest,
    DecodeResult,
    DeviceStatus,
    FinishReason,
    LedgerStatus,
    MirrorState,
    MirrorStatus,
    ModelStatus,
    OwnerId,
    ReservationId,
    Status,
)
from conductor.units import MIB, format_bytes

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


class GpuConductor:
    """Admission, residency and turns of many agents on one device. Create it, then `await start()`."""

    def __init__(self, config: Config, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self._on_change = on_change
        self._started_at = time.monotonic()
        self._ids = itertools.count(1)
        self._answers: dict[RequestId, asyncio.Future[Any]] = {}
        self._turns: dict[TurnId, _PendingTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take the device. Idempotent; every public call awaits it. Raises ConfigError."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        # A busy thread otherwise holds the interpreter 5 ms at a time, which a decode of 1 ms would wait for.
        sys.setswitchinterval(1e-4)
        self._loop = asyncio.get_running_loop()
        self._turn_threads = ThreadPoolExecutor(self.config.live_contexts, thread_name_prefix="turn")
        self._io_threads = ThreadPoolExecutor(4, thread_name_prefix="load")
        self._engine = await self._loop.run_in_executor(self._io_threads, Engine, self.config)
        self._catalog = Catalog(self.config)
        self._state = State(
            cap_bytes=self._cap(),
            live_contexts=self.config.live_contexts,
            waitlist_limit=self.config.waitlist_limit,
            id_prefix=f"{secrets.token_hex(2)}-",
        )
        self._book_overhead()

    def _cap(self) -> int:
        """What may be booked, in whole MiB, so that Ray's accounting can say the same."""
        device = self._engine.device
        allowed = device.read().total_bytes * self.config.admission_percent // 100 - device.others_bytes
        return max(0, allowed) // MIB * MIB

    def _book_overhead(self) -> None:
        overhead = self._engine.overhead_bytes
        try:
            self._state.book_overhead("process", overhead)
        except OverCap as excess:
            problem = f"the process itself takes {format_bytes(overhead)} on the device, and {format_bytes(excess.free_bytes)} are free"
            raise ConfigError(self.config.source, "device", problem) from None

    async def close(self) -> None:
        """Stop turns, unload everything, end the threads."""
        await self.start()
        for turn in self._turns.values():
            turn.stop.set()
        agents = [agent.id for agent in self._state.agents.values() if agent.stage is Stage.ADMITTED]
        await asyncio.gather(*(self.unregister(agent_id) for agent_id in agents), return_exceptions=True)
        self._turn_threads.shutdown(wait=False)
        self._io_threads.shutdown(wait=False)

    # --- public calls -----------------------------------------------------------------------------------------------

    async def register(
        self,
        agent_id: str,
        model: str,
        *,
        window: int | None = None,
        priority: int = 0,
        wait_s: float = 0,
        owner: OwnerId | None = None,
    ) -> Admission:
        """Admit an agent, or refuse it with nothing changed. Raises InvalidRequest, ModelError, AdmissionRefused."""
        await self.start()
        arrived_at = time.monotonic()
        id, patience = requests.agent_id(agent_id), requests.wait_s(wait_s)
        asked = None if window is None else requests.window(window)
        rank = requests.priority(priority)
        plan = await self._in(self._io_threads, self._catalog.plan, requests.text("model", model), self._engine.device.kind)
        context = self.config.context_spec(plan.key, asked or self.config.window(plan.key, plan.geometry.trained_window))
        spec = AgentSpec(id, plan, context, context_bytes(plan.geometry, context), rank, owner)
        request = self._request()
        event = events.RegisterRequested(request, spec, may_wait=patience > 0)
        deadline = self._loop.call_later(patience, self._dispatch, events.RegisterAbandoned(request, timed_out=True))
        try:
            admitted: actions.Admit = await self._ask(request, event)
        except asyncio.CancelledError:
            self._dispatch(events.RegisterAbandoned(request))  # a grant that nobody receives is given back
            raise
        finally:
            deadline.cancel()
        return Admission(
            agent_id=id,
            model=plan.key,
            window=context.window,
            priority=rank,
            weights_bytes=admitted.weights_bytes,
            context_bytes=admitted.context_bytes,
            charged_bytes=admitted.charged_bytes,
            model_loaded=admitted.model_loaded,
            waited_s=time.monotonic() - arrived_at,
            warnings=_warnings(plan, context.window),
        )

    async def unregister(self, agent_id: str) -> None:
        """Let an agent go; when this returns, its bytes are back, and its model's if it was the last. Raises UnknownAgent."""
        await self.start()
        request = self._request()
        await self._ask(request, events.UnregisterRequested(request, requests.agent_id(agent_id)))

    async def decode(
        self,
        agent_id: str,
        prompt: str | None = None,
        *,
        messages: Any = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        stop: Any = (),
        reset: bool = False,
        context_shift: bool | None = None,
    ) -> DecodeResult:
        """One turn. Raises InvalidRequest, UnknownAgent, WindowFull, ModelError, DecodeFailed, TurnCancelled."""
        request = requests.decode_request(
            prompt, messages=messages, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, seed=seed, stop=stop, reset=reset, context_shift=context_shift,
        )  # fmt: skip
        return await self._turn(requests.agent_id(agent_id), request, emit=None)

    async def stream(self, agent_id: str, prompt: str | None = None, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        """`decode` with its text as it is made: chunks, and the result last. Leaving the iteration ends the turn."""
        defaults: dict[str, Any] = {
            name: value for name, value in (GpuConductor.decode.__kwdefaults__ or {}).items() if name not in options
        }
        request = requests.decode_request(prompt, **defaults, **options)
        await self.start()
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue()

        def emit(chunk: Chunk) -> None:
            self._loop.call_soon_threadsafe(queue.put_nowait, chunk)

        turn = asyncio.create_task(self._turn(requests.agent_id(agent_id), request, emit=emit))
        turn.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
            yield turn.result()
        finally:
            turn.cancel()

    async def reserve(self, holder: str, bytes: int, *, owner: OwnerId | None = None) -> ReservationId:
        """Book device memory for anything that is no agent. Raises InvalidRequest, AdmissionRefused."""
        await self.start()
        request = self._request()
        event = events.ReserveRequested(request, requests.holder(holder), requests.bytes_(bytes), owner)
        id: ReservationId = await self._ask(request, event)
        return id

    async def release(self, reservation_id: str) -> int:
        """Give a reservation back; returns its bytes. Raises UnknownReservation."""
        await self.start()
        request = self._request()
        id = ReservationId(requests.text("reservation_id", reservation_id))
        released: int = await self._ask(request, events.ReleaseRequested(request, id))
        return released

    def owner_died(self, owner: OwnerId) -> None:
        """Take back everything that the dead process held."""
        self._dispatch(events.OwnerDied(owner))

    # --- what it looks like -----------------------------------------------------------------------------------------

    def bookings(self) -> dict[ReservationId, tuple[str, int]]:
        """Label and bytes of everything booked, parts counted with the whole they were taken from."""
        ledger = self._state.ledger
        return {id: (_label(ledger.get(id).kind.value, ledger.get(id).holder), size) for id, size in ledger.leases().items() if size}

    @property
    def cap_bytes(self) -> int:
        return self._state.ledger.cap_bytes

    async def status(self, mirror: MirrorStatus | None = None) -> Status:
        await self.start()
        state, ledger, device = self._state, self._state.ledger, self._engine.device
        reading = device.read()
        unmirrored = MirrorStatus(MirrorState.UNMIRRORED, "", 0, 0, ledger.allocated_bytes / MIB, "no Ray here")
        return Status(
            version=__version__,
            device=DeviceStatus(
                device.name, device.kind, reading.total_bytes, reading.free_bytes, device.others_bytes, device.chosen
            ),
            ledger=LedgerStatus(ledger.cap_bytes, ledger.allocated_bytes, ledger.snapshot()),
            live_contexts=state.live_contexts,
            models=tuple(
                ModelStatus(
                    model.plan.key,
                    model.plan.path,
                    model.state,
                    sum(agent.model_id == id for agent in state.agents.values()),
                    ledger.size(model.reservation),
                )
                for id, model in state.models.items()
            ),
            agents=tuple(await self.list()),
            waiting=len(state.waitlist),
            host_memory=self._engine.host_memory(),
            mirror=mirror or unmirrored,
            llama_cpp=self._engine.version,
            uptime_s=time.monotonic() - self._started_at,
        )

    async def list(self) -> list[AgentStatus]:
        """The agents, in the order of their admission."""
        await self.start()
        return [
            AgentStatus(
                id=agent.id,
                model=agent.spec.model.key,
                window=agent.spec.context.window,
                tokens=agent.tokens,
                kv=agent.place,
                priority=agent.spec.priority,
                context_bytes=self._state.books.price(agent.spec),
                host_bytes=agent.host_bytes,
                busy=agent.phase is Phase.BUSY,
                turns=agent.turns,
            )
            for agent in self._state.agents.values()
        ]

    def check(self) -> None:
        """Raise InternalError unless every invariant of the policy holds."""
        self._state.check()

    # --- events in, actions out -------------------------------------------------------------------------------------

    def _request(self) -> RequestId:
        return RequestId(next(self._ids))

    async def _ask(self, request: RequestId, event: events.Event) -> Any:
        """Dispatch an event and await the action that answers it."""
        answer = self._answers[request] = self._loop.create_future()
        try:
            self._dispatch(event)
            return await answer
        finally:
            del self._answers[request]

    async def _turn(self, agent_id: AgentId, request: DecodeRequest, *, emit: Callable[[Chunk], None] | None) -> DecodeResult:
        await self.start()
        id = TurnId(next(self._ids))
        turn = self._turns[id] = _PendingTurn(agent_id, request, emit, time.monotonic(), self._loop.create_future())
        try:
            self._dispatch(events.TurnRequested(id, agent_id))
            return await turn.result
        except asyncio.CancelledError:
            self._dispatch(events.TurnAbandoned(id))
            raise
        finally:
            turn.stop.set()
            del self._turns[id]

    def _dispatch(self, event: events.Event) -> None:
        try:
            todo = self._state.handle(event)
        except Exception:
            log.exception("the state machine failed on %r", event)
            raise
        for action in todo:
            log.debug("%s -> %s", event, action)
            self._carry_out(action)
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
        task.add_done_callback(self._tasks.discard)

    async def _in(self, threads: Executor, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(threads, function, *arguments)

    # --- work -------------------------------------------------------------------------------------------------------

    async def _load(self, plan: ModelPlan) -> None:
        event: events.Event
        try:
            event = events.ModelLoaded(plan.id, await self._in(self._io_threads, self._engine.load, plan))
        except Exception as error:
            event = events.ModelLoadFailed(plan.id, _own(error))
        self._dispatch(event)

    async def _unload(self, model_id: events.ModelId) -> None:
        await self._in(self._io_threads, self._engine.unload, model_id)
        self._dispatch(events.ModelUnloaded(model_id))

    async def _open(self, opening: actions.OpenContext) -> None:
        agent_id = opening.agent_id
        event: events.Event
        try:
            opened = await self._in(self._turn_threads, self._engine.open_context, agent_id, opening.model_id, opening.context)
            estimated = self._state.books.price(self._state.agents[agent_id].spec)
            taken = estimated if opened.context_bytes is None else opened.context_bytes
            event = events.ContextOpened(agent_id, taken, opened.restored_bytes, opened.kv_lost)
        except Exception as error:
            event = events.ContextOpenFailed(agent_id, _own(error), self._state.agents[agent_id].place)
        self._dispatch(event)

    async def _close(self, agent_id: AgentId, save: bool) -> None:
        closed = await self._in(self._turn_threads, lambda: self._engine.close_context(agent_id, save=save))
        self._dispatch(events.ContextClosed(agent_id, closed.place, closed.saved_bytes))

    async def _run(self, run: actions.RunTurn) -> None:
        turn = self._turns.get(run.turn_id)
        if turn is None:  # its caller went away between the plan and now
            self._dispatch(events.TurnFinished(run.turn_id, self._engine.tokens(run.agent_id)))
            return
        began_at = time.monotonic()
        order = TurnOrder(
            agent_id=run.agent_id,
            request=turn.request,
            window=self._state.agents[run.agent_id].spec.context.window,
            context_shift=self._shifts(run.agent_id, turn.request),
            stopped=turn.stop.is_set,
            emit=turn.emit,
            chunk_interval_s=self.config.stream_interval_ms / 1000,
        )
        outcome: TurnOutcome | ConductorError
        try:
            outcome = await self._in(self._turn_threads, self._engine.run_turn, order)
        except Exception as error:
            outcome = _own(error)
        ended_at = time.monotonic()
        self._dispatch(events.TurnFinished(run.turn_id, self._engine.tokens(run.agent_id)))
        if turn.result.done():
            return
        if isinstance(outcome, ConductorError):
            turn.result.set_exception(outcome)
        else:
            turn.result.set_result(_result(run, turn, outcome, began_at, ended_at))

    def _shifts(self, agent_id: AgentId, request: DecodeRequest) -> bool:
        if request.context_shift is not None:
            return request.context_shift
        return self.config.context_shift(self._state.agents[agent_id].spec.model.key)


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


def _label(kind: str, holder: str) -> str:
    return "turns" if kind == "headroom" else f"{kind}:{holder}"


def _own(error: Exception) -> ConductorError:
    """The error itself if it is one of ours; anything else is our bug, told as such."""
    if isinstance(error, ConductorError):
        return error
    log.error("unexpected %r", error, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


def _warnings(plan: ModelPlan, window: int) -> tuple[str, ...]:
    trained = plan.geometry.trained_window
    if window <= trained:
        return ()
    return (f"a window of {window} tokens is larger than the {trained} that {plan.key} was trained with; quality may suffer beyond",)
