"""Stories about the policy in plain English: a `Stage` owns a State, tells it what happened and plays the engine's part.

    stage = Stage(cap=1000)
    call = stage.registers("a", ALPHA, context=50)   # books, and asks the engine to load ALPHA
    stage.loaded(ALPHA)                              # the engine answers
    assert call.admission.charged_bytes == 150

A context's window is its bytes, so that a story's numbers add up in the head. After each event the state checks its own
invariants and the stage holds the books against the engine's; `wind_up` sends everybody home and wants every byte back.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from conductor.core import actions, events, sessions
from conductor.core.admission import Outcome
from conductor.core.estimate import Geometry, ModelPlan
from conductor.core.events import AgentSpec, RequestId, TurnId
from conductor.core.state import State
from conductor.errors import AdmissionRefused, ConductorError, ModelLoadFailed, Refusal
from conductor.types import AgentId, ContextSpec, DeviceKind, KvPlace, ModelId, ModelKey, ModelState, OwnerId, ReservationId
from tests.support.paper_engine import PaperEngine, Work

E = TypeVar("E", bound=ConductorError)

GEOMETRY = Geometry(
    architecture="llama", n_layer=2, n_embd=64, n_head=4, n_kv_heads=(2, 2), head_dim_k=16, head_dim_v=16, n_ff=128,
    n_vocab=300, trained_window=4096, sliding_window=0, sliding_layers=(False, False), recurrent_bytes_per_sequence=0,
    weights_bytes_host=100, weights_bytes_offloaded=100,
)  # fmt: skip


def model(name: str, *, weights: int = 100) -> ModelPlan:
    return ModelPlan(ModelId(f"file-{name}"), ModelKey(name), f"{name}.gguf", DeviceKind.HOST, weights, GEOMETRY)


ALPHA, BETA, GAMMA = model("alpha"), model("beta"), model("gamma")


@dataclass
class Call:
    """Somebody who waits for one answer."""

    about: str
    owner: str | None = None
    answers: list[actions.Action] = field(default_factory=list)
    cancelled: bool = False  #: whoever asked went away, and is told nothing

    @property
    def waits(self) -> bool:
        return not self.answers

    @property
    def answer(self) -> actions.Action:
        assert len(self.answers) == 1, f"{self.about}: {self.answers}"
        return self.answers[0]

    @property
    def admission(self) -> actions.Admit:
        assert isinstance(self.answer, actions.Admit), self.answer
        return self.answer

    @property
    def reservation(self) -> ReservationId:
        assert isinstance(self.answer, actions.AnswerReserve), self.answer
        return self.answer.reservation_id

    @property
    def is_done(self) -> bool:
        """An unregister or a release was carried out."""
        return bool(self.answers) and isinstance(self.answer, (actions.AnswerUnregister, actions.AnswerRelease))

    @property
    def refusal(self) -> Refusal:
        return self.failed_with(AdmissionRefused).refusal

    def failed_with(self, kind: type[E]) -> E:
        assert isinstance(self.answer, (actions.Refuse, actions.FailRequest)), self.answer
        assert type(self.answer.error) is kind
        return self.answer.error


@dataclass
class TurnCall:
    """Somebody who waits for a turn's end."""

    agent: str
    run: actions.RunTurn | None = None
    stopped: bool = False  #: asked to end after its step
    endings: list[events.TurnFinished | actions.FailTurn] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return self.run is None and not self.endings

    @property
    def runs(self) -> bool:
        return self.run is not None and not self.endings

    @property
    def evidence(self) -> tuple[AgentId | None, bool, int]:
        """(evicted, restored, swap_bytes) as the result will say."""
        assert self.run is not None, f"the turn of {self.agent} never ran"
        return self.run.evicted, self.run.restored, self.run.swap_bytes

    def failed_with(self, kind: type[E]) -> E:
        (ending,) = self.endings
        assert isinstance(ending, actions.FailTurn)
        assert type(ending.error) is kind
        return ending.error


class Stage:
    """See the module's docstring. Requests return the call that waits; what the engine did is said in the past tense."""

    def __init__(self, *, cap: int, live_contexts: int = 1, waitlist_limit: int = 256, overhead: int = 0) -> None:
        self.state = State(cap_bytes=cap, live_contexts=live_contexts, waitlist_limit=waitlist_limit)
        self.overhead = overhead
        if overhead:
            self.state.books.book_overhead("process", overhead)
        self.engine = PaperEngine(live_contexts=live_contexts)
        self.calls: dict[RequestId, Call] = {}
        self.turns: dict[TurnId, TurnCall] = {}
        self.history: list[events.Event] = []
        self._ids = itertools.count(1)

    # --- callers ----------------------------------------------------------------------------------------------------

    def registers(
        self, agent: str, on: ModelPlan, *, context: int = 50, priority: int = 0, may_wait: bool = False, owner: str | None = None
    ) -> Call:
        spec = AgentSpec(
            AgentId(agent), on, ContextSpec(window=context), context, priority, None if owner is None else OwnerId(owner)
        )
        return self.request(lambda id: events.RegisterRequested(id, spec, may_wait), owner=owner)

    def has(self, agent: str, on: ModelPlan, *, context: int = 50, priority: int = 0, owner: str | None = None) -> None:
        """The agent is in, its model loaded, and the engine idle."""
        call = self.registers(agent, on, context=context, priority=priority, owner=owner)
        self.settle()
        assert call.admission

    def goes_away(self, call: Call) -> None:
        call.cancelled = call.waits
        self.hear(events.RegisterAbandoned(self._id_of(call)))

    def loses_patience(self, call: Call) -> None:
        self.hear(events.RegisterAbandoned(self._id_of(call), timed_out=True))

    def asks(self, agent: str) -> TurnCall:
        """A turn, waiting in line."""
        id = TurnId(next(self._ids))
        self.turns[id] = turn = TurnCall(agent)
        self.hear(events.TurnRequested(id, AgentId(agent)))
        return turn

    def converses(self, agent: str, *, tokens: int = 10) -> TurnCall:
        """A whole turn, with everything that it takes; `tokens` are what the session holds after it."""
        turn = self.asks(agent)
        while turn.waits:
            self.does(self.engine.todo[0])
        self.finished(turn, tokens=tokens)
        self.settle()
        return turn

    def gives_up(self, turn: TurnCall) -> None:
        self.hear(events.TurnAbandoned(self._turn_id_of(turn)))

    def unregisters(self, agent: str) -> Call:
        return self.request(lambda id: events.UnregisterRequested(id, AgentId(agent)))

    def dies(self, owner: str) -> None:
        self.hear(events.OwnerDied(OwnerId(owner)))

    def reserves(self, holder: str, bytes: int, *, owner: str | None = None) -> Call:
        return self.request(lambda id: events.ReserveRequested(id, holder, bytes, None if owner is None else OwnerId(owner)))

    def releases(self, id: str) -> Call:
        return self.request(lambda request: events.ReleaseRequested(request, ReservationId(id)))

    def request(self, event: Callable[[RequestId], events.Event], *, owner: str | None = None) -> Call:
        id = RequestId(next(self._ids))
        said = event(id)
        self.calls[id] = call = Call(repr(said), owner)
        self.hear(said)
        return call

    # --- the engine -------------------------------------------------------------------------------------------------

    def loaded(self, plan: ModelPlan, *, weights: int | None = None) -> None:
        self.engine.take(actions.LoadModel, plan.id)
        self.engine.weights[plan.id] = measured = plan.weights_bytes if weights is None else weights
        self.hear(events.ModelLoaded(plan.id, measured))

    def load_failed(self, plan: ModelPlan) -> None:
        self.engine.take(actions.LoadModel, plan.id)
        self.hear(events.ModelLoadFailed(plan.id, ModelLoadFailed(plan.path, "it is broken")))

    def unloaded(self, model_id: str) -> None:
        self.engine.take(actions.UnloadModel, model_id)
        del self.engine.weights[ModelId(model_id)]
        self.hear(events.ModelUnloaded(ModelId(model_id)))

    def opened(self, agent: str, *, takes: int | None = None, kv_lost: bool = False) -> None:
        """`takes`: the bytes that the context turned out to take, if not those that it was priced at."""
        self.engine.take(actions.OpenContext, agent)
        id = AgentId(agent)
        measured = self.state.books.price(self.state.agents[id].spec) if takes is None else takes
        restored = self.engine.open(id, measured, kv_lost=kv_lost)
        self.hear(events.ContextOpened(id, measured, restored))

    def open_failed(self, agent: str, error: ConductorError) -> None:
        self.engine.take(actions.OpenContext, agent)
        self.hear(events.ContextOpenFailed(AgentId(agent), error, self.engine.fail_to_open(AgentId(agent))))

    def closed(self, agent: str) -> None:
        work = self.engine.take(actions.CloseContext, agent)
        assert isinstance(work, actions.CloseContext)
        saved = self.engine.close(work.agent_id, save=work.save)
        self.hear(events.ContextClosed(work.agent_id, KvPlace.HOST if saved else KvPlace.TOKENS, saved))

    def finished(self, turn: TurnCall, *, tokens: int = 10) -> None:
        self.engine.take(actions.RunTurn, turn.agent)
        self.engine.tokens[AgentId(turn.agent)] = tokens
        event = events.TurnFinished(self._turn_id_of(turn), tokens)
        turn.endings.append(event)
        self.hear(event)

    def does(self, work: Work) -> None:
        """The engine does one of the things it was asked for, and it goes as estimated."""
        match work:
            case actions.LoadModel(plan):
                self.loaded(plan)
            case actions.UnloadModel(model_id):
                self.unloaded(model_id)
            case actions.OpenContext(agent_id):
                self.opened(agent_id)
            case actions.CloseContext(agent_id):
                self.closed(agent_id)
            case actions.RunTurn(turn_id):
                self.finished(self.turns[turn_id])

    def settle(self) -> None:
        """The engine does everything it is asked for, in order, until there is nothing left."""
        while self.engine.todo:
            self.does(self.engine.todo[0])

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
        records = copy.deepcopy((state.agents, state.models, state.rotation.turns, state.books.external))
        return state.ledger.leases(), state.ledger.snapshot(), records, list(state.waitlist), list(self.engine.todo)

    def hear(self, event: events.Event) -> None:
        """Tell the state, note its answers, pass its orders on, and check everything."""
        self.history.append(event)
        for action in self.state.handle(event):
            self._note(action)
        if isinstance(event, events.OwnerDied):
            assert not [call for call in self.calls.values() if call.waits and not call.cancelled and call.owner == event.owner]
        self.state.check()
        self._check_the_books_against_the_engine()
        if not self.engine.todo:
            self._check_that_nobody_waits_for_nothing()

    def _note(self, action: actions.Action) -> None:
        match action:
            case actions.RunTurn(turn_id):
                assert self.turns[turn_id].waits
                self.turns[turn_id].run = action
                self.engine.ask(action)
            case actions.StopTurn(turn_id):
                assert self.turns[turn_id].runs
                self.turns[turn_id].stopped = True
            case actions.FailTurn(turn_id):
                assert self.turns[turn_id].waits
                self.turns[turn_id].endings.append(action)
            case actions.Forget(agent_id):
                self.engine.forget(agent_id)
            case actions.LoadModel() | actions.UnloadModel() | actions.OpenContext() | actions.CloseContext():
                self.engine.ask(action)
            case _:
                call = self.calls[action.request_id]
                assert call.waits, f"{call.about} is answered twice: {call.answers}, {action}"
                assert not call.cancelled, f"{action} for somebody who went away"
                call.answers.append(action)

    def _check_the_books_against_the_engine(self) -> None:
        ledger = self.state.ledger
        for id, model in self.state.models.items():
            if model.state is ModelState.RESIDENT:
                assert ledger.size(model.reservation) == self.engine.weights[id]
        for id, agent in self.state.agents.items():
            assert (agent.live is not None) == (id in self.engine.places)
            if agent.live and agent.phase in (sessions.Phase.READY, sessions.Phase.BUSY):
                assert ledger.size(agent.live.reservation) == self.engine.contexts[id]

    def _check_that_nobody_waits_for_nothing(self) -> None:
        state = self.state
        assert not state.rotation.turns, "a turn waits, and the engine has nothing to do"
        assert all(agent.stage is sessions.Stage.ADMITTED for agent in state.agents.values())
        assert all(model.state is ModelState.RESIDENT for model in state.models.values())
        if first := next(iter(state.waitlist), None):
            decision = state.books.decide(first.agent, weights_are_booked=first.agent.model.id in state.models)
            assert decision.outcome is Outcome.WAIT, f"{first} waits, and the decision is {decision}"

    def wind_up(self) -> None:
        """Everybody goes; then every call has its one answer, every turn its one end, and the ledger is as at the start."""
        self.settle()
        while self.state.agents or self.state.books.external:
            for agent in self.agents:
                self.unregisters(agent)
            for id in list(self.state.books.external):
                self.releases(id)
            self.settle()
        assert self.booked == self.overhead
        assert not self.engine.weights
        assert not self.engine.places
        assert not self.engine.saved
        assert [call.about for call in self.calls.values() if len(call.answers) != (not call.cancelled)] == []
        assert [turn for turn in self.turns.values() if len(turn.endings) != 1] == []

    def _id_of(self, call: Call) -> RequestId:
        return next(id for id, known in self.calls.items() if known is call)

    def _turn_id_of(self, turn: TurnCall) -> TurnId:
        return next(id for id, known in self.turns.items() if known is turn)


@contextlib.contextmanager
def stages() -> Iterator[Callable[..., Stage]]:
    """Stages for one test; each is wound up when the test has passed."""
    opened: list[Stage] = []

    def raise_the_curtain(**facts: int) -> Stage:
        opened.append(Stage(**facts))
        return opened[-1]

    yield raise_the_curtain
    for stage in opened:
        stage.wind_up()
