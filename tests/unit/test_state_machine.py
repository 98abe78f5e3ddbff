"""Everything at once: random callers, an engine whose answers come in random order and sometimes fail.

`Stage` checks after each event what `support/scrutiny.py` says, that nobody is answered twice, that turns of one agent keep their
order, and that the engine is never asked for the impossible. At the end the engine must come to rest, strangers or not; then
everybody goes, and `wind_up` wants one answer for each call and every byte back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from typing_extensions import assert_never

from conductor.core import actions
from conductor.core.estimate import ModelPlan
from conductor.errors import AdmissionRefused, DecodeFailed
from conductor.types import AgentId, PoolId
from tests.support.calls import TurnCall
from tests.support.stories import Stage, model

SEEDS = range(40)
STEPS = 500

AGENTS = [f"agent-{i}" for i in range(9)]
OWNERS = ["worker-1", "worker-2", "worker-3", None]
WINDOWS = [0, 30, 50, 80, 400]
CLASSES = ["shared", "shared", "best_effort", "guaranteed"]


class RandomWorld:
    """One conductor and its callers. All randomness is `chance`'s."""

    def __init__(self, chance: random.Random) -> None:
        self.random = chance
        layers = [self.random.choice([0, 3, 8]) for _ in range(4)]
        sizes = (100, 100, 150, 420)
        self.models = [model(name, weights=size, layers=n) for name, size, n in zip("klmn", sizes, layers, strict=True)]
        self.stage = Stage(
            cap=self.random.choice([250, 400, 500, 900]),
            live_contexts=self.random.choice([1, 1, 2, None]),
            min_turn_s=self.random.choice([0.0, 0.0, 1.0]),
            waitlist_limit=self.random.choice([0, 2, 5]),
            overhead=self.random.choice([0, 20]),
            host_bytes=self.random.choice([0, 40, 100, 1000]),
            disk_bytes=self.random.choice([0, 0, 50, 1000]),
            turn_queue_limit=self.random.choice([3, 1000]),
            ageing_s=self.random.choice([1.0, 60.0]),
            idle_shrink_s=self.random.choice([None, 0.0, 5.0]),
            idle_ttl_s=self.random.choice([None, None, None, 50.0]),
            home_bytes=self.random.choice([0, 200, 10000]),
            link_bytes_per_s=self.random.choice([10.0, 1e9]),
        )
        #: what may happen, and how often
        self.happenings: list[tuple[Callable[[], None], int]] = [
            (self.somebody_registers, 14),
            (self.somebody_asks, 22),
            (self.the_engine_does_something, 45),
            (self.somebody_forks, 6),
            (self.somebody_unregisters, 5),
            (self.a_registrant_goes_away_or_loses_patience, 4),
            (self.a_turn_is_given_up, 4),
            (self.an_owner_dies, 2),
            (self.an_outsider_reserves, 2),
            (self.an_outsider_releases, 2),
            (self.an_outsider_goes_away, 1),
            (self.time_passes, 4),
            (self.strangers_come_and_go, 2),
            (self.a_turn_runs_out_of_time, 2),
            (self.a_turn_is_overdue, 2),
            (self.an_agent_is_cancelled, 2),
            (self.a_reader_falls_behind_or_catches_up, 2),
            (self.turns_progress, 4),
        ]

    def step(self) -> None:
        happenings, weights = zip(*self.happenings, strict=True)
        self.random.choices(happenings, weights)[0]()

    # --- callers ----------------------------------------------------------------------------------------------------

    def somebody_registers(self) -> None:
        agent, window = self.random.choice(AGENTS), self.random.choice(WINDOWS)
        ladder = tuple(rung for rung in (10, 20, 35) if rung < window)
        self.stage.registers(
            agent,
            self.random.choice(self.models),
            context=window,
            ladder=self.random.choice([(), ladder]),
            slots=self.random.choice([1, 2, 4]),
            kind=self.random.choice(CLASSES),
            kv_type=self.random.choice(["f16", "f16", "f16", "q8_0"]),
            priority=self.random.choice([-1, 0, 0, 0, 1]),
            may_wait=self.random.random() < 0.5,
            owner=self.random.choice(OWNERS),
        )

    def a_registrant_goes_away_or_loses_patience(self) -> None:
        calls = [call for call in self.stage.calls.values() if not call.cancelled and call.is_registration]
        pending = [call for call in calls if call.waits]
        if calls:
            call = self.random.choice(pending or calls[-5:])
            self.random.choice([self.stage.goes_away, self.stage.loses_patience])(call)

    def somebody_asks(self) -> None:
        self.stage.asks(self.random.choice(self.stage.agents or AGENTS))

    def somebody_forks(self) -> None:
        """Rather often one who can be cloned, for a clone that was admitted like it a moment before, as the shell sees to it."""
        source, new = self.random.choice(self.stage.agents or AGENTS), self.random.choice(AGENTS)
        agent = self.stage.state.agents.get(AgentId(source))
        if agent is not None and self.random.random() < 0.9:
            self.stage.joins_like(agent, new, owner=self.random.choice(OWNERS), may_wait=self.random.random() < 0.5)
        if self.random.random() < 0.9:
            self.stage.forks(source, new)

    def a_turn_is_given_up(self) -> None:
        if turns := [turn for turn in self.stage.turns.values() if not turn.endings]:
            self.stage.gives_up(self.random.choice(turns))

    def a_turn_runs_out_of_time(self) -> None:
        if turns := [turn for turn in self.stage.turns.values() if not turn.endings]:
            self.stage.runs_out_of_time(self.random.choice(turns))

    def a_turn_is_overdue(self) -> None:
        if turns := [turn for turn in self.stage.turns.values() if not turn.endings]:
            self.stage.is_overdue(self.random.choice(turns))

    def an_agent_is_cancelled(self) -> None:
        self.stage.cancels(self.random.choice(AGENTS))

    def a_reader_falls_behind_or_catches_up(self) -> None:
        if turns := [turn for turn in self.stage.turns.values() if not turn.endings]:
            self.stage.holds(self.random.choice(turns), self.random.random() < 0.5)

    def turns_progress(self) -> None:
        self.stage.progresses(**{turn.agent: self.random.randrange(100) for turn in self.stage.turns.values() if turn.runs})

    def time_passes(self) -> None:
        self.stage.passes(self.random.choice([0.1, 1.0, 20.0]))

    def strangers_come_and_go(self) -> None:
        self.stage.reads_device(strangers=self.random.choice([0, 0, 10, 100, 300, 1000]))

    def somebody_unregisters(self) -> None:
        self.stage.unregisters(self.random.choice(AGENTS))

    def an_owner_dies(self) -> None:
        self.stage.dies(self.random.choice(["worker-1", "worker-2", "worker-3"]))

    def an_outsider_reserves(self) -> None:
        self.stage.reserves("trainer", self.random.choice([1, 30, 120, 1000]), owner=self.random.choice(OWNERS))

    def an_outsider_releases(self) -> None:
        booked = [reservation.id for reservation in self.stage.state.ledger.snapshot()]
        self.stage.releases(self.random.choice([*booked, *self.stage.state.books.external, "r0"]))

    def an_outsider_goes_away(self) -> None:
        """Before it had an answer, or at once after."""
        calls = [call for call in self.stage.calls.values() if call.is_reservation and not call.cancelled]
        if calls:
            self.stage.forgets_to_reserve(self.random.choice([call for call in calls if call.waits] or calls[-3:]))

    # --- the engine -------------------------------------------------------------------------------------------------

    def the_engine_does_something(self) -> None:
        if not self.stage.engine.todo:
            return
        work, fails = self.random.choice(self.stage.engine.todo), self.random.random() < 0.15
        match work:
            case actions.LoadModel(plan):
                self.load(plan, fails=fails)
            case actions.OpenPool(pool_id):
                self.open(pool_id, fails=fails)
            case actions.TakeSeat(agent_id):
                if fails:
                    self.stage.open_failed(agent_id, DecodeFailed(agent_id, "no memory"))
                else:
                    self.stage.seat_taken(agent_id, kv_lost=self.random.random() < 0.1)
            case actions.RunTurn(turn_id, agent_id, room):
                self.run(self.stage.turns[turn_id], agent_id, room)
            case actions.CopyKv(_, source):
                self.stage.copied(source, fails=fails)
            case actions.MoveKv(agent_id):
                self.stage.moved(agent_id, fails=fails, takes_s=self.random.choice([1e-9, 1e-6, 1.0]))
            case actions.LeaveSeat() | actions.ClosePool() | actions.UnloadModel():
                with self.stage.at_once():
                    self.stage.does(work)
                    self.random.choice([self.time_passes, self.strangers_come_and_go])()
            case _:
                assert_never(work)

    def run(self, turn: TurnCall, agent_id: AgentId, room: int) -> None:
        window, chance = self.stage.state.agents[agent_id].spec.context.window, self.random.random()
        if room < window and chance < 0.3:
            desired = self.random.randrange(room + 1, window + 1)
            tokens = self.random.choice([room, self.random.randrange(room, desired)])
            self.stage.outgrew(turn, tokens=tokens, desired=desired, has_made=tokens == room)
        elif turn.pausing and chance < 0.9:
            self.stage.paused(turn, tokens=self.random.randrange(room + 1), has_made=self.random.random() < 0.5)
        else:
            tokens = self.random.randrange(min(self.random.choice([20, window]), room) + 1)
            prefill_s_per_token = self.random.choice([None, 1e-9, 1e-3])
            self.stage.finished(turn, tokens=tokens, prefill_s_per_token=prefill_s_per_token, computed=self.random.randrange(100))

    def load(self, plan: ModelPlan, *, fails: bool) -> None:
        if fails:
            self.stage.load_failed(plan)
        elif self._may_not_move(plan) and self.random.random() < 0.1:
            self.stage.stays_whole(plan)
        else:
            self.stage.loaded(plan, weights=plan.weights_bytes + self.random.choice([-20, 0, 0, 0, 5, 40]))

    def _may_not_move(self, plan: ModelPlan) -> bool:
        """It is to be placed for the first time."""
        return self.stage.state.models[plan.id].placement is not None and plan.id not in self.stage.engine.homes

    def open(self, pool: PoolId, *, fails: bool) -> None:
        if fails:
            agent = self.stage.state.pools[pool].agent_id
            self.stage.pool_open_failed(pool, DecodeFailed(agent, "no memory"))
            return
        more = self.random.choice([-10, 0, 0, 0, 0, 3, 30])
        tells = more == 0 or self.random.random() < 0.9
        self.stage.pool_opened(pool, takes_more=more if tells else 0, tells=tells)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_books_balance_and_everybody_is_answered_once(seed: int) -> None:
    world = RandomWorld(random.Random(seed))
    try:
        for _ in range(STEPS):
            world.step()
        if seed % 5 == 0:
            world.stage.closes_down()
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
            yield "stood still" if turn.run.pauses else "in one go"
            yield f"{'evicts' if turn.run.evicted else 'evicts nobody'}, {'restored' if turn.run.restored else 'cold or live'}"


def test_that_is_at_least_ten_thousand_operations_in_which_everything_happens() -> None:
    """A random test that never swaps or refuses would prove little."""
    assert len(SEEDS) * STEPS >= 10_000
    seen: set[str] = set()
    for seed in SEEDS[:30]:
        world = RandomWorld(random.Random(seed))
        for _ in range(STEPS):
            world.step()
        seen.update(endings(world.stage))
    assert seen >= {
        "Admit", "Refuse", "AnswerUnregister", "AnswerReserve", "AnswerRelease", "AnswerCancel", "AnswerFork", "FailRequest",
        "TurnFinished", "TurnCancelled",        "FailTurn", "EndTurn", "stood still", "in one go",
        "CAP", "NEVER", "QUEUE_FULL", "TIMEOUT", "ModelLoadFailed", "DuplicateAgent", "UnknownAgent", "UnknownReservation",
        "evicts nobody, cold or live", "evicts nobody, restored", "evicts, cold or live", "evicts, restored",
    }  # fmt: skip
