"""An engine and the least policy there can be: an agent's pool begins small, and grows rung by rung as turns ask for it.

Everything waits for its end here, so that a test reads as a story; who wants turns side by side uses `begins`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conductor.backend.catalog import Catalog
from conductor.backend.engine import Closed, Engine
from conductor.backend.pool import Pool
from conductor.backend.turn import Outgrown, Paused, TurnEnd, TurnOrder, TurnOutcome
from conductor.config import parse_config
from conductor.core.estimate import ModelPlan
from conductor.types import (
    AgentId,
    Chunk,
    ContextSpec,
    DecodeRequest,
    DeviceKind,
    FinishReason,
    HostMemoryStatus,
    KvPlace,
    PoolId,
)
from tests.support.eventually import eventually

Emit = Callable[[Chunk], None]
#: a deadlock is a failure, not a hanging test
WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Opened:
    context_bytes: int | None
    restored_bytes: int


class Talker:
    """An agent as the policy sees it: a room that doubles until the window is reached.

    In a pool of its own, unless it is given a seat in one with others: then its room stays what it is.
    """

    def __init__(
        self, engine: Engine, plan: ModelPlan, id: str, spec: ContextSpec, *, room: int, pool: PoolId | None = None
    ) -> None:
        self.engine, self.id, self.first_room, self.room = engine, AgentId(id), room, room
        self.growths = 0
        self.own_pool = pool is None
        self.pool = pool or PoolId(f"of {id}")
        self._plan, self._spec = plan, spec

    @property
    def tokens(self) -> int:
        return self.engine.tokens(self.id)

    @property
    def conversation(self) -> Any:
        return self.engine._seats.conversations[self.id]

    @property
    def cached(self) -> int:
        return int(self.conversation.cached)

    @property
    def slot(self) -> int:
        return self.engine._seats.of(self.id).seat.sequence.slot

    @property
    def seated(self) -> bool:
        return self.id in self.engine._seats._taken

    def opens(self, **options: Any) -> Opened:
        took = None
        if self.own_pool:
            spec = replace(self._spec, window=self.room, **options)
            took = self.engine.open_pool(self.pool, self._plan.id, spec, for_agent=self.id)
        try:
            return Opened(took, self.engine.take_seat(self.id, self.pool).result(WITHIN_S))
        except BaseException:
            if self.own_pool:
                self.engine.close_pool(self.pool)
            raise

    def closes(self, to: KvPlace = KvPlace.HOST) -> Closed:
        try:
            return self.engine.leave_seat(self.id, to=to).result(WITHIN_S)
        finally:
            if self.own_pool:
                self.engine.close_pool(self.pool)

    def request(self, prompt: str | None = None, **options: Any) -> DecodeRequest:
        return DecodeRequest(prompt=prompt, **options)

    def begins(
        self, request: DecodeRequest, *, emit: Emit | None = None, chunk_interval_s: float = 0.0, window: int | None = None
    ) -> Future[TurnEnd]:
        """Begin or go on, and let others do so too. `window`: as if so many had been admitted."""
        order = TurnOrder(
            self.id,
            request,
            window=window or self._spec.window,
            room=self.room,
            context_shift=bool(request.context_shift),
            emit=emit,
            chunk_interval_s=chunk_interval_s,
        )
        return self.engine.run_turn(order)

    def step(self, request: DecodeRequest, *, emit: Emit | None = None, chunk_interval_s: float = 0.0) -> TurnEnd:
        """Begin or go on, as far as the room goes."""
        return self.begins(request, emit=emit, chunk_interval_s=chunk_interval_s).result(WITHIN_S)

    def outgrows(self, prompt: str | None = None, **options: Any) -> Outgrown:
        """A turn that stands still now."""
        result = self.step(self.request(prompt, **options))
        assert isinstance(result, Outgrown)
        return result

    def grows(self, tokens: int, *, to: KvPlace = KvPlace.HOST) -> None:
        self.closes(to)
        while self.room < tokens:
            self.room = min(2 * self.room, self._spec.window)
        self.growths += 1
        self.opens()

    def says(
        self, prompt: str | None = None, *, to: KvPlace = KvPlace.HOST, emit: Emit | None = None, **options: Any
    ) -> TurnOutcome:
        """A whole turn, with as many growths as it takes, each to the smallest room that will do."""
        return self.finishes(self.request(prompt, **options), to=to, emit=emit)

    def finishes(self, request: DecodeRequest, *, to: KvPlace = KvPlace.HOST, emit: Emit | None = None) -> TurnOutcome:
        while isinstance(result := self.step(request, emit=emit), Outgrown):
            assert self.room < result.required_tokens <= result.desired_tokens <= self._spec.window
            self.grows(result.required_tokens, to=to)
        assert isinstance(result, TurnOutcome)
        return result

    def begins_and(self, ask: Callable[[], object], request: DecodeRequest, **options: Any) -> Future[TurnEnd]:
        """Something is asked of the turn before its first step."""
        with self.busy():
            turn = self.begins(request, **options)
            ask()
        return turn

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While its pool does something else; turns that are begun meanwhile join it together."""
        gate = threading.Event()
        call = self._pool.call(lambda: gate.wait(WITHIN_S))
        try:
            yield
            eventually(self._all_prepared, WITHIN_S)
        finally:
            gate.set()
        assert call.result(WITHIN_S)

    def _all_prepared(self) -> bool:
        here = [running for running in list(self.engine._turns._running.values()) if running.pool is self._pool]
        return len(here) == len(self._pool._joining) + len(self._pool._done)

    def in_step(self, number: int, act: Callable[[], object]) -> None:
        """Have something happen while its pool takes its so-and-so-many'th step from now."""
        stepper, steps = self._pool._stepper, itertools.count(1)
        inner = stepper.step

        def step(*arguments: Any, **options: Any) -> Any:
            if next(steps) == number:
                act()
            return inner(*arguments, **options)

        stepper.step = step  # type: ignore[method-assign]

    @property
    def _pool(self) -> Pool:
        return self.engine._pools[self.pool].pool

    def stops(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self.engine.stop_turn(self.id, reason)

    def pauses(self) -> None:
        self.engine.pause_turn(self.id)

    def leaves(self) -> None:
        if self.seated:
            self.closes(KvPlace.TOKENS)
        self.engine.forget(self.id)


class Stage:
    """One engine with one model."""

    def __init__(self, engine: Engine, plan: ModelPlan) -> None:
        self.engine, self.plan = engine, plan
        self._talkers: list[Talker] = []
        self._pools: dict[PoolId, ContextSpec] = {}

    def talker(self, id: str, *, window: int, room: int | None = None, **spec: Any) -> Talker:
        """An agent with a live context; without `room` the context has the whole window from the start."""
        return self._enters(Talker(self.engine, self.plan, id, ContextSpec(window=window, **spec), room=room or window))

    def pool(self, slots: int, *, window: int, id: str = "shared", **spec: Any) -> PoolId:
        """A context that agents share."""
        pool, of = PoolId(id), ContextSpec(window=window, slots=slots, **spec)
        self.engine.open_pool(pool, self.plan.id, of, for_agent=AgentId("whoever"))
        self._pools[pool] = of
        return pool

    def sits(self, id: str, pool: PoolId) -> Talker:
        """An agent with a seat in it."""
        spec = self._pools[pool]
        return self._enters(Talker(self.engine, self.plan, id, spec, room=spec.window, pool=pool))

    def _enters(self, talker: Talker) -> Talker:
        talker.opens()
        self._talkers.append(talker)
        return talker

    @property
    def memory(self) -> HostMemoryStatus:
        return self.engine.host_memory()

    def wind_up(self) -> None:
        for talker in self._talkers:
            talker.leaves()
        for pool in self._pools:
            self.engine.close_pool(pool)
        self.engine._saved._store.check()
        assert (self.memory.used_bytes, self.memory.disk_used_bytes) == (0, 0)
        assert self.engine.used_bytes() == self.engine._models.weights_bytes
        assert not self.engine._turns.standing
        assert not self.engine.progress()
        self.engine.unload(self.plan.id)
        self.engine.close()


@contextmanager
def stage(path: Path, directory: Path, **options: Any) -> Iterator[Stage]:
    """At the end everybody leaves, and nothing may be left."""
    document = {
        "device": {"kind": "host"},
        "host_budget": "16MiB",
        "threads": 1,
        "model_dirs": [str(path.parent)],
        **options,
    }
    config = parse_config(document, source="test", directory=directory)
    engine = Engine(config)
    plan = Catalog(config).plan(str(path), DeviceKind.HOST)
    engine.load(plan)
    opened = Stage(engine, plan)
    yield opened
    opened.wind_up()


def all_of(turns: list[Future[TurnEnd]]) -> list[TurnOutcome]:
    """What they came to, once all have ended."""
    ends = [turn.result(WITHIN_S) for turn in turns]
    return [end for end in ends if isinstance(end, TurnOutcome)]


__all__ = ["WITHIN_S", "Emit", "Opened", "Outgrown", "Paused", "Stage", "Talker", "TurnOutcome", "all_of", "stage"]
