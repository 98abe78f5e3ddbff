"""Agents of models larger than the device say what they say where there is room for all of it, and lose nothing on the way.

The whole conductor with real llama.cpp on the host device, whose copies are real. Both sides are best-effort agents, whose
weights come from the same home: plainly loaded, llama.cpp may repack them. See also: `test_movable_weights.py`, to the last bit;
`test_streamed_turns_cut_short.py`, what ends early and what fails.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from conductor.backend.catalog import Catalog
from conductor.backend.engine import Engine
from conductor.config import parse_config
from conductor.core.estimate import ModelPlan
from conductor.core.streaming import Placement
from conductor.errors import AdmissionRefused, RefusalCode
from conductor.gpu_conductor import GpuConductor
from conductor.types import AgentId, Chunk, ContextSpec, DecodeResult, DeviceKind, Kind, ModelState, PoolId
from tests.support.growing import Talker, all_of
from tests.support.larger import (
    CREW,
    FOR_ONE,
    KINDS,
    ROOMY,
    SMALL,
    TURNS,
    Begin,
    alone,
    converses,
    held_bytes,
    joins,
    residency,
    says,
    watched,
)  # fmt: skip

# --- the same words -----------------------------------------------------------------------------------------------------


async def test_one_agent_and_several_say_the_same_as_where_there_is_room_for_all_of_it(begin: Begin) -> None:
    """Several turn by turn: who decodes beside whom is a matter of moments, and sums round otherwise in other company."""
    said: list[dict[str, list[tuple[int, ...]]]] = []
    for host_bytes in (ROOMY, SMALL):
        conductor = await begin(host_bytes, *KINDS)
        said.append({kind: await one_and_several(conductor, kind) for kind in KINDS})
    assert said[0] == said[1]
    assert all(len({*turns}) > len(TURNS) for turns in said[0].values())


async def one_and_several(conductor: GpuConductor, kind: str) -> list[tuple[int, ...]]:
    await joins(conductor, "ada", kind)
    async with watched(conductor):
        found = await converses(conductor, "ada")
        for agent in CREW[1:]:
            await joins(conductor, agent, kind)
        for turn in range(len(TURNS)):
            found += [await says(conductor, agent, turn, prompt=f"{agent}, {turn}") for agent in CREW]
    whole = (await residency(conductor, kind)).residency == "resident"
    assert whole == (conductor.config.device.host_bytes == 64 << 20)
    for agent in CREW:
        await conductor.unregister(agent)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_who_share_a_pass_say_the_same_whatever_part_of_the_weights_is_there(
    large_models: dict[str, Path], kind: str
) -> None:
    path = large_models[kind]
    config = parse_config(
        {"device": {"kind": "host", "host_bytes": ROOMY}, "threads": 1, "model_dirs": [str(path.parent)]},
        source="test", directory=path.parent,
    )  # fmt: skip
    engine = Engine(config)
    plan = Catalog(config).plan(str(path), DeviceKind.HOST)
    said = []
    for placement in (Placement(8, 0), Placement(0, 2), Placement(3, 4)):
        assert engine.load(plan, placement) == engine.used_bytes()
        said.append(in_company(engine, plan))
        step_s = engine.unload(plan.id, keep_home=True)
        assert (step_s is not None) == placement.streams
        assert (engine.used_bytes(), engine.is_at_home(plan.id)) == (0, True)
    engine.unload(plan.id)
    engine.close()
    assert said[0] == said[1] == said[2]
    assert len({*said[0]}) > len(TURNS)


def in_company(engine: Engine, plan: ModelPlan) -> list[tuple[int, ...]]:
    """Three agents begin each turn in the same step, and all of their prompts fit into it."""
    pool, spec = PoolId("shared"), ContextSpec(window=256, slots=len(CREW), n_batch=64, n_ubatch=16)
    engine.open_pool(pool, plan.id, spec, for_agent=AgentId("ada"))
    talkers = [Talker(engine, plan, name, spec, room=spec.window, pool=pool) for name in CREW]
    said: list[tuple[int, ...]] = []
    for talker in talkers:
        talker.opens()
    for turn, asked in enumerate(TURNS):
        drawn = {name: value for name, value in asked.items() if name != "prompt"}
        with talkers[0].busy():
            turns = [it.begins(it.request(f"{it.id}, turn {turn}", max_tokens=16, **drawn)) for it in talkers]
        said += [end.tokens for end in all_of(turns)]
    for talker in talkers:
        talker.leaves()
    engine.close_pool(pool)
    return said


async def test_several_at_once_all_have_their_turns_within_what_is_booked(begin: Begin) -> None:
    conductor = await begin(SMALL, "experts", min_turn_ms=1)
    for agent in CREW:
        await joins(conductor, agent, "experts")
    async with watched(conductor):
        said = await asyncio.gather(*(converses(conductor, agent) for agent in CREW))
    assert all(tokens for turns in said for tokens in turns)


async def test_what_streams_is_told_to_the_byte(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama")
    await joins(conductor, "ada", "llama")
    first = (await conductor.status()).models[0]
    assert (first.residency, first.bytes, first.weights) == ("parked", 0, None)
    await says(conductor, "ada", 0)
    model, ledger = await residency(conductor, "llama"), (await conductor.status()).ledger
    placement = conductor._state.models[next(iter(conductor._state.models))].placement
    assert placement is not None
    assert model.residency == f"streamed {placement.resident}+{placement.slots}/8"
    assert model.weights is not None
    layer = model.ring_bytes // placement.slots
    assert model.weights.home_bytes == model.estimated_bytes
    assert model.weights.passes > 16
    assert model.weights.moved_bytes == model.weights.passes * (8 - placement.resident) * layer > 0
    assert model.weights.link_share >= 0
    lines = {reserved.kind: reserved.bytes for reserved in ledger.reservations if reserved.bytes}
    assert lines[Kind.RING] == model.ring_bytes
    assert lines[Kind.WEIGHTS] + lines[Kind.RING] == model.bytes
    assert sum(lines.values()) == ledger.allocated_bytes == held_bytes(conductor) == conductor._engine.used_bytes()
    assert ledger.allocated_bytes <= 5 << 20 < model.weights.home_bytes


async def test_the_last_agent_takes_everything_with_it(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama")
    for agent in CREW:
        await joins(conductor, agent, "llama")
    await asyncio.gather(*(converses(conductor, agent, 1) for agent in CREW))
    for agent in CREW:
        assert conductor._state.books.homes.ledger.allocated_bytes > 8_000_000
        await conductor.unregister(agent)
    assert ((await conductor.status()).models, conductor._state.books.homes.ledger.allocated_bytes) == ((), 0)
    assert (held_bytes(conductor), conductor._engine.used_bytes(), conductor._engine._models._loaded) == (0, 0, {})


async def test_whoever_wants_such_weights_to_stay_is_told_that_they_never_fit(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama")
    with pytest.raises(AdmissionRefused) as refused:
        await conductor.register("ada", "llama", window=512)
    assert refused.value.refusal.code is RefusalCode.NEVER
    await joins(conductor, "ada", "llama")
    assert len(await says(conductor, "ada", 0)) == 16


# --- back and forth -----------------------------------------------------------------------------------------------------


async def test_two_models_that_do_not_fit_together_take_turns_and_lose_nothing(begin: Begin) -> None:
    names = {"ada": "llama", "bob": "qwen2"}
    rounds = 2 * len(TURNS)
    expected = {agent: await alone(begin, model, rounds) for agent, model in names.items()}
    conductor = await begin(FOR_ONE, *names.values())
    for agent, model in names.items():
        await joins(conductor, agent, model)
    said: dict[str, list[tuple[int, ...]]] = {agent: [] for agent in names}
    async with watched(conductor):
        for turn in range(rounds):
            for agent in names:
                result = await conductor.decode(agent, **{"max_tokens": 16, **TURNS[turn % len(TURNS)]})
                said[agent].append(result.tokens)
                assert (result.recomputed_tokens, result.kv_swap_restored) == (0, turn > 0)
                others = [it for it in (await conductor.status()).models if it.key != names[agent]]
                assert all((it.state, it.residency, it.bytes) == (ModelState.PARKED, "parked", 0) for it in others)
                assert (await residency(conductor, names[agent])).residency == "resident"
    assert said == expected
    assert len(conductor._engine._models._loaded) == 2, "read from their files once"


async def test_turns_of_two_models_that_stream_asked_for_at_once_are_all_right(begin: Begin) -> None:
    names = {"ada": "llama", "bob": "gemma3"}
    expected = {agent: await alone(begin, model) for agent, model in names.items()}
    conductor = await begin(SMALL, *names.values())
    for agent, model in names.items():
        await joins(conductor, agent, model)
    async with watched(conductor):
        said = await asyncio.gather(*(converses(conductor, agent) for agent in names))
    assert dict(zip(names, said, strict=True)) == expected


async def test_a_model_is_made_smaller_and_larger_between_turns_as_others_come_and_go(begin: Begin) -> None:
    expected = await alone(begin, "llama")
    conductor = await begin(FOR_ONE, "llama")
    await joins(conductor, "ada", "llama")
    said, seen = [await says(conductor, "ada", 0)], [(await residency(conductor, "llama")).residency]
    reservation = await conductor.reserve("trainer", 6 << 20)
    said.append(await says(conductor, "ada", 1))
    seen.append((await residency(conductor, "llama")).residency)
    await conductor.release(reservation)
    await conductor.register("sue", "llama", window=512)  # whose weights must stay
    said.append(await says(conductor, "ada", 2))
    seen.append((await residency(conductor, "llama")).residency)
    assert said == expected
    assert (seen[0], seen[1][:9], seen[2]) == ("resident", "streamed ", "resident")
    assert len(await says(conductor, "sue", 0)) == 16


async def test_a_running_turn_stands_still_while_its_model_shrinks_and_goes_on_with_the_same_tokens(begin: Begin) -> None:
    roomy = await begin(ROOMY, "llama")
    await joins(roomy, "ada", "llama")
    expected = await says(roomy, "ada", 0, max_tokens=160)
    conductor = await begin(FOR_ONE, "llama", min_turn_ms=1)
    await joins(conductor, "ada", "llama")
    made: list[Chunk] = []
    async for item in conductor.stream("ada", TURNS[0]["prompt"], max_tokens=160):
        if isinstance(item, DecodeResult):
            break
        made.append(item)
        if len(made) == 1:
            await conductor.reserve("trainer", 6 << 20)
    assert isinstance(item, DecodeResult)
    assert (item.generated_tokens, item.tokens) == (160, expected)
    assert (await residency(conductor, "llama")).residency.startswith("streamed")


async def test_a_fork_of_an_agent_whose_model_streams_goes_on_as_the_original_would(begin: Begin) -> None:
    expected = await alone(begin, "qwen2")
    conductor = await begin(SMALL, "qwen2")
    await joins(conductor, "ada", "qwen2")
    assert await converses(conductor, "ada", 2) == expected[:2]
    await conductor.fork("ada", "twin")
    assert await asyncio.gather(*(says(conductor, agent, 2) for agent in ("twin", "ada"))) == [expected[2]] * 2
