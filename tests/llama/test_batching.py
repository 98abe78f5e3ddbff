"""Agents that decode together: each says what it says alone, whoever comes, goes, waits or moves meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from conductor.backend.turn import Paused, TurnEnd, TurnOutcome
from conductor.types import Chunk, PoolId
from tests.support.company import ARCHITECTURES, SPEC, alone, prompt, same
from tests.support.growing import WITHIN_S, Stage, Talker, all_of
from tests.support.parrot import write_parrot
from tests.support.talk import SHIPPED

pytestmark = pytest.mark.usefixtures("samplers_are_closed")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_six_agents_at_once_say_what_each_says_alone(together: Callable[..., tuple[Stage, PoolId]], architecture: str) -> None:
    stage, pool = together(architecture)
    prompts = {f"agent {n}": prompt(n) for n in range(6)}
    expected = alone(stage, prompts, max_tokens=60)
    agents = {name: stage.sits(name, pool) for name in prompts}
    turns = [agents[name].begins(agents[name].request(text, max_tokens=60)) for name, text in prompts.items()]
    for name, turn in zip(prompts, all_of(turns), strict=True):
        assert same(stage, agents[name], turn.tokens, expected[name])


def test_text_is_made_and_handed_on_while_a_gpu_computes(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    stage.engine._pools[pool].pool.context.works_on = True  # it is waited for, and its rows are searched, as on a GPU
    prompts = {f"agent {n}": prompt(n) for n in range(6)}
    expected = alone(stage, prompts, max_tokens=40)
    agents = {name: stage.sits(name, pool) for name in prompts}
    chunks: dict[str, list[Chunk]] = {name: [] for name in prompts}
    turns = [
        agents[name].begins(agents[name].request(text, max_tokens=40), emit=chunks[name].append if n % 2 else None)
        for n, (name, text) in enumerate(prompts.items())
    ]
    for (name, told), turn in zip(chunks.items(), all_of(turns), strict=True):
        assert same(stage, agents[name], turn.tokens, expected[name])
        assert "".join(chunk.text for chunk in told) in ("", turn.text)
        pieces = map(stage.engine._models[stage.plan.id].model.piece, turn.tokens)
        assert b"".join(pieces).decode("utf-8", "replace").startswith(turn.text)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whoever_joins_leaves_pauses_and_waits_nobody_can_tell(
    together: Callable[..., tuple[Stage, PoolId]], architecture: str, seed: int
) -> None:
    """At random moments: four slots for seven agents, who pause, stand aside, are held, and come back into other slots."""
    chance = random.Random(seed)
    stage, pool = together(architecture, 4)
    seating = stage.engine._pools[pool].pool.seating
    seating._weights_bytes = 1 << 40  # every gap is closed at once
    prompts = {f"agent {n}": prompt(n) for n in range(7)}
    expected = alone(stage, prompts, max_tokens=50)
    agents = {name: Talker(stage.engine, stage.plan, name, stage._pools[pool], room=512, pool=pool) for name in prompts}
    requests = {name: agents[name].request(text, max_tokens=50) for name, text in prompts.items()}
    running: dict[str, Future[TurnEnd]] = {}
    said: dict[str, tuple[int, ...]] = {}
    stood_still = 0
    while len(said) < len(prompts):
        for name in [name for name, agent in agents.items() if agent.seated and name not in running]:
            agents[name].closes()
        waiting = [name for name in prompts if name not in said and name not in running]
        for name in chance.sample(waiting, min(len(waiting), 4 - len(running))):
            agents[name].opens()
            running[name] = agents[name].begins(requests[name])
        name = chance.choice(list(running))
        if chance.random() < 0.5:
            stage.engine.hold_turn(agents[name].id, True)
            threading.Event().wait(chance.random() / 100)
            stage.engine.hold_turn(agents[name].id, False)
        else:
            threading.Event().wait(chance.random() / 100)
            agents[name].pauses()
            end = running.pop(name).result(WITHIN_S)
            stood_still += isinstance(end, Paused)
            if isinstance(end, TurnOutcome):
                said[name] = end.tokens
    assert stood_still
    for name, agent in agents.items():
        assert same(stage, agent, said[name], expected[name])
        agent.leaves()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_closing_gaps_is_invisible(
    together: Callable[..., tuple[Stage, PoolId]], architecture: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other agent is idle: those who talk move side by side, through a free slot or, without one, host memory."""
    names = [f"agent {n}" for n in range(5 if free else 6)]
    stage, pool = together(architecture)
    seating = stage.engine._pools[pool].pool.seating
    seating._weights_bytes = 1 << 40
    opening = alone(stage, {name: prompt(n) for n, name in enumerate(names)}, max_tokens=20)
    agents = {name: stage.sits(name, pool) for name in names}
    witnesses = {name: stage.talker(f"witness {name}", **SPEC) for name in names}
    for n, name in enumerate(names):
        assert agents[name].says(prompt(n), max_tokens=20).tokens == opening[name]
        witnesses[name].says(prompt(n), max_tokens=20)
    slots = {name: agents[name].slot for name in names}
    talking = names[::2]
    with agents[names[1]].busy():
        turns = [agents[name].begins(agents[name].request("and then ", max_tokens=40)) for name in talking]
    said = dict(zip(talking, (turn.tokens for turn in all_of(turns)), strict=True))
    assert {name: agents[name].slot for name in names} != slots
    side_by_side = sorted(agents[name].slot for name in talking)
    assert side_by_side == list(range(side_by_side[0], side_by_side[0] + len(talking)))
    assert len({agent.slot for agent in agents.values()}) == len(names)
    said |= {name: agents[name].says("and then ", max_tokens=40).tokens for name in names[1::2]}
    for name, agent in agents.items():
        assert same(stage, agent, said[name], witnesses[name].says("and then ", max_tokens=40).tokens)


def test_real_models_decode_together_as_they_do_alone(on_stage: Callable[..., Stage]) -> None:
    stage = on_stage(SHIPPED["coder"])
    texts = [f"def task_{n}(x):\n" for n in range(4)]
    witness = stage.talker("witness", window=512)
    expected = [witness.says(text, max_tokens=60, reset=True).tokens for text in texts]
    pool = stage.pool(4, window=512)
    agents = [stage.sits(f"agent {n}", pool) for n in range(4)]
    turns = [agent.begins(agent.request(text, max_tokens=60)) for agent, text in zip(agents, texts, strict=True)]
    for agent, turn, said in zip(agents, all_of(turns), expected, strict=True):
        assert same(stage, agent, turn.tokens, said, within=1.0)  # of logits that span 25: its weights have 8 bits


def test_a_seed_draws_the_same_in_company(on_stage: Callable[..., Stage], tmp_path: Path) -> None:
    """From a model whose sums are exact, whoever is beside it."""
    stage = on_stage(write_parrot(tmp_path / "parrot.gguf", "abcdefghij"))
    prompts = {f"agent {n}": prompt(n) for n in range(4)}
    options = {"max_tokens": 40, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    expected = alone(stage, prompts, **options)
    pool = stage.pool(4, **SPEC)
    agents = {name: stage.sits(name, pool) for name in prompts}
    turns = [agents[name].begins(agents[name].request(text, **options)) for name, text in prompts.items()]
    assert [turn.tokens for turn in all_of(turns)] == list(expected.values())


def test_pools_take_turns_with_the_cores_and_their_agents_say_what_they_say_alone(tiny: Callable[..., Stage]) -> None:
    stage = tiny("llama")
    prompts = {f"agent {n}": prompt(n) for n in range(6)}
    expected = alone(stage, prompts, max_tokens=60)
    pools = [stage.pool(2, id=f"pool {n}", **SPEC) for n in range(3)]
    agents = {name: stage.sits(name, pools[n % 3]) for n, name in enumerate(prompts)}
    turns = [agents[name].begins(agents[name].request(text, max_tokens=60)) for name, text in prompts.items()]
    for name, turn in zip(prompts, all_of(turns), strict=True):
        assert same(stage, agents[name], turn.tokens, expected[name])
