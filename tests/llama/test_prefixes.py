"""Agents that begin with the same read it once, and nobody can tell from what they say."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from conductor.backend import prefixes
from conductor.backend.turn import Outgrown, Paused, TurnEnd, TurnOutcome
from conductor.errors import TurnCancelled
from conductor.types import KvPlace, Message, PoolId
from tests.support.company import ARCHITECTURES, SPEC, same
from tests.support.eventually import eventually
from tests.support.growing import WITHIN_S, Stage, Talker, all_of

pytestmark = pytest.mark.usefixtures("samplers_are_closed")

Together = Callable[..., tuple[Stage, PoolId]]
SYSTEM = "You are one agent of many. Say hello to the world, and be kind to the model. " * 2
#: cannot be cut back, or only within its window
FORGETFUL = ("gemma3", "mamba", "jamba")


def chat(n: int) -> dict[str, Any]:
    return {"messages": (Message("system", SYSTEM), Message("user", f"{n} is my number. " * (1 + n % 3)))}


def alone(stage: Stage, *requests: dict[str, Any], max_tokens: int = 30) -> list[TurnOutcome]:
    """In a context of one's own each, so that nothing is shared."""
    said = []
    for n, request in enumerate(requests):
        witness = stage.talker(f"witness {n}", **SPEC)
        stage.engine._pools[witness.pool].pool._prefixes._snapshots = prefixes.Snapshots(0)
        said.append(witness.says(**request, max_tokens=max_tokens))
        witness.leaves()
    return said


def shared(outcome: TurnOutcome, fresh: TurnOutcome) -> int:
    """Tokens that it did not have to read; all that it was to read is accounted for, once."""
    assert outcome.prompt_tokens + outcome.prompt_tokens_reused + outcome.prefix_tokens_reused == fresh.prompt_tokens
    assert outcome.computed_tokens == outcome.prompt_tokens + len(outcome.tokens) - 1
    return outcome.prefix_tokens_reused


def head(stage: Stage) -> int:
    """How many tokens all chats begin with."""
    prompter = stage.engine._models[stage.plan.id].prompter
    one, other = (prompter._chat(chat(n)["messages"]) for n in (1, 2))
    return prefixes.common_prefix(one, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agents_that_begin_together_read_their_system_message_once(together: Together, architecture: str) -> None:
    stage, pool = together(architecture)
    expected = alone(stage, *map(chat, range(6)))
    agents = [stage.sits(f"agent {n}", pool) for n in range(6)]
    with agents[0].busy():
        turns = [agent.begins(agent.request(**chat(n), max_tokens=30)) for n, agent in enumerate(agents)]
    outcomes = all_of(turns)
    for agent, outcome, fresh in zip(agents, outcomes, expected, strict=True):
        assert same(stage, agent, outcome.tokens, fresh.tokens)
    reused = sorted(shared(outcome, fresh) for outcome, fresh in zip(outcomes, expected, strict=True))
    assert reused[0] == 0
    assert min(reused[1:]) >= head(stage) > 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_who_comes_later_takes_what_others_have_gone_on_from(together: Together, architecture: str) -> None:
    stage, pool = together(architecture)
    expected = alone(stage, *map(chat, range(4)))
    for n in range(4):
        agent = stage.sits(f"agent {n}", pool)
        outcome = agent.says(**chat(n), max_tokens=30)
        assert same(stage, agent, outcome.tokens, expected[n].tokens)
        assert shared(outcome, expected[n]) >= (head(stage) if n else 0)
        assert n or not outcome.prefix_tokens_reused
        witness = stage.talker("witness", **SPEC)
        stage.engine._pools[witness.pool].pool._prefixes._snapshots = prefixes.Snapshots(0)
        witness.says(**chat(n), max_tokens=30)
        assert same(stage, agent, agent.says("and ", max_tokens=20).tokens, witness.says("and ", max_tokens=20).tokens)
        witness.leaves()


@pytest.mark.parametrize("architecture", FORGETFUL)
def test_what_is_kept_of_a_system_message_is_good_for_pools_of_any_size(together: Together, architecture: str) -> None:
    stage, pool = together(architecture, 2)
    expected = alone(stage, *map(chat, range(3)))
    first = stage.sits("first", pool)
    assert first.says(**chat(0), max_tokens=30).prefix_tokens_reused == 0
    for slots in (1, 4):
        agent = stage.sits(f"agent of {slots}", stage.pool(slots, id=f"{slots} slots", **SPEC))
        outcome = agent.says(**chat(2), max_tokens=30)
        assert same(stage, agent, outcome.tokens, expected[2].tokens)
        assert shared(outcome, expected[2]) == head(stage)


def test_a_model_that_can_be_cut_back_keeps_no_states(together: Together) -> None:
    stage, pool = together("llama")
    stage.sits("agent", pool).says(**chat(0), max_tokens=5)
    assert stage.engine._pools._snapshots._store is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_that_another_holds_to_the_last_token_is_gone_on_with(together: Together, architecture: str) -> None:
    stage, pool = together(architecture)
    first, second = (stage.sits(name, pool) for name in ("first", "second"))
    said = first.says(SYSTEM, max_tokens=1)
    [expected] = alone(stage, {"prompt": SYSTEM + "and "})
    outcome = second.says(SYSTEM + "and ", max_tokens=30)
    assert same(stage, second, outcome.tokens, expected.tokens)
    assert shared(outcome, expected) in (said.prompt_tokens, said.prompt_tokens - 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_has_left_a_slot_is_read_again(together: Together, architecture: str) -> None:
    """No chat, so nothing is kept, and the other one is far beyond what both begin with."""
    stage, pool = together(architecture)
    first, second = (stage.sits(name, pool) for name in ("first", "second"))
    first.says(SYSTEM + "x " * 90, max_tokens=30)
    request = {"prompt": SYSTEM + "but then "}
    [expected] = alone(stage, request)
    outcome = second.says(**request, max_tokens=30)
    assert same(stage, second, outcome.tokens, expected.tokens)
    assert (shared(outcome, expected) > 0) == (architecture not in FORGETFUL)


def test_a_cache_that_a_context_shift_moved_is_nobody_elses(together: Together) -> None:
    stage, pool = together("llama")
    first, second = (stage.sits(name, pool) for name in ("first", "second"))
    first.says(SYSTEM * 3, max_tokens=300, context_shift=True)
    moved = first.conversation
    assert 0 <= moved.shifted_from < moved.held
    first.closes()
    first.opens()
    assert moved.fresh < moved.held
    tokens = list(moved.tokens[: moved.held])
    assert stage.engine._pools[pool].pool._prefixes._usable(first_seat(stage, first), Reader([*tokens, 5]), more_than=0) == 0  # type: ignore[arg-type]
    first.closes(KvPlace.TOKENS)
    first.opens()
    first.says("and ", max_tokens=2)
    assert moved.fresh == moved.held
    second.says("x", max_tokens=2)


def first_seat(stage: Stage, agent: Talker) -> Any:
    return stage.engine._seats.of(agent.id).seat


class Reader:
    """As much of a turn as is looked at."""

    def __init__(self, tokens: list[int]) -> None:
        self.conversation = self
        self.tokens = tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_turn_that_was_taken_back_left_in_a_slot_is_not_taken_for_the_session(
    together: Together, architecture: str
) -> None:
    stage, pool = together(architecture)
    first, second = (stage.sits(name, pool) for name in ("first", "second"))
    first.says(SYSTEM + "x", max_tokens=20)
    before = list(first.conversation.tokens)
    first.in_step(2, first.pauses)
    assert isinstance(first.step(first.request(SYSTEM[:40] + "the world and the model " * 9, reset=True, max_tokens=9)), Paused)
    stage.engine.drop_turn(first.id)
    assert first.conversation.tokens == before
    request = {"prompt": SYSTEM + "x and more"}
    [expected] = alone(stage, request)
    outcome = second.says(**request, max_tokens=30)
    assert same(stage, second, outcome.tokens, expected.tokens)
    shared(outcome, expected)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whoever_shares_joins_leaves_and_waits_nobody_can_tell(together: Together, architecture: str, seed: int) -> None:
    """Beginnings of several lengths, half of them chats; four slots for eight agents, who pause and are held."""
    chance = random.Random(seed)
    stage, pool = together(architecture, 4)
    stage.engine._pools[pool].pool.seating._weights_bytes = 1 << 40  # every gap is closed at once
    texts = [SYSTEM[: 30 * (1 + n % 4)] + f"{n // 2} says: " + "hello world " * n for n in range(4)]
    wanted: list[dict[str, Any]] = [*({"prompt": text} for text in texts), *map(chat, range(4))]
    expected = alone(stage, *wanted, max_tokens=25)
    agents = [Talker(stage.engine, stage.plan, f"agent {n}", stage._pools[pool], room=512, pool=pool) for n in range(8)]
    requests = [agent.request(**wants, max_tokens=25) for agent, wants in zip(agents, wanted, strict=True)]
    running: dict[int, Future[TurnEnd]] = {}
    said: dict[int, TurnOutcome] = {}
    while len(said) < len(agents):
        waiting = [n for n in range(8) if n not in said and n not in running]
        for n in chance.sample(waiting, min(len(waiting), 4 - len(running))):
            seated = [agent for i, agent in enumerate(agents) if agent.seated and i not in running and i != n]
            if not agents[n].seated:
                if len(seated) + len(running) == 4:
                    chance.choice(seated).closes(chance.choice([KvPlace.HOST, KvPlace.TOKENS]))
                agents[n].opens()
            running[n] = agents[n].begins(requests[n])
        n = chance.choice(list(running))
        if chance.random() < 0.3:
            stage.engine.hold_turn(agents[n].id, True)
            threading.Event().wait(chance.random() / 100)
            stage.engine.hold_turn(agents[n].id, False)
        threading.Event().wait(chance.random() / 100)
        if chance.random() < 0.7:
            agents[n].pauses()
        end = running.pop(n).result(WITHIN_S)
        if isinstance(end, TurnOutcome):
            said[n] = end
    for n, agent in enumerate(agents):
        assert same(stage, agent, said[n].tokens, expected[n].tokens)
        outcome, fresh = said[n], expected[n]
        assert outcome.prompt_tokens + outcome.prompt_tokens_reused + outcome.prefix_tokens_reused == fresh.prompt_tokens
        agent.leaves()


def test_states_are_replaced_least_recently_used_first(together: Together) -> None:
    stage, pool = together("mamba")
    agent = stage.sits("agent", pool)
    agent.says(**chat(0), max_tokens=2)
    size = stage.engine._seats.of(agent.id).seat.sequence.state_bytes()
    snapshots = prefixes.Snapshots(2 * size)
    label = stage.engine._pools[pool].label
    sequence = stage.engine._seats.of(agent.id).seat.sequence

    def kept(n: int) -> bool:
        return snapshots.has(label(20 + n), range(20 + n))

    call = stage.engine._pools[pool].pool.call
    for n in range(2):
        assert call(lambda n=n: snapshots.keep(label(20 + n), range(20 + n), sequence)).result(WITHIN_S)
    assert call(lambda: snapshots.restore(label(20), range(20), sequence)).result(WITHIN_S)
    assert call(lambda: snapshots.keep(label(22), range(22), sequence)).result(WITHIN_S)
    assert [kept(n) for n in range(3)] == [True, False, True]
    assert snapshots.longest(label(0), range(40)) == 22
    assert snapshots.longest(label(0), range(21)) == 20
    assert not call(lambda: prefixes.Snapshots(size - 1).keep(label(5), range(5), sequence)).result(WITHIN_S)
    snapshots.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_that_begin_alike_are_read_together_to_where_they_part(together: Together, architecture: str) -> None:
    """No chats: where they part is known only by comparing them. The second shares more with the third than with the first."""
    stage, pool = together(architecture)
    texts = [
        SYSTEM + "one and only " * 3,
        SYSTEM + "hello hello hello world, " * 3 + "A",
        SYSTEM + "hello hello hello world, " * 3 + "B",
    ]
    expected = alone(stage, *({"prompt": text} for text in texts))
    agents = [stage.sits(f"agent {n}", pool) for n in range(3)]
    with agents[0].busy():
        turns = [agent.begins(agent.request(text, max_tokens=30)) for agent, text in zip(agents, texts, strict=True)]
    outcomes = all_of(turns)
    for agent, outcome, fresh in zip(agents, outcomes, expected, strict=True):
        assert same(stage, agent, outcome.tokens, fresh.tokens)
    reused = sorted(shared(outcome, fresh) for outcome, fresh in zip(outcomes, expected, strict=True))
    assert reused[0] == 0
    assert reused[1] > 64
    assert reused[2] > 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_takes_the_beginning_of_another_that_takes_a_longer_one_at_the_same_time(
    together: Together, architecture: str
) -> None:
    stage, pool = together(architecture)
    begins = "<|im_start|>system\n" + SYSTEM[:44]
    wanted: list[dict[str, Any]] = [{"prompt": begins + "quite another story: 1 2 3 4 5 6 7 8 9"}, chat(1)]
    expected = alone(stage, *wanted)
    keeper, one, other = (stage.sits(name, pool) for name in ("keeper", "one", "other"))
    keeper.says(**chat(0), max_tokens=5)
    keeper.closes(KvPlace.TOKENS)
    other.says(begins, max_tokens=1)
    began = other.cached
    with one.busy():
        turns = []
        for n, (agent, wants) in enumerate(zip((one, other), wanted, strict=True), start=1):  # prompts are cut in several threads
            turns.append(agent.begins(agent.request(**wants, max_tokens=30)))
            eventually(lambda n=n: len(stage.engine._pools[pool].pool._joining) == n, 5)  # type: ignore[misc]
    outcomes = all_of(turns)
    for agent, outcome, fresh in zip((one, other), outcomes, expected, strict=True):
        assert same(stage, agent, outcome.tokens, fresh.tokens)
    assert (outcomes[0].prefix_tokens_reused, outcomes[1].prompt_tokens_reused) == (began, began)
    assert (outcomes[1].prefix_tokens_reused == head(stage) - began) == (architecture in FORGETFUL)
    keeper.opens()


@pytest.mark.parametrize("ends", ["held", "paused", "stopped"])
def test_who_waits_for_anothers_reading_goes_on_alone_when_that_one_does_not(together: Together, ends: str) -> None:
    stage, pool = together("jamba")
    expected = alone(stage, chat(1))
    first, second = (stage.sits(name, pool) for name in ("first", "second"))
    act = {"held": lambda: stage.engine.hold_turn(first.id, True), "paused": first.pauses, "stopped": first.stops}[ends]
    first.in_step(2, act)
    with first.busy():
        leads, follows = (agent.begins(agent.request(**chat(n), max_tokens=30)) for n, agent in enumerate((first, second)))
    [outcome] = all_of([follows])
    assert same(stage, second, outcome.tokens, expected[0].tokens)
    assert shared(outcome, expected[0]) < head(stage)
    stage.engine.hold_turn(first.id, False)
    if ends == "stopped":
        with pytest.raises(TurnCancelled):
            leads.result(WITHIN_S)
    else:
        leads.result(WITHIN_S)


def test_a_turn_that_was_too_large_for_its_first_seat_says_all_that_it_shared_in_the_next(together: Together) -> None:
    """Whatever its agent's KV held of something else before."""
    stage, pool = together("llama")
    stage.sits("leader", pool).says(**chat(1), max_tokens=5)
    agent = stage.sits("agent", pool)
    agent.says("Something else. " * 10, max_tokens=5)
    agent.room = 32
    request = agent.request(**chat(2), max_tokens=5)
    assert isinstance(agent.step(request), Outgrown)
    agent.room = 512
    outcome, (fresh,) = agent.step(request), alone(stage, chat(2), max_tokens=5)
    assert isinstance(outcome, TurnOutcome)
    assert shared(outcome, fresh) == head(stage) - outcome.prompt_tokens_reused
