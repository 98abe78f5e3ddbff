"""Saved KV in a context with another number of slots: the very same state, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conductor.backend.llama import Context, Llama, Model
from conductor.types import ContextSpec, DeviceKind, KvPlace
from tests.support.company import ARCHITECTURES, SPEC, prompt
from tests.support.growing import Stage, Talker
from tests.support.tiny_gguf import write_tiny_gguf

#: longer than gemma3's window, and than a decode
LENGTH = 150
#: (slots, the slot it is saved from) to (slots, the slot it is restored in)
MOVES = [((1, 0), (4, 3)), ((4, 2), (1, 0)), ((4, 1), (8, 5)), ((4, 3), (4, 0)), ((3, 0), (256, 255))]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    path = write_tiny_gguf(tmp_path / "model.gguf", architecture=request.param, sliding_window=64, n_layer=6, seed=5)
    return Llama.instance().load(str(path), DeviceKind.HOST)


def reads(context: Context, slot: int) -> None:
    tokens = np.random.default_rng(3).integers(5, 250, LENGTH).tolist()
    for start in range(0, LENGTH, 30):
        context.batch.clear()
        context.batch.add(tokens[start : start + 30], start, slot, output=False)
        context.decode()


def goes_on(context: Context, slot: int) -> npt.NDArray[np.float32]:
    context.batch.clear()
    context.batch.add_one(9, LENGTH, slot)
    context.decode()
    context.synchronize()
    return context.logits(1)[0].copy()


@pytest.mark.parametrize("flash_attention", [True, False])
def test_a_state_goes_on_to_the_last_bit_in_a_context_of_any_number_of_slots(model: Model, flash_attention: bool) -> None:
    for (slots, slot), (others, other) in MOVES:
        spec = ContextSpec(window=256, n_batch=32, n_ubatch=32, flash_attention=flash_attention, slots=slots)
        source = model.context(spec, n_threads=1)
        target = model.context(ContextSpec(**{**spec_of(spec), "slots": others}), n_threads=1)
        reads(source, slot)
        sequence, restored = source.sequence(slot), target.sequence(other)
        state = np.full(sequence.state_bytes(), 0xAB, np.uint8)
        form = sequence.save(state)
        assert form is not None
        assert restored.restore(state, form.packed(state))
        assert restored.state_bytes() == sequence.state_bytes()
        assert np.array_equal(goes_on(source, slot), goes_on(target, other))
        for context in (source, target):
            context.close()
    model.close()


def spec_of(spec: ContextSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in ("window", "n_batch", "n_ubatch", "flash_attention")}


@pytest.mark.parametrize("to", [KvPlace.HOST, KvPlace.DISK])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_agent_moves_between_pools_of_other_sizes_and_reads_nothing_again(
    tiny: Callable[..., Stage], architecture: str, to: KvPlace
) -> None:
    stage = tiny(architecture)
    pools = [stage.pool(slots, id=f"{slots} slots", **SPEC) for slots in (1, 4, 8)]
    stays = stage.talker("stays", **SPEC)
    moves = Talker(stage.engine, stage.plan, "moves", stage._pools[pools[0]], room=512, pool=pools[0])
    moves.opens()
    for n in (0, 1, 0, 1, 2, 1):
        said = [agent.says(prompt(2), max_tokens=9) for agent in (stays, moves)]
        assert said[0].tokens == said[1].tokens
        assert said[1].recomputed_tokens == 0
        bytes = moves.closes(to).saved_bytes
        moves.pool = pools[n]
        assert moves.opens().restored_bytes == bytes == stage.engine.state_bytes(moves.id)
    assert (stage.memory.dropped, stage.memory.damaged) == (0, 0)
    moves.leaves()


def test_a_layout_that_is_not_known_is_recomputed_with_other_slots_and_not_called_damaged(tiny: Callable[..., Stage]) -> None:
    stage = tiny("llama")
    pools = [stage.pool(slots, id=f"{slots} slots", **SPEC) for slots in (2, 4)]
    agent = Talker(stage.engine, stage.plan, "agent", stage._pools[pools[0]], room=512, pool=pools[0])
    agent.opens()
    agent.says(prompt(2), max_tokens=9)
    for pool, restored, dropped in ((pools[0], True, 0), (pools[1], False, 1)):
        agent.closes()
        stage.engine._saved._blobs[agent.id].form = None  # as if llama.cpp had laid it out otherwise
        agent.pool = pool
        assert (agent.opens().restored_bytes > 0) is restored
        assert (stage.memory.dropped, stage.memory.damaged) == (dropped, 0)
    assert agent.says("and ", max_tokens=9).recomputed_tokens > 0
    agent.leaves()
