"""Everything at once: random callers, an engine whose answers come in random order and sometimes fail.

`Stage` checks after each event that the state's invariants hold, that the books say what the engine holds, that nobody is
answered twice, that the engine is never asked for the impossible, and that nobody waits for an engine that is idle.
At the end everybody goes, and `wind_up` wants one answer for each call and every byte back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from conductor.core import actions
from conductor.core.estimate import ModelPlan
from conductor.errors import AdmissionRefused, DecodeFailed
from conductor.types import AgentId
from tests.support.stories import Stage, model

SEEDS = range(40)
STEPS = 500

AGENTS = [f"agent-{i}" for i in range(9)]
OWNERS = ["worker-1", "worker-2", "worker-3", None]
WINDOWS = [0, 30, 50, 80, 400]


class RandomWorld:
    """One conductor and its callers. All randomness is `chance`'s."""

    def __init__(self, chance: random.Random) -> None:
        self.random = chance
        self.models = [model(name, weights=weights) for name, weights in zip("klmn", (100, 100, 150, 420), strict=True)]
        self.stage = Stage(
            cap=self.random.choice([250, 400, 500, 900]),
            live_contexts=self.random.choice([1, 1, 2, 3]),
            waitlist_limit=self.random.choice([0, 2, 5]),
            overhead=self.random.choice([0, 20]),
        )
        #: what may happen, and how often
        self.happenings: list[tuple[Callable[[], None], int]] = [
            (self.somebody_registers, 14),
            (self.somebody_asks, 22),
            (self.the_engine_does_something, 45),
            (self.somebody_unregisters, 5),
            (self.a_registrant_goes_away_or_loses_patience, 4),
            (self.a_turn_is_given_up, 4),
            (self.an_owner_dies, 2),
            (self.an_outsider_reserves, 2),
            (self.an_outsider_releases, 2),
        ]

    def step(self) -> None:
        happenings, weights = zip(*self.happenings, strict=True)
        self.random.choices(happenings, weights)[0]()

    # --- callers ----------------------------------------------------------------------------------------------------

    def somebody_registers(self) -> None:
        agent = self.random.choice(AGENTS)
        self.stage.registers(
            agent,
            self.random.choice(self.models),
            context=self.random.choice(WINDOWS),
            priority=self.random.choice([-1, 0, 0, 0, 1]),
            may_wait=self.random.random() < 0.5,
            owner=self.random.choice(OWNERS),
        )

    def a_registrant_goes_away_or_loses_patience(self) -> None:
        calls = [call for call in self.stage.calls.values() if not call.cancelled and call.about.startswith("Register")]
        pending = [call for call in calls if call.waits]
        if calls:
            call = self.random.choice(pending or calls[-5:])
            self.random.choice([self.stage.goes_away, self.stage.loses_patience])(call)

    def somebody_asks(self) -> None:
        self.stage.asks(self.random.choice(self.stage.agents or AGENTS))

    def a_turn_is_given_up(self) -> None:
        if turns := [turn for turn in self.stage.turns.values() if not turn.endings]:
            self.stage.gives_up(self.random.choice(turns))

    def somebody_unregisters(self) -> None:
        self.stage.unregisters(self.random.choice(AGENTS))

    def an_owner_dies(self) -> None:
        self.stage.dies(self.random.choice(["worker-1", "worker-2", "worker-3"]))

    def an_outsider_reserves(self) -> None:
        self.stage.reserves("trainer", self.random.choice([1, 30, 120, 1000]), owner=self.random.choice(OWNERS))

    def an_outsider_releases(self) -> None:
        booked = [reservation.id for reservation in self.stage.state.ledger.snapshot()]
        self.stage.releases(self.random.choice([*booked, *self.stage.state.books.external, "r0"]))

    # --- the engine -------------------------------------------------------------------------------------------------

    def the_engine_does_something(self) -> None:
        if not self.stage.engine.todo:
            return
        work, fails = self.random.choice(self.stage.engine.todo), self.random.random() < 0.15
        match work:
            case actions.LoadModel(plan):
                self.load(plan, fails=fails)
            case actions.OpenContext(agent_id):
                self.open(agent_id, fails=fails)
            case actions.RunTurn(turn_id):
                self.stage.finished(self.stage.turns[turn_id], tokens=self.random.randrange(20))
            case _:
                self.stage.does(work)

    def load(self, plan: ModelPlan, *, fails: bool) -> None:
        if fails:
            self.stage.load_failed(plan)
        else:
            self.stage.loaded(plan, weights=plan.weights_bytes + self.random.choice([-20, 0, 0, 0, 5, 40]))

    def open(self, agent_id: AgentId, *, fails: bool) -> None:
        if fails:
            self.stage.open_failed(agent_id, DecodeFailed(agent_id, "no memory"))
            return
        price = self.stage.state.books.price(self.stage.state.agents[agent_id].spec)
        takes = max(0, price + self.random.choice([-10, 0, 0, 0, 0, 3, 30]))
        self.stage.opened(agent_id, takes=takes, kv_lost=self.random.random() < 0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_books_balance_and_everybody_is_answered_once(seed: int) -> None:
    world = RandomWorld(random.Random(seed))
    try:
        for _ in range(STEPS):
            world.step()
        world.stage.wind_up()
    except Exception:
        print(f"seed {seed}, after {len(world.stage.history)} events, the last of them:")
        print(*world.stage.history[-30:], sep="\n")
        raise


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chance=strategies.randoms(use_true_random=False), steps=strategies.integers(1, 60))
def test_hypothesis_finds_no_shorter_story_that_breaks_the_books(chance: random.Random, steps: int) -> None:
    """The same world with hypothesis for its chance: what breaks it is shrunk to the shortest story that does."""
    world = RandomWorld(chance)
    for _ in range(steps):
        world.step()
    world.stage.wind_up()


def endings(stage: Stage) -> Iterator[str]:
    """How calls and turns ended, in words."""
    for call in stage.calls.values():
        for answer in call.answers:
            yield type(answer).__name__
            if isinstance(answer, (actions.Refuse, actions.FailRequest)):
                yield answer.error.code.value if isinstance(answer.error, AdmissionRefused) else type(answer.error).__name__
    for turn in stage.turns.values():
        for ending in turn.endings:
            yield type(ending).__name__
        if turn.run:
            yield f"{'evicts' if turn.run.evicted else 'evicts nobody'}, {'restored' if turn.run.restored else 'cold or live'}"


def test_that_is_at_least_ten_thousand_operations_in_which_everything_happens() -> None:
    """A random test that never swaps or refuses would prove little."""
    assert len(SEEDS) * STEPS >= 10_000
    seen: set[str] = set()
    for seed in SEEDS[:8]:
        world = RandomWorld(random.Random(seed))
        for _ in range(STEPS):
            world.step()
        seen.update(endings(world.stage))
    assert seen >= {
        "Admit", "Refuse", "AnswerUnregister", "AnswerReserve", "AnswerRelease", "FailRequest", "TurnFinished", "FailTurn",
        "CAP", "NEVER", "QUEUE_FULL", "TIMEOUT", "ModelLoadFailed", "DuplicateAgent", "UnknownAgent", "UnknownReservation",
        "evicts nobody, cold or live", "evicts nobody, restored", "evicts, cold or live", "evicts, restored",
    }  # fmt: skip
