"""Conversations that are copied: the copy goes on as the original does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.types import KvPlace, PoolId
from tests.support.company import ARCHITECTURES, prompt
from tests.support.growing import WITHIN_S, Stage, Talker
from tests.support.talk import SHIPPED

pytestmark = pytest.mark.usefixtures("samplers_are_closed")


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_goes_on_as_the_original_does(
    together: Callable[..., tuple[Stage, PoolId]], architecture: str, away: bool
) -> None:
    stage, pool = together(architecture)
    source = stage.sits("source", pool)
    source.says(prompt(3), max_tokens=30)
    if away:
        source.closes()
    twin = Talker(stage.engine, stage.plan, "twin", stage._pools[pool], room=512, pool=pool)
    copied = stage.engine.copy_kv(source.id, twin.id, to=KvPlace.HOST)
    assert twin.tokens == source.tokens
    closed = copied.result(WITHIN_S)
    assert closed.place is KvPlace.HOST
    if away:
        source.opens()
    assert twin.opens().restored_bytes == closed.saved_bytes > 0
    outcomes = [agent.says("and ", max_tokens=30) for agent in (source, twin)]
    assert outcomes[0].tokens == outcomes[1].tokens
    assert outcomes[1].recomputed_tokens == 0
    twin.leaves()


def test_a_copy_without_room_in_host_memory_takes_the_kv_of_the_seat_beside_it(on_stage: Callable[..., Stage]) -> None:
    stage = on_stage(SHIPPED["coder"], host_budget="4KiB")
    pool = stage.pool(2, window=512)
    source = stage.sits("source", pool)
    source.says("import os\n", max_tokens=30)
    twin = Talker(stage.engine, stage.plan, "twin", stage._pools[pool], room=512, pool=pool)
    assert stage.engine.copy_kv(source.id, twin.id, to=KvPlace.HOST).result(WITHIN_S).place is KvPlace.TOKENS
    twin.opens()
    said = twin.says("x", max_tokens=5)
    assert (said.recomputed_tokens, said.prefix_tokens_reused, said.prompt_tokens) == (0, twin.tokens - 5 - 2, 2)
    twin.leaves()
