"""Stories about the policy in plain English: a `Stage` owns a State, tells it what happened and plays the engine's part.

    stage = Stage(cap=1000)
    call = stage.registers("a", ALPHA, context=50)   # books, and asks the engine to load ALPHA
    stage.loaded(ALPHA)                              # the engine answers
    assert call.admission.charged_bytes == 150

A context's window is its bytes, and so is each rung's, so that a story's numbers add up in the head. Time is `stage.at`. After
each event `scrutiny` looks at everything; `wind_up` sends everybody home and wants every byte back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from conductor.core import actions, events
from conductor.core.estimate import Geometry, ModelPlan
from conductor.core.events import AgentSpec, RequestId, Rung, TurnId
from conductor.core.sessions import Agent
from conductor.core.state import Rules, State
from conductor.core.streaming import Blocks
from conductor.errors import (
    ConductorError,
    NotRunning,
    TurnCancelled,
    TurnQueueFull,
    TurnTimedOut,
    UnknownAgent,
)
from conductor.types import (
    AgentId,
    ContextSpec,
    DeviceKind,
    ModelId,
    ModelKey,
    OwnerId,
    ReservationId,
    ServiceClass,
)
from tests.support.backstage import Backstage
from tests.support.calls import Call, TurnCall
from tests.support.paper_engine import PaperEngine
from tests.support.scrutiny import Scrutiny

GEOMETRY = Geometry(
    architecture="llama", n_layer=2, n_embd=64, n_head=4, n_kv_heads=(2, 2), head_dim_k=16, head_dim_v=16, n_ff=128,
    n_vocab=300, trained_window=4096, sliding_window=0, sliding_layers=(False, False), recurrent_bytes_per_sequence=0,
    weights_bytes_host=100, weights_bytes_offloaded=100,
)  # fmt: skip


def model(name: str, *, weights: int = 100, border: int = 0, layers: int = 0) -> ModelPlan:
    """Windows beyond the `border` turn positions otherwise, if there is one. With `layers` its weights may move."""
    geometry = dataclasses.replace(GEOMETRY, rotation_changes_at=border)
    blocks = Blocks(weights - layers * (weights * 9 // 10 // layers), (weights * 9 // 10 // layers,) * layers) if layers else None
    return ModelPlan(ModelId(f"file-{name}"), ModelKey(name), f"{name}.gguf", DeviceKind.HOST, weights, geometry, blocks)


ALPHA, BETA, GAMMA = model("alpha"), model("beta"), model("gamma")


class Stage(Backstage):
    """See the module's docstring. Requests return the call that waits; what the engine did is said in the past tense."""

    def __init__(self, *, cap: int, overhead: int = 0, **rules: Any) -> None:
        self.rules = Rules(**rules)
        self.state = State(self.rules, cap_bytes=cap)
        self.cap, self.overhead, self.strangers = cap, overhead, 0
        if overhead:
            self.state.books.book_overhead("process", overhead)
        self.engine = PaperEngine(live_contexts=self.rules.live_contexts)
        self.scrutiny = Scrutiny(self.state, self.engine)
        self.calls: dict[RequestId, Call] = {}
        self.turns: dict[TurnId, TurnCall] = {}
        self.history: list[events.Event] = []
        self.at = 1000.0
        self._ids = itertools.count(1)
        self._held_back: list[events.Event] | None = None

    # --- the world ----------------------------------------------------------------------------------------------------

    def passes(self, seconds: float) -> None:
        """Time goes by, and the device is read."""
        self.at += seconds
        self.reads_device(strangers=self.strangers)

    def reads_device(self, *, strangers: int = 0) -> None:
        """`strangers` took so much of the cap since the start. What may be booked is nine tenths of what there is."""
        self.strangers = strangers
        self.hear(events.DeviceRead(max(0, self.cap - strangers), max(0, self.cap * 10 // 9 - strangers)))

    # --- callers ----------------------------------------------------------------------------------------------------

    def registers(
        self,
        agent: str,
        on: ModelPlan,
        *,
        context: int = 50,
        ladder: tuple[int, ...] = (),
        slots: int = 1,
        kind: str = "shared",
        kv_type: str = "f16",
        priority: int = 0,
        may_wait: bool = False,
        owner: str | None = None,
    ) -> Call:
        rungs = tuple(Rung(window, window, tuple((n, n * window) for n in range(2, slots + 1))) for window in (*ladder, context))
        spec = AgentSpec(
            AgentId(agent), on, ContextSpec(window=context, kv_type=kv_type), rungs, ServiceClass(kind), priority,
            None if owner is None else OwnerId(owner),
        )  # fmt: skip
        return self.request(lambda id: events.RegisterRequested(id, spec, may_wait), owner=owner)

    def joins_like(self, source: Agent, new: str, *, owner: str | None = None, may_wait: bool = False) -> Call:
        """As the shell admits a clone: with what its source has, beginning with the window that it needs now."""
        ladder = source.spec.ladder[source.rung :]
        its = None if owner is None else OwnerId(owner)
        spec = dataclasses.replace(source.spec, id=AgentId(new), owner=its, ladder=ladder)
        return self.request(lambda id: events.RegisterRequested(id, spec, may_wait), owner=owner)

    def has(self, agent: str, on: ModelPlan, **options: Any) -> None:
        """The agent is in, its model loaded if it must be, and the engine idle."""
        call = self.registers(agent, on, **options)
        self.settle()
        assert isinstance(call.answer, actions.Admit), call.answer

    def goes_away(self, call: Call) -> None:
        call.cancelled = call.waits
        self.hear(events.RegisterAbandoned(self._id_of(call)))

    def loses_patience(self, call: Call) -> None:
        self.hear(events.RegisterAbandoned(self._id_of(call), timed_out=True))

    def runs_out_of_time(self, turn: TurnCall) -> None:
        turn.expired = turn.waits
        self.hear(events.TurnExpired(self.turn_id_of(turn)))

    def asks(self, agent: str) -> TurnCall:
        """A turn, waiting in line."""
        id = TurnId(next(self._ids))
        self.turns[id] = turn = TurnCall(agent)
        self.hear(events.TurnRequested(id, AgentId(agent)))
        return turn

    def converses(self, agent: str, *, tokens: int = 10) -> TurnCall:
        """A whole turn, with everything that it takes; `tokens` are what the session holds after it."""
        turn = self.asks(agent)
        self.brings_on(turn)
        while turn.run and turn.run.room < tokens:
            self.outgrew(turn, tokens=turn.run.room, desired=tokens)
            self.brings_on(turn)
        self.finished(turn, tokens=tokens)
        self.settle()
        return turn

    def brings_on(self, turn: TurnCall) -> None:
        """The engine does what it is asked for, in order, until the turn runs."""
        self._works_while(lambda: turn.waits)

    def gives_up(self, turn: TurnCall) -> None:
        self.hear(events.TurnAbandoned(self.turn_id_of(turn)))

    def holds(self, turn: TurnCall, held: bool = True) -> None:
        self.hear(events.TurnHeld(self.turn_id_of(turn), held))

    def cancels(self, agent: str) -> Call:
        return self.request(lambda id: events.TurnsCancelled(id, AgentId(agent)))

    def forks(self, source: str, new: str) -> Call:
        """`new`, who is in already, is to go on from where `source` is."""
        turn = TurnId(next(self._ids))
        return self.request(lambda id: events.ForkRequested(id, turn, AgentId(source), AgentId(new)))

    def is_overdue(self, turn: TurnCall) -> None:
        self.hear(events.TurnOverdue(self.turn_id_of(turn)))

    def unregisters(self, agent: str) -> Call:
        return self.request(lambda id: events.UnregisterRequested(id, AgentId(agent)))

    def dies(self, owner: str) -> None:
        self.hear(events.OwnerDied(OwnerId(owner)))

    def reserves(self, holder: str, bytes: int, *, owner: str | None = None) -> Call:
        return self.request(lambda id: events.ReserveRequested(id, holder, bytes, None if owner is None else OwnerId(owner)))

    def forgets_to_reserve(self, call: Call) -> None:
        """Whoever asked for bytes went away: before the answer, or with it on its way."""
        call.cancelled = call.waits
        self.hear(events.ReserveAbandoned(self._id_of(call)))

    def releases(self, id: str) -> Call:
        return self.request(lambda request: events.ReleaseRequested(request, ReservationId(id)))

    def request(self, event: Callable[[RequestId], events.Event], *, owner: str | None = None) -> Call:
        id = RequestId(next(self._ids))
        said = event(id)
        self.calls[id] = call = Call(said, owner)
        self.hear(said)
        return call

    def closes_down(self) -> None:
        self.hear(events.Closing(NotRunning()))

    # --- the books --------------------------------------------------------------------------------------------------

    @property
    def booked(self) -> int:
        return self.state.ledger.allocated_bytes

    @property
    def agents(self) -> list[str]:
        return list(self.state.agents)

    def picture(self) -> object:
        """Everything that a refused request must leave as it was."""
        state = self.state
        records = copy.deepcopy((state.agents, state.models, state.pools, state.rotation.turns, list(state.books.external)))
        return (
            state.ledger.leases(), state.ledger.snapshot(), state.kv_books.host.leases(), state.kv_books.disk.leases(), records,
            list(state.waitlist), list(self.engine.todo),
        )  # fmt: skip

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is said inside, the state hears together."""
        self._held_back = []
        yield
        happened, self._held_back = self._held_back, None
        self.hear(*happened)

    def hear(self, *happened: events.Event) -> None:
        """Tell the state, note its answers, pass its orders on, and check everything."""
        if self._held_back is not None:
            self._held_back += happened
            return
        self.history += happened
        self.scrutiny.watch(happened, self.at)
        for action in self.state.handle(*happened, at=self.at):
            self._note(action)
        if happened and isinstance(happened[-1], events.OwnerDied):
            owner = happened[-1].owner
            assert not [call for call in self.calls.values() if call.waits and not call.cancelled and call.owner == owner]
        self.scrutiny.check(self.calls.values())
        assert self.engine.todo or not [turn for turn in self.state.rotation.waiting() if turn.expired]

    def _note(self, action: actions.Action) -> None:
        match action:
            case actions.RunTurn(turn_id, agent_id, room):
                turn = self.turns[turn_id]
                assert turn is next(it for it in self.turns.values() if it.agent == agent_id and not it.endings), "out of turn"
                assert turn.waits
                assert not self._forks_before(turn_id, agent_id), "a turn that overtook a fork"
                assert room >= turn.required_tokens
                turn.run = action
                self.engine.ask(action)
            case actions.StopTurn(turn_id, _, reason):
                assert self.turns[turn_id].runs
                self.turns[turn_id].stopped = reason
            case actions.PauseTurn(turn_id):
                assert self.turns[turn_id].runs
                self.turns[turn_id].pausing = True
            case actions.EndTurn(turn_id, agent_id):
                assert self.turns[turn_id].waits
                self.turns[turn_id].endings.append(action)
                standing = self.engine.suspended.get(agent_id)
                if standing is not None and standing.turn_id == turn_id:
                    self.engine.ends_standing(agent_id)
            case actions.FailTurn(turn_id, error):
                assert self.turns[turn_id].waits
                self.turns[turn_id].endings.append(action)
                self._check_that_it_may_fail(self.turns[turn_id], error)
            case actions.Forget(agent_id):
                self.engine.forget(agent_id)
            case actions.DropKv(agent_id):
                self.engine.drop_kv(agent_id)
            case actions.DropTurn(agent_id):
                self.engine.drop_turn(agent_id)
            case actions.LoadModel() | actions.UnloadModel() | actions.MoveKv():
                self.engine.ask(action)
            case actions.OpenPool() | actions.ClosePool() | actions.TakeSeat() | actions.LeaveSeat():
                self.engine.ask(action)
            case actions.CopyKv(turn_id, source):
                asked_before = [turn for id, turn in self.turns.items() if id < turn_id and turn.agent == source]
                assert all(turn.endings for turn in asked_before), "a fork that overtook a turn"
                self.engine.ask(action)
            case _:
                call = self.calls[action.request_id]
                assert call.waits, f"{call.asked} is answered twice: {call.answers}, {action}"
                assert not call.cancelled, f"{action} for somebody who went away"
                call.answers.append(action)

    def _forks_before(self, turn: TurnId, agent: AgentId) -> list[Call]:
        """Those of the agent that came before its turn, and are not done."""
        waiting = [call for call in self.calls.values() if call.waits]
        forks = [(call, call.asked) for call in waiting if isinstance(call.asked, events.ForkRequested)]
        own = [(call, fork) for call, fork in forks if fork.source == agent and fork.turn_id < turn]
        return [call for call, fork in own if not self.engine.is_asked(actions.TakeSeat, fork.new)]  # which are copied

    def _check_that_it_may_fail(self, turn: TurnCall, error: ConductorError) -> None:
        """Of a guaranteed agent's turns, only those that nobody wants any more, or that waited too long for one before."""
        agent = self.state.agents.get(AgentId(turn.agent))
        if agent is not None and agent.guaranteed and not isinstance(error, (TurnCancelled, UnknownAgent)):
            assert isinstance(error, (TurnTimedOut, TurnQueueFull)), error
            runs = [other for other in self.turns.values() if other.agent == turn.agent and other.runs]
            assert runs or self.engine.is_asked(actions.CopyKv, turn.agent)

    def wind_up(self) -> None:
        """What can be done is done; strangers leave; everybody goes. Then every call has its one answer, every turn its one end,
        and the ledger is as at the start."""
        self.settle()
        self.reads_device()
        self.settle()
        while self.state.agents or self.state.books.external:
            for agent in self.agents:
                self.unregisters(agent)
            for id in list(self.state.books.external):
                self.releases(id)
            self.settle()
        assert self.booked == self.overhead
        assert not self.engine.weights
        assert not self.engine.homes
        assert not self.engine.pools
        assert not self.engine.seats
        assert not self.engine.saved
        assert not self.state.kv_books.host.allocated_bytes
        assert not self.state.kv_books.disk.allocated_bytes
        assert not self.state.books.homes.ledger.allocated_bytes
        assert [call.asked for call in self.calls.values() if len(call.answers) != (not call.cancelled)] == []
        assert [turn for turn in self.turns.values() if len(turn.endings) != 1] == []

    def _id_of(self, call: Call) -> RequestId:
        return next(id for id, known in self.calls.items() if known is call)


@contextlib.contextmanager
def stages() -> Iterator[Callable[..., Stage]]:
    """Stages for one test; each is wound up when the test has passed."""
    opened: list[Stage] = []

    def raise_the_curtain(**facts: Any) -> Stage:
        opened.append(Stage(**facts))
        return opened[-1]

    yield raise_the_curtain
    for stage in opened:
        stage.wind_up()
