"""An engine and the least policy there can be: an agent's context begins small, and grows rung by rung as turns ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from conductor.backend.catalog import Catalog
from conductor.backend.engine import Closed, Engine, Opened
from conductor.backend.turn import Outgrown, TurnOrder, TurnOutcome
from conductor.config import parse_config
from conductor.core.estimate import ModelPlan
from conductor.types import AgentId, Chunk, ContextSpec, DecodeRequest, DeviceKind, HostMemoryStatus, KvPlace

Emit = Callable[[Chunk], None]


class Talker:
    """An agent as the policy sees it: a room that doubles until the window is reached."""

    def __init__(self, engine: Engine, plan: ModelPlan, id: str, spec: ContextSpec, *, room: int) -> None:
        self.engine, self.id, self.first_room, self.room = engine, AgentId(id), room, room
        self.growths = 0
        self._plan, self._spec = plan, spec

    @property
    def tokens(self) -> int:
        return self.engine.tokens(self.id)

    @property
    def cached(self) -> int:
        return self.engine._conversations[self.id].cached

    def opens(self, **options: Any) -> Opened:
        return self.engine.open_context(self.id, self._plan.id, replace(self._spec, window=self.room, **options))

    def closes(self, to: KvPlace = KvPlace.HOST) -> Closed:
        return self.engine.close_context(self.id, to=to)

    def request(self, prompt: str | None = None, **options: Any) -> DecodeRequest:
        return DecodeRequest(prompt=prompt, **options)

    def step(
        self,
        request: DecodeRequest,
        *,
        stopped: Callable[[], bool] = lambda: False,
        emit: Emit | None = None,
        chunk_interval_s: float = 0.0,
    ) -> TurnOutcome | Outgrown:
        """Begin or go on, as far as the room goes."""
        return self.engine.run_turn(
            TurnOrder(
                self.id,
                request,
                window=self._spec.window,
                room=self.room,
                context_shift=bool(request.context_shift),
                stopped=stopped,
                emit=emit,
                chunk_interval_s=chunk_interval_s,
            )
        )

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
        return result

    def leaves(self) -> None:
        if self.id in self.engine._live:
            self.closes(KvPlace.TOKENS)
        self.engine.forget(self.id)


class Stage:
    """One engine with one model."""

    def __init__(self, engine: Engine, plan: ModelPlan) -> None:
        self.engine, self._plan = engine, plan
        self._talkers: list[Talker] = []

    def talker(self, id: str, *, window: int, room: int | None = None, **spec: Any) -> Talker:
        """An agent with a live context; without `room` the context has the whole window from the start."""
        talker = Talker(self.engine, self._plan, id, ContextSpec(window=window, **spec), room=room or window)
        talker.opens()
        self._talkers.append(talker)
        return talker

    @property
    def memory(self) -> HostMemoryStatus:
        return self.engine.host_memory()

    def wind_up(self) -> None:
        for talker in self._talkers:
            talker.leaves()
        self.engine._saved._store.check()
        assert (self.memory.used_bytes, self.memory.disk_used_bytes) == (0, 0)
        assert not self.engine._standing
        self.engine.unload(self._plan.id)
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
